"""Report what compiling and recording a training step took, and whether training then ran as prepared."""

from collections.abc import Sequence

from lora_lab.events import Compiled, EngineDone, Event, PhaseBegan
from lora_lab.phase import Phase
from lora_lab.telemetry.figures import GIB, Summary

_MADE_READY = ("engine/compile_seconds", "engine/shapes")
_IN_TRAINING = ("engine/late_compilations",)
_OF_GRAPHS = ("engine/replayed_micro_batches", "engine/unrecorded_micro_batches")
_MEMORY = ("engine/graph_working_gib",)

_NOTHING = "nothing was compiled: that takes engine=compile or engine=graph, and a trial that gets so far"
_NOT_OVER = "the compilation was not completed"
_NO_GRAPH = "no CUDA graph was recorded: that takes engine=graph"
_NO_END = "training did not come to its end"


def add_engine(summary: Summary, events: Sequence[Event]) -> None:
    """Add seconds, counts and memory of engine=compile and engine=graph. Warn if a replayed step still had to wait;
    the summary must have the regime already."""
    compiled = next((event for event in events if isinstance(event, Compiled)), None)
    done = next((event for event in events if isinstance(event, EngineDone)), None)
    if compiled is None:
        began = any(isinstance(event, PhaseBegan) and event.phase == Phase.compilation.value for event in events)
        summary.without((*_MADE_READY, *_IN_TRAINING, *_OF_GRAPHS, *_MEMORY), _NOT_OVER if began else _NOTHING)
        return
    summary.metrics["engine/compile_seconds"] = compiled.seconds
    summary.metrics["engine/shapes"] = float(len(compiled.shapes))
    summary.add("engine/late_compilations", None if done is None else float(done.compilations), _NO_END)
    if not compiled.graphs:
        summary.without((*_OF_GRAPHS, *_MEMORY), _NO_GRAPH)
        return
    summary.metrics["engine/graph_working_gib"] = compiled.working_bytes / GIB
    summary.add("engine/replayed_micro_batches", None if done is None else float(done.replays), _NO_END)
    summary.add("engine/unrecorded_micro_batches", None if done is None else float(done.unrecorded), _NO_END)
    if summary.tags.get("regime", "GPU-bound") != "GPU-bound":
        busy = summary.metrics["throughput/gpu_busy_share"]
        summary.warnings.append(
            f"engine=graph, and yet the card worked for {100 * busy:.0f} % of the time only: it waited for the host. "
            "bitsandbytes' optimizers (paged, 8-bit) wait after each matrix, and under fp16 all but fused ones ask in "
            "each step whether anything overflowed; optimizer=adamw_fused does neither"
        )
