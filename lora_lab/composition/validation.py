"""Find what cannot work on any machine, from the config alone."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from lora_lab.comparison.rule import percent
from lora_lab.composition.cotrain_faults import cotrain_faults
from lora_lab.composition.full_training import full_faults
from lora_lab.composition.limits import number_faults
from lora_lab.composition.optimizer_faults import optimizer_faults
from lora_lab.composition.places import cluster_faults, data_parallel_faults, sharding_faults, slot_faults
from lora_lab.composition.variants import variant_faults
from lora_lab.config import (
    ALL,
    AUTO,
    TIED,
    InvalidInput,
    ModelConfig,
    TrackingConfig,
    TrainConfig,
    TrialConfig,
    too_many_layers,
)
from lora_lab.data_config import DataConfig, SourceConfig
from lora_lab.dataset.layouts import map_fault
from lora_lab.dataset.shipped import shipped_names
from lora_lab.method_config import MethodConfig
from lora_lab.options import (
    Attention,
    Batching,
    Checkpointing,
    DataSource,
    EngineKind,
    Isolation,
    ModelSource,
    OnSpike,
    Quantization,
    TrackingKind,
    Weights,
)
from lora_lab.secrets import without_secrets
from lora_lab.settings import settings_of
from lora_lab.store.server_address import fault_of_address

_DEVICE = re.compile(r"auto|cpu|gpu:\d+|GPU-[0-9a-fA-F-]+")
_MODEL_NAME = re.compile(r"\w[\w .-]{0,255}")
"""MLflow's databases hold 256 characters, and its addresses take no / : and %."""

_HUB_NAME = re.compile(r"(?!.*(?:--|\.\.|\.git$))(?:\b[\w.-]+\b/)?\b[\w.-]{1,96}\b", re.ASCII)
"""As huggingface_hub checks it: OWNER/NAME."""


def faults(config: TrialConfig) -> list[str]:
    """Return everything in `config` that cannot work on any machine, one sentence each; empty if valid."""
    return [
        *number_faults(config),
        *_sharing_faults(config),
        *optimizer_faults(config),
        *_engine_faults(config),
        *_method_faults(config.method),
        *full_faults(config),
        *variant_faults(config),
        *_model_faults(config.model, config.seq_len),
        *_data_faults(config),
        *_train_faults(config),
        *_place_faults(config),
        *slot_faults(config),
        *data_parallel_faults(config),
        *sharding_faults(config),
        *cluster_faults(config),
        *cotrain_faults(config),
        *_repeats_faults(config),
        *_secret_faults(config),
    ]


def _sharing_faults(config: TrialConfig) -> list[str]:
    found = []
    if config.vram_limit_gib is not None and config.share_device:
        found.append(
            f"vram_limit_gib={config.vram_limit_gib:g} is checked against the whole card's reading, which others "
            "change with share_device=true; leave one of them out."
        )
    if (
        config.attention is Attention.flash_attention_2
        and config.data.batching is Batching.packed
        and config.batch_size > 1
    ):
        found.append(
            f"attention=flash_attention_2 keeps packed documents apart only at batch_size=1, not {config.batch_size}; "
            "use batch_size=1 with grad_accum_steps, or attention=sdpa."
        )
    return found


def _engine_faults(config: TrialConfig) -> list[str]:
    engine, method, found = config.engine, config.method, []
    if (
        engine.kind is EngineKind.graph
        and config.gradient_checkpointing is not Checkpointing.none
        and method.dropout > 0
    ):
        found.append(
            f"engine=graph with gradient_checkpointing={config.gradient_checkpointing.name} and "
            f"method.dropout={method.dropout:g}: checkpointing has to draw dropout's random numbers twice, and a CUDA "
            "graph cannot keep their state. Use method.dropout=0, gradient_checkpointing=none or engine=compile."
        )
    if engine.kind in (EngineKind.compile, EngineKind.graph) and method.use_dora:
        found.append(
            f"engine={engine.kind.name} with method.use_dora=true: torch cannot compile what PEFT does for DoRA's "
            "norms. Use engine=eager, or another method."
        )
    if engine.kind in (EngineKind.compile, EngineKind.graph) and config.attention is Attention.flash_attention_2:
        found.append(
            f"engine={engine.kind.name} with attention=flash_attention_2: transformers looks at the padding for it, "
            "which cannot be compiled. Use attention=sdpa, which is as fast without a mask."
        )
    if engine.kind is EngineKind.liger and config.isolation is Isolation.inline:
        found.append(
            "engine=liger with isolation=inline: liger changes functions for the whole process, and with them what "
            "runs after it. Use isolation=process."
        )
    if engine.mlp_tile is not None and engine.kind is EngineKind.liger:
        found.append(
            f"engine.mlp_tile={engine.mlp_tile} with engine=liger, which has a kernel of its own for the MLP. "
            "Use engine=graph, or engine.mlp_tile=null."
        )
    if engine.mlp_tile is not None and method.dropout > 0:
        found.append(
            f"engine.mlp_tile={engine.mlp_tile} with method.dropout={method.dropout:g}: each tile would have to draw "
            "dropout's random numbers twice. Use method.dropout=0 or engine.mlp_tile=null."
        )
    if engine.chunked_loss and any(name.rpartition(".")[2] == "lm_head" for name in method.target_modules):
        found.append(
            "engine.chunked_loss=true needs a frozen head, and method.target_modules names lm_head. "
            "Use engine.chunked_loss=false, or leave lm_head out."
        )
    if isinstance(engine.host_embeddings, str) and engine.host_embeddings != AUTO:
        found.append(f"engine.host_embeddings={engine.host_embeddings} is none of true, false and auto.")
    if isinstance(engine.host_layers, str) and engine.host_layers != ALL:
        found.append(f"engine.host_layers={engine.host_layers} is neither a number of layers nor {ALL}.")
    elif engine.host_layers and method.quantization is Quantization.none:
        found.append(
            f"engine.host_layers={engine.host_layers} keeps 4-bit weights in host memory, and "
            "method.quantization=none has none. Use method=qlora, or engine.host_layers=0."
        )
    layers = (config.model.architecture or {}).get("num_hidden_layers")
    if isinstance(layers, int) and too_many_layers(engine.host_layers, layers):
        found.append(too_many_layers(engine.host_layers, layers))
    if engine.host_embeddings is True and (config.model.architecture or {}).get("tie_word_embeddings"):
        found.append(TIED)
    return found


def _method_faults(method: MethodConfig) -> list[str]:
    found = []
    if not method.target_modules:
        found.append("method.target_modules is empty; use [all-linear] or name modules, for example [q_proj,v_proj].")
    if method.double_quantization and method.quantization is Quantization.none:
        found.append("method.double_quantization needs method.quantization=nf4 or fp4.")
    return found


def _model_faults(model: ModelConfig, seq_len: int) -> list[str]:
    found = []
    if model.source is ModelSource.hub and not model.id and model.weights is Weights.pretrained:
        found.append("model.id is missing; name a model on the hub, for example model.id=Qwen/Qwen2.5-0.5B-Instruct.")
    if model.source is ModelSource.hub and model.id and not _HUB_NAME.fullmatch(model.id):
        found.append(
            f"model.id={model.id} is not a name of the hub. Write OWNER/NAME, for example "
            "model.id=Qwen/Qwen2.5-0.5B-Instruct. For a folder type model=local model.path=FOLDER."
        )
    if model.source is ModelSource.local and not model.path:
        found.append("model.path is missing; give the folder of a model, for example model.path=models/mine.")
    if model.source is ModelSource.package and not model.package:
        found.append("model.package is missing; copy the block from conf/model/smollm2_135m.yaml.")
    if model.source is ModelSource.tiny and model.weights is Weights.pretrained:
        found.append("model.source=tiny has no weights to load; add model.weights=random or choose another model.")
    if model.weights is Weights.random and not model.architecture:
        found.append("model.weights=random needs model.architecture; only models with stated shapes have it.")
    if model.trust_remote_code and not model.revision:
        found.append(
            "model.trust_remote_code=true runs code from the hub, so it needs a pinned version: "
            "add model.revision=<commit>."
        )
    if model.max_seq_len is not None and seq_len > model.max_seq_len:
        found.append(
            f"seq_len={seq_len} is beyond the model's {model.max_seq_len} positions; "
            f"use seq_len={model.max_seq_len} or less."
        )
    return found


def _data_faults(config: TrialConfig) -> list[str]:
    data = config.data
    if data.source is DataSource.file and not data.path and not data.sources:
        if data.id:
            return [f"data.id={data.id} names a data set on the hub; to read it, add data.source=hub."]
        return ["data.path is missing; give a file or folder, for example data.path=my_rows.jsonl."]
    if data.sources and (found := _source_faults(data)):
        return found
    if data.source is DataSource.hub and not data.id:
        return ["data.id is missing; name a data set on the hub, for example data.id=tatsu-lab/alpaca."]
    if data.source is DataSource.random_tokens and not data.rows:
        return ["data.rows is missing; say how many rows of random tokens to make, for example data.rows=256."]
    if data.source is DataSource.shipped and data.path is not None and data.path not in shipped_names():
        return [
            f"data.path={data.path} is not among the rows that come with lora_lab. For rows of your own add data=chat, "
            "instruct, completion or text (data=jsonl finds out which)."
        ]
    fault = map_fault(data)
    return [fault] if fault else _unused_faults(config)


def _unused_faults(config: TrialConfig) -> list[str]:
    """Find settings of the data that would have no effect."""
    data, found = config.data, []
    if data.config is not None and data.source is not DataSource.hub:
        found.append(f"data.config={data.config} chooses a part of a data set on the hub. Leave it out.")
    if data.split is not None and data.source in (DataSource.shipped, DataSource.random_tokens):
        found.append(f"data.split={data.split} chooses a part of a folder or of a data set on the hub. Leave it out.")
    if data.heldout_path is not None and data.source is DataSource.random_tokens:
        found.append("data.heldout_path has no effect with random tokens. Leave it out.")
    if data.min_perplexity is not None and config.model.weights is Weights.random:
        found.append(
            f"data.min_perplexity={data.min_perplexity:g} asks what the model knows, and model.weights=random knows "
            "nothing. Leave it out, or use pretrained weights."
        )
    return found


def _source_faults(data: DataConfig) -> list[str]:
    if data.source is not DataSource.file:
        return [f"data.sources needs data.source=file, and it is {data.source.name}; use data=jsonl, for example."]
    if data.path or data.split:
        which = "path" if data.path else "split"
        return [f"data.{which} and data.sources are both set; leave data.{which} out, and name it in data.sources."]
    for source in data.sources:
        if (source.path is None) == (source.id is None):
            given = f"path={source.path} and id={source.id}" if source.path is not None else "neither path nor id"
            return [f"data.sources: a source has {given}; give one of them: a file or folder, or a data set's name."]
        if source.id is None and (source.config or source.revision):
            which = "config" if source.config else "revision"
            return [f"data.sources: {which} chooses a part of a data set on the hub, and path={source.path} is none."]
    weights = [source.weight for source in data.sources]
    if None in weights and any(weights):
        return ["data.sources gives some sources a weight and others none; give each one, or none to use every row."]
    key = "data.sources.weight"
    limits = next(each.limits for each in settings_of(SourceConfig, "data.sources.") if each.limits is not None)
    return [fault for weight in weights if weight is not None and (fault := limits.fault(key, weight))]


def _train_faults(config: TrialConfig) -> list[str]:
    train, found = config.train, []
    if not train.is_job:
        changed = [
            name for name, default in dataclasses.asdict(TrainConfig()).items() if getattr(train, name) != default
        ]
        return [
            f"train.{name} is a setting of a whole training, and none was asked for; add train.epochs or "
            "train.max_steps, or leave it out."
            for name in changed
        ]
    if train.epochs is not None and train.max_steps is not None:
        found.append(
            f"train.epochs={train.epochs:g} and train.max_steps={train.max_steps} are both set, and a job has one "
            "length. Give one of them. train=job sets train.epochs: leave train=job out, or add train.epochs=null."
        )
    elif train.max_steps is not None and 1 <= train.warmup >= train.max_steps:
        found.append(
            f"train.warmup={train.warmup:g} steps is not shorter than the job, train.max_steps={train.max_steps}: the "
            f"learning rate would never reach learning_rate={config.learning_rate:g}. Use fewer, or train.warmup=0."
        )
    for name, what in (
        ("warmup", "a part of the job (below 1)"),
        ("eval_every", "a part of an epoch (up to 1)"),
        ("checkpoint_every", "a part of an epoch (up to 1)"),
    ):
        value = getattr(train, name)
        if value > 1 and value % 1:
            found.append(f"train.{name}={value:g} is neither {what} nor a whole number of steps.")
    if train.early_stopping is not None and config.measure.eval_rows == 0:
        found.append(
            f"train.early_stopping={train.early_stopping} needs held-out rows to evaluate, and measure.eval_rows=0; "
            "leave one of them out."
        )
    if train.on_spike is OnSpike.lower_lr and train.keep_checkpoints == 0:
        found.append(
            "train.on_spike=lower_lr goes back to a checkpoint, and train.keep_checkpoints=0 saves none; leave one of "
            "them out."
        )
    return found


def _place_faults(config: TrialConfig) -> list[str]:
    found = []
    if not _DEVICE.fullmatch(config.device):
        found.append(f"device={config.device} is not known; use auto, cpu, gpu:0 or a UUID as nvidia-smi -L prints it.")
    if config.tracking.kind is TrackingKind.server and not config.tracking.uri:
        found.append("tracking.uri is missing; give the server, for example tracking.uri=http://127.0.0.1:5000.")
    fault = fault_of_address(config.tracking.uri) if config.tracking.uri else ""
    if fault:
        found.append(f"tracking.uri {fault}.")
    if not config.tracking.experiment.strip():
        found.append("tracking.experiment is empty; name an MLflow experiment.")
    return [*found, *_register_faults(config.tracking)]


def _register_faults(tracking: TrackingConfig) -> list[str]:
    name, found = tracking.register, list[str]()
    if name is None:
        return found
    if not _MODEL_NAME.fullmatch(name):
        found.append(
            f"tracking.register={name} is not the name of a model in MLflow; use at most 256 letters, digits, spaces, "
            ". - and _, the first of them a letter or digit, for example tracking.register=support_bot."
        )
    if tracking.kind is TrackingKind.none:
        found.append(
            "tracking.register needs a store, and tracking=none has none; use tracking=local or tracking=server."
        )
    return found


def _repeats_faults(config: TrialConfig) -> list[str]:
    found = []
    if isinstance(config.repeats, str) and config.repeats != AUTO:
        found.append(f"repeats={config.repeats} is neither a whole number nor auto.")
    if config.repeats == AUTO and not config.contrast:
        found.append("repeats=auto has nothing to compare; name a swept setting, for example contrast=optimizer.")
    if config.contrast is not None and config.repeats != AUTO:
        found.append(f"contrast={config.contrast} needs repeats=auto; add that, or leave contrast out.")
    try:
        percent(config.margin)
    except InvalidInput as refusal:
        found += refusal.faults
    return found


def _secret_faults(config: TrialConfig) -> list[str]:
    """Find settings that hold a secret. Every setting is recorded, also one from the environment (${oc.env:NAME})."""
    return [
        f"{key} holds a password or token (or the value of an environment variable that is named like one), and every "
        "setting is written into the record. Leave it out of the command; set HF_TOKEN in the environment for the hub, "
        "MLFLOW_TRACKING_TOKEN for a server."
        for key, text in _texts(dataclasses.asdict(config), "")
        if key != "tracking.uri" and without_secrets(text) != text
    ]


def _texts(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield dotted keys and values of all settings that are text."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value, key)
    elif isinstance(node, str):
        yield key, node
