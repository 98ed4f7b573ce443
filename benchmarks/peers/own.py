"""lora_lab's own engines as contenders: composed, loaded and trained as `python -m lora_lab` does."""

from dataclasses import replace
from typing import Any, cast

import torch
import transformers

from benchmarks.compose import compose
from benchmarks.peers.plan import (
    ALPHA,
    LEAN,
    LEARNING_RATE,
    LINEAR_LAYERS,
    MAX_GRAD_NORM,
    SEED,
    SMALLER,
    TILED,
    Setup,
)
from benchmarks.peers.stacks import Built, Job
from lora_lab.events import Event
from lora_lab.worker.attention import AttentionKernels
from lora_lab.worker.data import Example, train_collator
from lora_lab.worker.engines.engine import Engine, shapes
from lora_lab.worker.models import load_architecture, load_model
from lora_lab.worker.phases import PhaseClock
from lora_lab.worker.training import make_trainer

_PAD = 0


def build(setup: Setup, device: str) -> Built:
    """Load the engine named like the contender, on the shared weights.

    lora_lab's telemetry is left out: what is timed is the engine, as for the others.
    """
    config = compose(overrides(setup))
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    transformers.set_seed(SEED)
    model = load_model(config, load_architecture(config.model), where)
    collator = train_collator(config, _PAD)
    of_shape = Example([0] * config.seq_len, [0] * config.seq_len)
    engine = Engine(
        config, model, shapes(config, [of_shape], collator), AttentionKernels(), _unheard, PhaseClock(_unheard)
    )

    def collate(examples: list[Example]) -> dict[str, Any]:
        batch: dict[str, Any] = collator(examples)
        del batch["counts"]  # lora_lab's telemetry takes them out of the batch; here is none
        return batch

    def trainer(job: Job) -> Any:
        measure = replace(config.measure, warmup_steps=0, steps=job.steps, profile_steps=0)
        asked = replace(config, measure=measure)
        callbacks = [*engine.callbacks, job.callback]
        made = make_trainer(asked, model, job.rows, cast(Any, collate), callbacks, job.folder, where)
        engine.attach(made)
        return made

    attention = str(model.config._attn_implementation)
    return Built(model, trainer, attention, lambda example: example, engine.release, lambda: engine.replay_peak_bytes)


def _unheard(event: Event) -> None:
    """Drop an event."""


def overrides(setup: Setup) -> list[str]:
    """Return the command line of this contender and cell."""
    return [
        "model=local",
        f"model.path='{setup.material}/model'",
        f"engine={_engine(setup.contender)}",
        f"method={setup.method}",
        f"method.rank={setup.rank}",
        f"method.alpha={ALPHA}",
        "method.dropout=0",
        f"method.target_modules=[{','.join(LINEAR_LAYERS)}]",
        f"optimizer={_OPTIMIZERS[setup.optim]}",
        "precision=bf16",
        "data=random_tokens",
        f"data.batching={'packed' if setup.cell.packed else 'longest'}",
        "tracking=none",
        f"batch_size={setup.cell.batch_size}",
        f"seq_len={setup.cell.seq_len}",
        f"gradient_checkpointing={_checkpointing(setup)}",
        *_FURTHER.get(setup.contender, ()),
        f"learning_rate={LEARNING_RATE}",
        f"max_grad_norm={MAX_GRAD_NORM}",
        f"seed={SEED}",
    ]


_OPTIMIZERS = {"adamw_torch_fused": "adamw_fused", "adamw_8bit": "adamw_8bit"}
_HOST = "engine.host_embeddings=auto"
_FURTHER = {LEAN: (_HOST,), TILED: (_HOST, "engine.mlp_tile=4096")}


def _engine(contender: str) -> str:
    return "graph" if contender in SMALLER else contender.removeprefix("lab_")


def _checkpointing(setup: Setup) -> str:
    if not setup.cell.checkpointing:
        return "none"
    return "offloaded" if setup.contender in SMALLER else "full"
