"""The stored trials that the forecast's constants are fitted on and judged by: python -m benchmarks.forecast_fit."""

import gzip
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from lora_lab.config import EngineConfig, ModelConfig, TrialConfig
from lora_lab.data_config import DataConfig
from lora_lab.method_config import MethodConfig, OptimizerConfig, PrecisionConfig
from lora_lab.options import Batching, Checkpointing, DataSource, DType, EngineKind, Quantization, Weights
from lora_lab.work import MicroBatch, ModelFacts
from lora_lab.worker.models import load_architecture
from lora_lab.worker.workload import model_facts

_RESULTS = Path(__file__).parent / "results"
_SHIPPED = Path(__file__).parents[1] / "lora_lab" / "shipped" / "h100.jsonl.gz"
_FILES = (
    "h100/engines.jsonl.gz",
    "h100/factorial.jsonl.gz",
    "h200/auto_gpu_bound.jsonl.gz",
    "h200/auto_host_bound.jsonl.gz",
)
_CELLS = ("h100/one_factor.json", "h100/smollm2.json", "h100/raise_to_fp32.json")
"""Files of named records. The jobs of h200/ are left out: they ran at the same time on one card."""
_OF_ONE_TRIAL = ("seed", "repeat", "resume", "measure.", "timeout_minutes")
"""Settings in which trials of one configuration may differ."""

_ON_CARDS = (*(_RESULTS / name for name in _FILES), _SHIPPED)
_PEERS = (
    "h100/peers_qlora",
    "h100/peers_qlora_3553787",
    "h100/peers_lora",
    "h200/peers_qlora_llama3_1_8b",
    "h200/peers_qlora_qwen2_5_1_5b",
    "h200/peers_qlora_qwen2_5_1_5b_two_rounds",
)
_STACKS = {"plain": "eager", "plain_tutorial": "eager", "liger": "liger", "graph": "graph", "graph_offload": "graph"}
"""Contenders of benchmarks/peers and the engine that each is like."""

MEMORY_BYTES_PER_SECOND = {"H100": 3.35e12, "H200": 4.8e12, "CPU": 22e9}
"""As published by NVIDIA (data sheets of the H100 SXM and the H200 SXM); of the CPU as measured."""
ATTAINED = 0.9
"""Assumed: the share of that which a copy attains. It was not measured on the stored trials' cards."""
BOARD_WATTS = 700.0
"""The limit of both cards, as published."""


HALF_BUSY = 0.75
"""Above this share of busy time the card takes longer than the host."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What was measured of one configuration in one session."""

    session: str
    card: str
    model: str
    config: TrialConfig
    facts: ModelFacts
    batch: MicroBatch
    """The mean step's, in one micro-batch."""
    matmul: float
    step_seconds: float
    busy_seconds: float | None
    watts: float | None
    repeats: int


def cells() -> list[Cell]:
    """Return every stored cell."""
    return [*_of_trials(), *_of_named(), *_of_peers()]


def repeated_steps() -> list[tuple[str, str, list[float]]]:
    """Return all repeats of a configuration on a card in a session: what they share, whether host or card takes longer,
    and the seconds of a step in the order in which they ran."""
    found = []
    for key, records in _grouped(_ON_CARDS).items():
        ordered = sorted(records, key=lambda record: record["started_ms"])
        by_card: dict[str, list[dict[str, Any]]] = {}
        for record in ordered:
            by_card.setdefault(record["tags"].get("device.uuid", ""), []).append(record)
        for some in by_card.values():
            if len(some) > 1:
                busy = some[0]["metrics"].get("throughput/gpu_busy_share", 0.0)
                steps = [1 / record["metrics"]["throughput/steps_per_second"] for record in some]
                found.append((key, "card" if busy > HALF_BUSY else "host", steps))
    return found


def cpu_cells() -> list[Cell]:
    """Return the stored cells of a CPU: the step that took least for its slots, of all trials of a configuration.

    Other processes ran on those two cores meanwhile and made most steps many times longer. Trials in which no step was
    spared are not stored."""
    groups = _grouped([_RESULTS / "cpu" / "forecast.jsonl.gz"]).values()
    return [_fastest(_cell(records), [s for record in records for s in record["steps"]]) for records in groups]


def _fastest(cell: Cell, steps: list[tuple[int, float]]) -> Cell:
    slots, seconds = min(steps, key=lambda step: step[1] / step[0])
    width = slots // cell.config.batch_size
    batch = MicroBatch(cell.config.batch_size, width, slots, slots, cell.config.batch_size * width**2)
    return replace(cell, batch=batch, step_seconds=seconds)


def _of_trials() -> Iterator[Cell]:
    for records in _grouped(_ON_CARDS).values():
        yield _cell(records)


def _grouped(files: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Return the records of each configuration in each session."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for line in gzip.decompress(file.read_bytes()).splitlines():
            record = json.loads(line)
            if not record["is_sweep"] and record["outcome"] == "finished":
                settings = {k: v for k, v in record["params"].items() if not k.startswith(_OF_ONE_TRIAL)}
                key = json.dumps([record["parent"], settings], sort_keys=True)
                found.setdefault(key, []).append(record | {"file": file.name})
    return found


def _of_named() -> Iterator[Cell]:
    for name in _CELLS:
        for _, record in json.loads((_RESULTS / name).read_text())["cells"]:
            if record["outcome"] == "finished" and "throughput/steps_per_second" in record["metrics"]:
                yield _cell([record | {"file": name}])


def _cell(records: list[dict[str, Any]]) -> Cell:
    params, tags = records[0]["params"], records[0]["tags"]

    def mean(name: str) -> float | None:
        values = [record["metrics"][name] for record in records if name in record["metrics"]]
        return statistics.fmean(values) if values else None

    per_second = mean("throughput/steps_per_second") or 0.0
    slots = (mean("throughput/slots_per_second") or 0.0) / per_second
    rows = int(params["batch_size"])
    width = round(slots / rows)
    config = TrialConfig(
        optimizer=OptimizerConfig(optim=params["optimizer.optim"]),
        precision=PrecisionConfig(dtype=DType[params["precision.dtype"]]),
        engine=EngineConfig(
            kind=EngineKind(params.get("engine.kind", "eager")),
            chunked_loss=params.get("engine.chunked_loss") == "True",
        ),
        method=MethodConfig(
            quantization=Quantization(params["method.quantization"]),
            rank=int(params["method.rank"]),
            raise_to_fp32=params.get("method.raise_to_fp32") == "True",
        ),
        model=ModelConfig(weights=Weights.random),
        data=DataConfig(
            source=DataSource(params["data.source"]), batching=Batching(params.get("data.batching", "longest"))
        ),
        batch_size=rows,
        seq_len=int(params["seq_len"]),
        gradient_checkpointing=Checkpointing(
            {"True": "full", "False": "none"}.get(params["gradient_checkpointing"], params["gradient_checkpointing"])
        ),
    )
    shapes = {k.removeprefix("model.architecture."): v for k, v in params.items() if k.startswith("model.arch")}
    name = params["model.id"] or "?"
    rate = mean("flops/matmul_tflop_per_second")
    return Cell(
        session=f"{records[0]['file']} {tags.get('device.uuid', '')[:12]} {params['precision.dtype']}",
        card=_card(tags.get("ran.device") or tags["device"]),
        model=name,
        config=config,
        facts=_facts(json.dumps(shapes, sort_keys=True), config.method.rank),
        batch=MicroBatch(rows, width, rows * width, rows * width, rows * width**2),
        matmul=(rate or 790.0) * 1e12,
        step_seconds=1 / per_second,
        busy_seconds=mean("throughput/gpu_busy_seconds_per_step"),
        watts=mean("energy/mean_power_watts"),
        repeats=len(records),
    )


def _card(name: str) -> str:
    return next((card for card in ("H200", "H100") if card in name), "CPU")


@cache
def _facts(shapes: str, rank: int) -> ModelFacts:
    fields: dict[str, Any] = {}
    for key, value in json.loads(shapes).items():
        place = fields
        *above, last = key.split(".")
        for part in above:
            place = place.setdefault(part, {})
        place[last] = _value(value)
    config = TrialConfig(model=ModelConfig(weights=Weights.random, architecture=fields), method=MethodConfig(rank=rank))
    return model_facts(config, load_architecture(config.model))


def _value(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


QWEN = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": False,
}  # fmt: skip


def _of_peers() -> Iterator[Cell]:
    for name in _PEERS:
        stored = json.loads((_RESULTS / f"{name}.json").read_text())
        for cell, contenders in stored["cells"].items():
            if cell.endswith("p"):  # packed by each stack's own rule
                continue
            rows, width = map(int, cell.rstrip("c").split("x"))
            for stack, measured in contenders.items():
                turns = [turn for turn in measured.get("turns", []) if turn.get("outcome") == "finished"]
                if stack in _STACKS and turns:
                    yield _peer(name, stored, cell, rows, width, stack, turns)


def _peer(
    name: str, stored: dict[str, Any], cell: str, rows: int, width: int, stack: str, turns: list[dict[str, Any]]
) -> Cell:
    kind = EngineKind(_STACKS[stack])
    mode = "offloaded" if stack.endswith("offload") else "full" if cell.endswith("c") else "none"
    llama = stored.get("model") == "llama3_1_8b"
    config = TrialConfig(
        optimizer=OptimizerConfig(optim="adamw_torch_fused"),
        engine=EngineConfig(kind=kind, chunked_loss=kind is not EngineKind.eager),
        method=MethodConfig(
            quantization=Quantization.nf4 if stored["method"] == "qlora" else Quantization.none,
            raise_to_fp32=stack == "plain_tutorial" or (stack == "plain" and "format" not in stored),
        ),
        model=ModelConfig(weights=Weights.random),
        data=DataConfig(source=DataSource.random_tokens),
        batch_size=rows,
        seq_len=width,
        gradient_checkpointing=Checkpointing(mode),
    )
    step = statistics.median(turn["step_seconds_median"] for turn in turns)
    joules = [turn["joules_per_token"] for turn in turns if turn.get("joules_per_token")]
    return Cell(
        session=f"{name} {'eager' if kind is not EngineKind.graph else 'graph'}",
        card="H200" if "h200" in name else "H100",
        model="meta-llama/Llama-3.1-8B-Instruct" if llama else "Qwen/Qwen2.5-1.5B-Instruct",
        config=config,
        facts=_facts(json.dumps(LLAMA if llama else QWEN), 16),
        batch=MicroBatch(rows, width, rows * width, rows * width, rows * width**2),
        matmul=790e12,
        step_seconds=step,
        busy_seconds=None,
        watts=statistics.median(joules) * rows * width / step if joules else None,
        repeats=len(turns),
    )
