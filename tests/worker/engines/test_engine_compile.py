"""engine=compile in whole trials on the CPU: it trains as engine=eager does, and compiles nothing while it trains."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import compiles, lab_in

from lora_lab.events import Compiled, Ended, EngineDone, Evaluated, Event, Ran, Step, Warned, decode

pytestmark = compiles

COMMON = [
    "model=tiny",
    "share_device=true",
    "seq_len=128",
    "measure.warmup_steps=1",
    "measure.steps=7",
    "measure.eval_rows=12",
    "model.architecture.hidden_size=64",
    "model.architecture.intermediate_size=96",
    "learning_rate=2e-3",
]
CASES: dict[str, list[str]] = {
    "qlora": ["precision=bf16", "gradient_checkpointing=full", "grad_accum_steps=2"],
    "selective": ["method=lora", "precision=fp32", "gradient_checkpointing=selective", "data.batching=packed"],
    "lora_fa": ["method=qlora", "method.freeze_a=true", "precision=bf16"],
    "tiles": ["precision=bf16", "gradient_checkpointing=selective", "engine.mlp_tile=64", "batch_size=3"],
}
SHAPES = {name: [[3 if name == "tiles" else 2, 128]] for name in CASES}
BY_NIGHT = ("selective", "lora_fa", "tiles")
APART = 2e-2
"""Nats a token that a step's loss may differ by."""

Said = dict[str, list[list[Event]]]


NAMES = [pytest.param(name, marks=pytest.mark.nightly) for name in ["qlora", *BY_NIGHT]]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Said:
    """What eager and compile said in each case."""
    found: Said = {}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    for name in ["qlora", *BY_NIGHT]:
        home = tmp_path_factory.mktemp(name)
        trials = [[*COMMON, *CASES[name], f"engine={kind}"] for kind in ("eager", "compile")]
        said = lab_in(home, "engine_trials")(str(home), json.dumps(trials), PYTHONPATH=path)
        assert said.code == 0, said.text[-4000:]
        files = [home / f"{number}.jsonl" for number in (0, 1)]
        found[name] = [[decode(line) for line in file.read_text().splitlines()] for file in files]
    return found


def of(events: list[Event], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


@pytest.mark.parametrize("name", NAMES)
def test_it_finishes_and_trains_as_eager_does(said: Said, name: str) -> None:
    for events in said[name]:
        [end] = of(events, Ended)
        assert end.outcome == "finished", end.traceback
    eager, compiled = said[name]
    losses = [[step.loss for step in of(events, Step)] for events in (eager, compiled)]
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], abs=APART)
    held = [[evaluated.loss for evaluated in of(events, Evaluated)] for events in (eager, compiled)]
    assert len(held[0]) == 2
    assert held[1] == pytest.approx(held[0], abs=1e-2)
    assert held[0][1] < held[0][0] - 0.03, "enough was learned for a wrong gradient to show"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_compiled_while_it_trains(said: Said, name: str) -> None:
    eager, compiled = said[name]
    [done] = of(compiled, EngineDone)
    assert (done.compilations, done.unrecorded, done.replays) == (0, 0, 0)
    [made] = of(compiled, Compiled)
    assert (made.shapes, made.graphs) == (SHAPES[name], False)
    assert not of(eager, EngineDone)
    assert not of(eager, Compiled)
    late = [warned.text for warned in of(compiled, Warned) if "compiled" in warned.text or "recorded" in warned.text]
    assert late == []


@pytest.mark.parametrize("name", NAMES)
def test_what_ran_is_read_back(said: Said, name: str) -> None:
    eager, compiled = (of(events, Ran)[0].facts for events in said[name])
    assert eager.pop("attention_masks") == "as needed"
    assert compiled.pop("attention_masks") == ("always" if name == "selective" else "never")
    assert [facts.pop("engine") for facts in (eager, compiled)] == ["eager", "compile"]
    assert [facts.pop("chunked_loss") for facts in (eager, compiled)] == ["False", "True"]
    kernels = [facts.pop("attention_kernel") for facts in (eager, compiled)]
    assert kernels == ["flash_cpu", "flash_cpu"]
    assert compiled == eager


@pytest.mark.parametrize("name", NAMES)
def test_the_same_tokens_are_counted_but_for_padding(said: Said, name: str) -> None:
    eager, compiled = ([(s.rows, s.real, s.trained) for s in of(events, Step)] for events in said[name])
    assert compiled == eager
