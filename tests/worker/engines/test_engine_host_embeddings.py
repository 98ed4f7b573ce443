"""Embeddings in host memory: the same training in less of the card's memory. What needs a card is marked `gpu`."""

import ctypes
import functools
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lab_in
from elsewhere import Elsewhere
from engine_models import adapted, loss_and_gradients, padded
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_lab.config import AUTO, EngineConfig, TrialConfig
from lora_lab.outcome import Unsupported
from lora_lab.worker import host_memory
from lora_lab.worker.engines.chunked_loss import use_chunked_loss
from lora_lab.worker.engines.compiled import compile_layers
from lora_lab.worker.engines.graph_step import GraphStep, use_graph_step
from lora_lab.worker.engines.host_embeddings import move_embeddings, place_of_embeddings
from lora_lab.worker.host_memory import HostMemory, copy_to_host, is_in_host_memory
from lora_lab.worker.readback import expected
from lora_lab.worker.trainables.trainable import base_of

BATCH = padded([40, 64], 64)


class FakeDriver:
    """Gives memory of this process."""

    def __init__(self) -> None:
        self.given: dict[int, Any] = {}

    def allocate(self, size: int) -> int:
        memory = ctypes.create_string_buffer(size)
        self.given[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def free(self, address: int) -> None:
        del self.given[address]


def embeddings(model: Any) -> Any:
    return base_of(model).get_input_embeddings().weight


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"kind": "gemma3_text", "tie_word_embeddings": False},  # it scales what it looks up
        {"kind": "qwen3"},
        {"lora": {"target_modules": ["q_proj", "embed_tokens"]}},
        {"lora": {"target_modules": ["q_proj", "lm_head"]}},
    ],
    ids=["llama", "scaled", "qwen3", "adapted", "adapted head"],
)
def test_moved_embeddings_train_as_before(own: dict[str, Any]) -> None:
    plain, moved = adapted(**own), adapted(**own)
    elsewhere, parameter = Elsewhere(), embeddings(moved)
    move_embeddings(moved, True, elsewhere)
    assert embeddings(moved) is parameter
    assert embeddings(moved).data_ptr() == elsewhere.copies[0].data_ptr()
    assert moved.state_dict().keys() == plain.state_dict().keys()
    (loss, gradients), (other, others) = (loss_and_gradients(model, BATCH) for model in (plain, moved))
    assert loss == other
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_embeddings_that_are_the_head_stay_on_the_card() -> None:
    model, elsewhere = adapted(tie_word_embeddings=True), Elsewhere()
    move_embeddings(model, AUTO, elsewhere)
    with pytest.raises(Unsupported, match="tie_word_embeddings"):
        move_embeddings(model, True, elsewhere)
    assert elsewhere.copies == []


def test_embeddings_that_are_trained_stay_on_the_card() -> None:
    model, elsewhere = adapted(), Elsewhere()
    embeddings(model).requires_grad_(True)
    move_embeddings(model, AUTO, elsewhere)
    with pytest.raises(Unsupported, match="are trained"):
        move_embeddings(model, True, elsewhere)
    assert elsewhere.copies == []


def test_a_host_without_room_is_said_with_what_to_type() -> None:
    def refuse(_: Tensor) -> Tensor:
        raise MemoryError("out of memory")

    with pytest.raises(Unsupported, match=r"(?s)host_embeddings=auto needs .*out of memory.*host_embeddings=false"):
        move_embeddings(adapted(), AUTO, refuse)


def test_memory_holds_what_is_written_and_is_given_back_once() -> None:
    driver = FakeDriver()
    memory = HostMemory(48, driver)
    values = torch.arange(24, dtype=torch.bfloat16)
    memory.on_host().view(torch.bfloat16).copy_(values)
    described = memory.__cuda_array_interface__
    [address] = driver.given
    assert (described["data"][0], described["shape"]) == (address, (48,))
    assert ctypes.string_at(address, 48) == bytes(values.view(torch.uint8).tolist())
    del memory
    assert driver.given == {}


@pytest.mark.parametrize(("asked", "fact"), [(True, "host"), (False, "card"), (AUTO, None)])
def test_what_ran_on_a_card_is_compared_with_what_was_asked(asked: bool | str, fact: str | None) -> None:
    config = TrialConfig(engine=EngineConfig(host_embeddings=asked))
    assert expected(config, torch.device("cuda")).get("embeddings") == fact
    assert "embeddings" not in expected(config, torch.device("cpu"))


# On a card


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_copy_is_equal_takes_nothing_of_the_card_and_goes_with_its_last_view(dtype: torch.dtype) -> None:
    there = torch.randn(1000, 513, device="cuda").to(dtype)
    before = torch.cuda.memory_allocated()
    copy = copy_to_host(there)
    assert torch.cuda.memory_allocated() == before
    assert (copy.device, copy.dtype, copy.shape) == (there.device, there.dtype, there.shape)
    assert torch.equal(copy, there)
    assert (is_in_host_memory(copy), is_in_host_memory(there)) == (True, False)
    view, address = copy[3:], copy.data_ptr()
    del copy
    gc.collect()
    assert torch.equal(view, there[3:])
    del view
    gc.collect()
    assert not host_memory._cuda().is_host(address)


def prepared(engine: str, dtype: torch.dtype, is_moved: bool) -> tuple[Any, Any]:
    """A model on the card that trains by an engine, and its embeddings."""
    model = adapted().to("cuda")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if is_moved:
        move_embeddings(model, True)
    use_chunked_loss(model)
    if engine != "eager":
        compile_layers(model)
    return model, embeddings(model)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # torch.compile warns of much that is not ours
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("engine", ["eager", "compile", "graph"])
@sdpa_kernel(SDPBackend.MATH)  # others may add in no fixed order in their backward
def test_losses_and_gradients_are_those_of_embeddings_on_the_card(engine: str, dtype: torch.dtype) -> None:
    batch = {name: tensor.cuda() for name, tensor in BATCH.items()}
    found = []
    for is_moved in (False, True):
        torch._dynamo.reset()
        model, weight = prepared(engine, dtype, is_moved)
        assert place_of_embeddings(model) == ("host" if is_moved else "card")
        autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16, dtype is not torch.float32)
        if engine == "graph":
            step = GraphStep(model, functools.partial(autocast, cache_enabled=False))
            step.record(batch)
            use_graph_step(model, step)
        with autocast():
            found += [loss_and_gradients(model, batch)]
        assert embeddings(model) is weight
    (loss, gradients), (other, others) = found
    assert loss == other
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


UNTIED = ("model=tiny", "model.architecture.tie_word_embeddings=false", "model.architecture.vocab_size=100000")
TABLE_GIB = 2 * 100_000 * 256 / 2**30


@pytest.mark.gpu
def test_a_trial_has_the_same_losses_in_less_memory(tmp_path: Path) -> None:
    records, losses = [], []
    for asked in ("false", "auto"):
        (tmp_path / asked).mkdir()
        said = lab_in(tmp_path / asked, real=True)(
            *UNTIED,
            f"engine.host_embeddings={asked}",
            "engine=graph",
            "gradient_checkpointing=offloaded",
            "measure=quick",
            "measure.idle_seconds=0",
            "seq_len=64",
            "batch_size=1",
            "tracking=none",
            "cooldown_celsius=95",
            "share_device=true",
        )
        assert said.code == 0, said.text
        [place] = (tmp_path / asked).glob("multirun/*/*/record.json")
        records.append(json.loads(place.read_text()))
        events = map(json.loads, (place.parent / "events.jsonl").read_text().splitlines())
        losses.append([event["loss"] for event in events if event["event"] == "Step"])
    assert [record["tags"]["ran.embeddings"] for record in records] == ["card", "host"]
    assert losses[0] == losses[1]
    card, host = (record["metrics"]["vram/peak_allocated_gib"] for record in records)
    assert card - host == pytest.approx(TABLE_GIB, rel=0.1)


@pytest.mark.gpu
def test_a_job_is_saved_answers_and_is_merged(tmp_path: Path) -> None:
    lab = lab_in(tmp_path, real=True)
    said = lab(
        *UNTIED,
        "engine.host_embeddings=auto",
        "train.max_steps=4",
        "train.checkpoint_every=2",
        "train.eval_every=2",
        "measure.answers=2",
        "measure.eval_rows=8",
        "measure.idle_seconds=0",
        "seq_len=256",
        "tracking=none",
        "cooldown_celsius=95",
        "share_device=true",
    )
    assert said.code == 0, said.text
    [place] = tmp_path.glob("multirun/*/*/record.json")
    record = json.loads(place.read_text())
    assert record["tags"]["ran.embeddings"] == "host"
    assert "loss/eval" in record["metrics"]
    answered = lab_in(tmp_path, "lora_lab.generate", real=True)(str(place.parent), "Why?", "--max-new-tokens", "4")
    assert answered.code == 0, answered.text
    merged = lab_in(tmp_path, "lora_lab.export", real=True)(str(place.parent), "--merge", "merged")
    assert merged.code == 0, merged.text
