"""Layers' 4-bit weights in host memory: the same training in less of the card's memory. What needs a card is marked
`gpu`."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lab_in
from elsewhere import Elsewhere
from engine_models import loss_and_gradients
from odd_models import maker, trial
from torch import Tensor

from lora_lab.config import EngineConfig, InvalidInput, TrialConfig
from lora_lab.options import Quantization
from lora_lab.outcome import Unsupported
from lora_lab.worker.host_layers import hosting, move_layers
from lora_lab.worker.models import check_model, load_architecture, load_model
from lora_lab.worker.readback import compare, expected

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning"),
]
CPU = torch.device("cpu")
_TOKENS = torch.arange(48).remainder(29).reshape(2, 24)
BATCH = {"input_ids": _TOKENS, "labels": _TOKENS, "attention_mask": torch.ones_like(_TOKENS)}


def qlora(name: str, folder: Path, asked: int | str = 0) -> TrialConfig:
    config = trial(name, folder)
    method = replace(config.method, quantization=Quantization.nf4)
    return replace(config, method=method, engine=EngineConfig(host_layers=asked))


def loaded(config: TrialConfig) -> Any:
    torch.manual_seed(0)
    return load_model(config, load_architecture(config.model), CPU)


def packed(model: Any) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if hasattr(weight, "quant_state")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return maker(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3"])
@pytest.mark.parametrize("asked", [1, "all"])
def test_weights_move_while_they_are_loaded_and_train_as_before(
    made: Callable[[str], Path], name: str, asked: int | str
) -> None:
    config, elsewhere = qlora(name, made(name), asked), Elsewhere()
    plain = loaded(config)
    with hosting(asked, elsewhere):
        moved = loaded(config)
    addresses = {copy.data_ptr() for copy in elsewhere.copies}
    there = {name for name, weight in packed(moved).items() if weight.data_ptr() in addresses}
    of_text = {name for name in packed(plain) if "vision" not in name}
    assert there == {name for name in of_text if asked == "all" or ".layers.0." in name}
    assert len(elsewhere.copies) == len(there)
    (loss, gradients), (other, others) = (loss_and_gradients(model, BATCH) for model in (plain, moved))
    assert loss == other
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_nothing_moves_after_loading_or_where_nothing_is_asked(made: Callable[[str], Path]) -> None:
    elsewhere = Elsewhere()
    with hosting("all", elsewhere):
        pass
    with hosting(0, elsewhere):
        loaded(qlora("llama", made("llama")))
    loaded(qlora("llama", made("llama")))
    assert elsewhere.copies == []


def test_weights_of_a_checkpoint_in_4_bit_move_after_loading(made: Callable[[str], Path]) -> None:
    model, elsewhere = loaded(qlora("llama", made("llama"))), Elsewhere()
    move_layers(model, 1, elsewhere)
    assert len(elsewhere.copies) == sum(".layers.0." in name for name in packed(model))


def test_a_host_without_room_is_said_with_what_to_type(made: Callable[[str], Path]) -> None:
    def refuse(_: Tensor) -> Tensor:
        raise MemoryError("out of memory")

    words = r"(?s)engine.host_layers=all: .*out of memory.*engine.host_layers=0"
    with pytest.raises(Unsupported, match=words), hosting("all", refuse):
        loaded(qlora("llama", made("llama"), "all"))
    with pytest.raises(Unsupported, match=words):
        move_layers(loaded(qlora("llama", made("llama"))), "all", refuse)


@pytest.mark.parametrize(("name", "asked"), [("mixtral", 1), ("llama", 99)])
def test_models_whose_layers_cannot_move_are_refused(made: Callable[[str], Path], name: str, asked: int) -> None:
    config = qlora(name, made(name), asked)
    with pytest.raises(InvalidInput, match=f"engine.host_layers={asked}"):
        check_model(config, load_architecture(config.model))


@pytest.mark.parametrize(
    ("asked", "there", "is_as_asked"),
    [(0, "0 of 4", True), (2, "2 of 4", True), ("all", "4 of 4", True), ("all", "3 of 4", False), (2, "4 of 4", False)],
)
def test_what_ran_on_a_card_is_compared_with_what_was_asked(asked: int | str, there: str, is_as_asked: bool) -> None:
    config = TrialConfig(engine=EngineConfig(host_layers=asked))
    dtypes = {"weight_dtypes": "bfloat16 1", "adapter_dtypes": "float32 1"}
    facts = expected(config, torch.device("cuda")) | dtypes | {"host_layers": there}
    differences, _ = compare(facts, config, torch.device("cuda"))
    assert any("host_layers" in each for each in differences) is not is_as_asked


# On a card

LAYERS = (
    *("model=tiny", "model.architecture.hidden_size=1024", "model.architecture.intermediate_size=4096"),
    *("model.architecture.num_hidden_layers=4", "method=qlora", "measure=quick", "measure.idle_seconds=0"),
    *("seq_len=64", "batch_size=1", "tracking=none", "cooldown_celsius=95", "share_device=true"),
)
WEIGHTS_OF_A_LAYER = 2 * 1024 * 1024 + 2 * 1024 * 512 + 3 * 1024 * 4096


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "liger", "compile", "graph"])
def test_a_trial_has_the_same_losses_in_less_memory(tmp_path: Path, engine: str) -> None:
    records, losses = [], []
    for asked in ("0", "3", "all"):
        (tmp_path / asked).mkdir()
        said = lab_in(tmp_path / asked, real=True)(*LAYERS, f"engine={engine}", f"engine.host_layers={asked}")
        assert said.code == 0, said.text
        [place] = (tmp_path / asked).glob("multirun/*/*/record.json")
        records.append(json.loads(place.read_text()))
        events = map(json.loads, (place.parent / "events.jsonl").read_text().splitlines())
        losses.append([event["loss"] for event in events if event["event"] == "Step"])
    assert [record["tags"]["ran.host_layers"] for record in records] == ["0 of 4", "3 of 4", "4 of 4"]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert losses[0] == pytest.approx(losses[2], abs=2e-3)
    peaks = [record["metrics"]["vram/peak_allocated_gib"] for record in records]
    for layers, peak in zip((3, 4), peaks[1:], strict=True):
        assert peaks[0] - peak == pytest.approx(layers * WEIGHTS_OF_A_LAYER / 2 / 2**30, rel=0.15)
