"""Say what rounding to bf16 costs an adapter's first updates: the losses of three steps on the CPU in fp32, unrounded,
with the sum of a layer's and its adapter's output rounded once (as engine=graph does), and with the layer's output
rounded before (as PEFT does under bf16).

    python -m benchmarks.adapter_rounding OUT

SmolLM2-135M's own weights, real text, AdamW. Writes OUT/adapter_rounding.json; takes six minutes on two cores.
"""

import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.compose import compose
from benchmarks.reports import provenance
from lora_lab.events import Event, Step
from lora_lab.files import write_json
from lora_lab.store.environment import environment

_TRIAL = [
    *("model=smollm2_135m", "data=maths", "data.batching=packed", "seq_len=128", "batch_size=2", "method=lora"),
    *("measure.warmup_steps=1", "measure.steps=2", "measure.eval_rows=0", "measure.profile_steps=0"),
    *("measure.idle_seconds=0", "measure.answers=0", "measure.general_rows=0", "tracking=none", "device=cpu"),
    *("precision=fp32", "optimizer=adamw", "learning_rate=1e-3"),
]
WAYS = ("fp32", "rounded once", "rounded twice")


def measure(way: str) -> list[float]:
    """Train for three steps; return their losses."""
    from lora_lab.worker.trial import run_trial

    if way != "fp32":
        _round(twice=way == "rounded twice")
    losses: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, Step) and event.loss is not None:
            losses.append(event.loss)

    with tempfile.TemporaryDirectory() as folder:
        run_trial(compose(_TRIAL), Path(folder), note)
    return losses


def _round(twice: bool) -> None:
    """Have PEFT's layers round their outputs to bf16. Gradients pass unrounded."""
    from peft.tuners.lora.layer import Linear

    def rounded(x: Any) -> Any:
        return x + (x.bfloat16().float() - x).detach()

    def forward(layer: Any, x: Any) -> Any:
        [name] = layer.active_adapters
        own = layer.base_layer(x)
        added = rounded(layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name])
        return rounded((rounded(own) if twice else own) + added)

    Linear.forward = forward


def main() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        losses = dict(zip(WAYS, pool.map(measure, WAYS), strict=True))
    origin = provenance(environment(), "python -m benchmarks.adapter_rounding OUT")
    write_json(Path(sys.argv[1]) / "adapter_rounding.json", {"origin": origin, "losses": losses})
    print(losses)


if __name__ == "__main__":
    main()
