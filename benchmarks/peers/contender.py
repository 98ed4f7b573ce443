"""The process of one contender: loads it once, then takes turns as the controller asks.

    python -m benchmarks.peers.contender DESCRIPTOR

DESCRIPTOR is an inherited pipe: a Setup comes first, then Turns; each is answered by a dict with an `outcome`.
"""

import importlib.metadata
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.peers.plan import Setup, Turn
from lora_lab.outcome import Outcome, end_of

_VERSIONS = (
    *("torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton", "liger-kernel"),
    *("unsloth", "unsloth_zoo", "trl", "xformers", "flash_attn"),
)


def main() -> None:
    pipe = Connection(int(sys.argv[1]))
    setup: Setup = pipe.recv()
    loaded: list[Callable[[Turn], dict[str, Any]]] = []
    pipe.send(answered(lambda: _load(setup, loaded)))
    while loaded:
        try:
            turn: Turn = pipe.recv()
        except EOFError:  # the controller has let go
            return
        pipe.send(answered(lambda turn=turn: loaded[0](turn)))  # type: ignore[misc]


def answered(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what the work found, or how it failed: every error is an answer."""
    try:
        return {"outcome": Outcome.finished.value, **work()}
    except Exception as error:
        end = end_of(error)
        # running out of memory is a result, and where it happened says little
        trace = "" if end.outcome is Outcome.out_of_memory else "".join(traceback.format_exception(error))
        # the frames of the error hold tensors; they must go before anything else is tried
        traceback.clear_frames(error.__traceback__)
        return {"outcome": end.outcome.value, "reason": end.reason, "traceback": trace[-6000:]}


def _load(setup: Setup, loaded: list[Callable[[Turn], dict[str, Any]]]) -> dict[str, Any]:
    begun = time.perf_counter()
    from benchmarks.peers.stacks import build

    device = _device()
    built = build(setup, device)  # first: a stack may have to be imported before torch's other users
    import torch
    from safetensors.torch import load_file

    from benchmarks.peers.material import ADAPTERS, rows_of
    from benchmarks.peers.turn import GIB, run_turn

    first = load_file(f"{setup.material}/{ADAPTERS}")
    vocabulary = int(built.model.config.get_text_config().vocab_size)

    def take(turn: Turn) -> dict[str, Any]:
        rows = rows_of(setup.cell, turn.compared * setup.cell.batch_size, vocabulary)
        return run_turn(built, turn, rows, setup.cell.batch_size, first)

    loaded.append(take)
    found: dict[str, Any] = {"facts": _facts(built), "versions": _versions()}
    if device == "cuda":
        torch.cuda.empty_cache()  # what loading left must not be missing in others' turns
        found["loaded_gib"] = torch.cuda.memory_reserved() / GIB
    return found | {"load_seconds": time.perf_counter() - begun}


def _facts(built: Any) -> dict[str, str]:
    """Return what was really built, read from the model."""
    model = built.model
    trained = {str(value.dtype) for value in model.parameters() if value.requires_grad}
    return {
        "attention": built.attention,
        "adapters": " and ".join(sorted(trained)),
        "embeddings": str(model.get_input_embeddings().weight.dtype),
        "head": str(model.get_output_embeddings().weight.dtype),
    }


def _device() -> str:
    """Return `cuda`, or `cpu` where the controller shows no card."""
    return "cpu" if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else "cuda"


def _versions() -> dict[str, str]:
    """Return the versions of what is imported here."""
    found = {}
    for name in _VERSIONS:
        if name.replace("-", "_") in sys.modules:
            found[name] = importlib.metadata.version(name)
    return found


if __name__ == "__main__":
    main()
