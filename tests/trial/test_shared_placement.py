"""Which cards share a trial, and what of placement=ddp is refused before anything runs."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import FAKES, Lab, lab_in, records_in, with_fakes

from lora_lab.config import InvalidInput, ModelConfig, TrialConfig
from lora_lab.fit.estimate import estimate
from lora_lab.fit.shapes import Shapes, shapes_of
from lora_lab.options import ModelSource, PlacementKind, Weights
from lora_lab.places_config import PlacementConfig
from lora_lab.seat import Attendance, Seat, seats
from lora_lab.telemetry import nvml
from lora_lab.trial.data_parallel import check_same_number, placement_of, settled
from lora_lab.trial.worker_process import _own_card

TINY = ("model=tiny", "data=random_tokens", "measure=quick", "placement=ddp")


def asked(**more: object) -> TrialConfig:
    return TrialConfig(placement=PlacementConfig(kind=PlacementKind.ddp, **more))  # type: ignore[arg-type]


@pytest.fixture
def three_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process sees three fake cards."""
    spec = importlib.util.spec_from_file_location("fake_pynvml", FAKES / "pynvml.py")
    assert spec is not None
    assert spec.loader is not None
    fake = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fake_pynvml", fake)  # dataclass looks its module up there
    spec.loader.exec_module(fake)
    monkeypatch.setattr(fake, "nvmlDeviceGetName", lambda _: "Fake Card")
    monkeypatch.setattr(nvml, "pynvml", fake)
    monkeypatch.setenv("FAKE_NVML_CARDS", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("three_cards")
@pytest.mark.parametrize(("gpus", "visible", "cards"), [(2, None, [0, 1]), (None, None, [0, 1, 2]), (2, "2,0", [2, 0])])
def test_the_first_cards_are_used_or_all(
    monkeypatch: pytest.MonkeyPatch, gpus: int | None, visible: str | None, cards: list[int]
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config = asked(gpus=gpus)
    placement = placement_of(config)
    assert [card.index for card in placement.cards] == cards
    assert placement.world_size == settled(config, placement).placement.world_size == len(cards)


@pytest.mark.usefixtures("three_cards")
@pytest.mark.parametrize(
    ("config", "visible", "words"),
    [
        (asked(gpus=4), None, "placement.gpus=3"),
        (asked(gpus=2), "1", "Use placement=one"),
        (asked(), "1", "Use placement=one"),
        (asked(gpus=2), "", "no NVIDIA card"),
        (asked(), "", "placement.workers=2"),
        (asked(workers=2), None, "placement.gpus"),
    ],
)
def test_cards_that_are_not_there_are_refused_with_what_to_type(
    monkeypatch: pytest.MonkeyPatch, config: TrialConfig, visible: str | None, words: str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(InvalidInput, match=words):
        placement_of(config)


@pytest.mark.usefixtures("three_cards")
def test_cards_of_different_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml.pynvml, "nvmlDeviceGetName", lambda handle: f"Fake Card {handle.index}")
    with pytest.raises(InvalidInput, match="different kinds"):
        placement_of(asked(gpus=2))


@pytest.mark.usefixtures("three_cards")
def test_a_job_goes_on_with_as_many_workers_as_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    check_same_number(placement_of(asked()), {"world_size": "3"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    with pytest.raises(InvalidInput, match="3 cards"):
        check_same_number(placement_of(asked()), {"world_size": "3"})
    check_same_number(placement_of(TrialConfig()), {})


def test_on_the_cpu_the_workers_are_counted() -> None:
    config = replace(asked(workers=3), device="cpu")
    assert settled(config, placement_of(config)).rows_per_step == 3 * config.batch_size * config.grad_accum_steps


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["placement.workers=1", "device=cpu"], "Use placement=one"),
        (["placement.gpus=1"], "Use placement=one"),
        (["placement.gpus=2", "placement.workers=2"], "both set"),
        (["placement.gpus=2", "device=gpu:0"], "CUDA_VISIBLE_DEVICES"),
        (["placement.gpus=2", "device=cpu"], "placement.workers=2"),
        (["placement.workers=2", "device=cpu", "isolation=inline"], "isolation=process"),
        (["device=cpu"], "placement.workers=2"),
        (["placement.workers=2", "device=cpu", "data.rows=10", "batch_size=8"], "workers"),
    ],
)
def test_what_cannot_be_shared_is_refused_and_nothing_is_left(
    lab: Lab, tmp_path: Path, arguments: list[str], words: str
) -> None:
    said = lab(*TINY, *arguments)
    assert (said.code, "Refused" in said.err, words in said.err) == (2, True, True), said.text
    assert "Traceback" not in said.text
    assert records_in(tmp_path) == []


def test_a_card_too_many_is_refused_by_the_command(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    said = lab(*TINY, "placement.gpus=3", PYTHONPATH=with_fakes(), FAKE_NVML_CARDS="2")
    assert (said.code, "placement.gpus=2" in said.err) == (2, True), said.text


def test_each_worker_sees_one_card_of_its_trial() -> None:
    shown = {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}
    assert [_own_card(shown, Seat(rank, 2)) for rank in (0, 1)] == [
        {"CUDA_VISIBLE_DEVICES": "GPU-a"},
        {"CUDA_VISIBLE_DEVICES": "GPU-b"},
    ]
    assert _own_card(shown, Seat()) == {}
    assert _own_card({"CUDA_VISIBLE_DEVICES": ""}, Seat(1, 2)) == {}


@pytest.fixture
def attendance() -> Iterator[Attendance]:
    with seats(2) as [first, _]:
        assert first.meeting is not None
        yield Attendance(first.meeting, 2)
    assert not first.meeting.exists()


def test_a_worker_is_absent_when_others_wait_and_its_promise_is_over(attendance: Attendance) -> None:
    assert attendance.absent() == [], "nobody has come"
    attendance.note(1, 1, seconds=-1.0)
    assert attendance.absent() == [], "the first promised nothing"
    attendance.note(0, 1, seconds=-1.0)
    assert attendance.absent() == [], "nobody waits"
    attendance.note(1, 2, seconds=60.0)
    assert attendance.absent() == [0]
    assert attendance.behind(2) == [0]
    attendance.note(0, 1)
    assert attendance.absent() == [], "it takes its promise back"
    attendance.note(0, 2, seconds=60.0)
    assert (attendance.absent(), attendance.behind(2)) == ([], [])


def test_a_worker_alone_meets_nobody() -> None:
    with seats(1) as places:
        assert places == [Seat()]


SHAPES: Shapes = shapes_of(
    ModelConfig(
        source=ModelSource.tiny,
        weights=Weights.random,
        architecture={
            **{"model_type": "llama", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024},
            **{"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8},
        },
    )
)


def test_a_card_needs_room_for_the_gradients_that_are_exchanged() -> None:
    alone, shared = estimate(TrialConfig(), SHAPES), estimate(asked(gpus=2), SHAPES)
    gradients = 4 * 16 * 4 * (4 * (512 + 512) + 3 * (512 + 1024))
    """Bytes x rank x layers x (inputs + outputs of each linear layer)."""
    assert shared.allocated - alone.allocated == gradients
    assert shared.errors.above > alone.errors.above


def test_no_time_is_forecast_for_several_cards(tmp_path: Path) -> None:
    said = lab_in(tmp_path, "lora_lab.forecast")(*TINY, "placement.workers=2", "device=cpu")
    assert (said.code, "placement=ddp" in said.err) == (2, True), said.text
