"""Checkpoints in host memory: the same gradients, and only what is needed on the card. On a CPU the card is memory too;
what moves, and when, is the same code."""

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_models import adapted, loss_and_gradients, padded
from torch import Tensor

from lora_lab.config import TrialConfig
from lora_lab.options import Checkpointing, EngineKind
from lora_lab.outcome import Unsupported
from lora_lab.worker.attention import AttentionKernels
from lora_lab.worker.engines import offloaded_checkpoints
from lora_lab.worker.engines.compiled import checkpointing_of, compile_layers, decoder_layers, is_compiled
from lora_lab.worker.engines.engine import Engine
from lora_lab.worker.engines.offloaded_checkpoints import HostShelf, offload_checkpoints
from lora_lab.worker.phases import PhaseClock

CPU = torch.device("cpu")
BATCH = padded([64, 50], 64)


def offloaded(compiled: bool = False, **model: Any) -> Any:
    made = adapted(num_hidden_layers=4, **model)
    if compiled:
        compile_layers(made)
    offload_checkpoints(decoder_layers(made), CPU, keeps_random_state=True, within=compiled)
    return made


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
def test_loss_and_gradients_are_those_without(kind: str) -> None:
    made = offloaded(kind=kind)
    assert checkpointing_of(made) is Checkpointing.offloaded
    for seed, width in enumerate((64, 32, 96)):
        batch = padded([width, 20], width, seed=seed)
        loss, expected = loss_and_gradients(adapted(num_hidden_layers=4, kind=kind), batch)
        found, gradients = loss_and_gradients(made, batch)
        assert found == loss
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("traced")
def test_compiled_layers_are_still_compiled() -> None:
    made, plain = offloaded(compiled=True), adapted(num_hidden_layers=4)
    assert all(map(is_compiled, decoder_layers(made)))
    assert not any(map(is_compiled, decoder_layers(offloaded())))
    loss, expected = loss_and_gradients(plain, BATCH)
    found, gradients = loss_and_gradients(made, BATCH)
    assert found == pytest.approx(loss, rel=1e-5)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-3, atol=1e-5)


def test_dropout_drops_the_same_in_the_forward_and_when_it_is_done_again() -> None:
    made = offloaded(lora={"lora_dropout": 0.5})
    plain = adapted(num_hidden_layers=4, lora={"lora_dropout": 0.5})
    torch.manual_seed(1)
    loss, expected = loss_and_gradients(plain, BATCH)
    torch.manual_seed(1)
    found, gradients = loss_and_gradients(made, BATCH)
    assert found == loss
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_no_layers_input_but_the_last_ones_is_on_the_card_between_forward_and_backward() -> None:
    made = offloaded()
    given: list[Any] = []
    kept = HostShelf.put

    def watched(shelf: HostShelf, number: int, tensor: Tensor) -> Any:
        given.append(weakref.ref(tensor.untyped_storage()))
        return kept(shelf, number, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostShelf, "put", watched)
        loss = made(**BATCH).loss
    gc.collect()
    assert len(given) == 3, "of four layers"
    assert [storage() is not None for storage in given] == [False, False, True], "the last waits for the next to be put"
    loss.backward()
    gc.collect()
    assert not any(storage() for storage in given)


def test_layers_below_the_lowest_adapter_stay_as_with_full_checkpointing() -> None:
    """They have no backward: nothing would wait for what comes back for them."""
    lora = {"layers_to_transform": [1, 2, 3], "target_modules": ["q_proj", "down_proj"]}
    made, kept = offloaded(lora=lora), HostShelf.put
    loss, expected = loss_and_gradients(adapted(num_hidden_layers=4, lora=lora), BATCH)
    numbers: list[int] = []

    def counted(shelf: HostShelf, number: int, tensor: Tensor) -> Any:
        numbers.append(number)
        return kept(shelf, number, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostShelf, "put", counted)
        found, gradients = loss_and_gradients(made, BATCH)
    assert numbers == [0, 1], "of the layers 1 and 2"
    assert found == loss
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_evaluation_keeps_nothing() -> None:
    made = offloaded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostShelf, "put", lambda *_: pytest.fail("nothing is trained"))
        with torch.no_grad():
            made(**BATCH)
        made.eval()
        made(**BATCH)


def test_a_second_forward_before_the_backward_is_no_wrong_gradient() -> None:
    made = offloaded()
    first = made(**BATCH).loss
    made(**padded([64, 64], 64, seed=3)).loss.backward()
    with pytest.raises(RuntimeError, match="one forward before its backward"):
        first.backward()


def test_host_memory_that_cannot_be_had_says_what_to_type_instead() -> None:
    made, plenty = offloaded(), torch.empty

    def full(*shape: Any, **how: Any) -> Tensor:
        if "pin_memory" in how:
            raise RuntimeError("CUDA error: out of memory")
        return plenty(*shape, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offloaded_checkpoints.torch, "empty", full)
        with pytest.raises(Unsupported, match=r"needs at least 0\.00 GiB of host memory.*gradient_checkpointing=full"):
            made(**BATCH)


def test_host_memory_is_that_of_the_longest_rows() -> None:
    shelf = HostShelf(2, CPU)
    for width in (8, 16, 4):
        tensor = torch.randn(2, width, 64)
        for number in (0, 1):
            put = shelf.put(number, tensor + number)
            assert torch.equal(shelf.take(number, put), tensor + number)
    assert shelf.host_bytes == 2 * 2 * 16 * 64 * 4


def test_the_engine_offloads_what_it_compiled_and_keeps_what_dropout_drew() -> None:
    config, made, plain = TrialConfig(), *(adapted(num_hidden_layers=4, attention_dropout=0.3) for _ in range(2))
    config.gradient_checkpointing = Checkpointing.offloaded
    Engine(config, made, [], AttentionKernels(), print, PhaseClock(print))
    torch.manual_seed(1)
    _, expected = loss_and_gradients(plain, BATCH)
    torch.manual_seed(1)
    _, gradients = loss_and_gradients(made, BATCH)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    config.engine.kind, made = EngineKind.compile, adapted(num_hidden_layers=4)
    Engine(config, made, [], AttentionKernels(), print, PhaseClock(print))
    assert checkpointing_of(made) is Checkpointing.offloaded
    assert all(map(is_compiled, decoder_layers(made)))


def test_a_layer_that_is_given_its_input_by_name_is_refused() -> None:
    made = offloaded()
    [first, *_] = decoder_layers(made)
    with pytest.raises(Unsupported, match="is not given its input first"):
        first(hidden_states=torch.zeros(1, 4, 64))
    with pytest.raises(Unsupported, match="no layers of the kind"):
        offload_checkpoints([], CPU, keeps_random_state=True, within=False)


class Clock:
    """A stream as CUDA has it: what is queued on it has seen what it saw, and what it was told to wait for."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def wait_stream(self, other: "Clock") -> None:
        self.seen |= other.seen

    def wait_event(self, event: "Clock") -> None:
        self.seen |= event.seen

    def record(self, stream: "Clock") -> None:
        self.seen = set(stream.seen)


class Clocks:
    """In the place of torch.cuda. Each copy counts as done for whoever waits for the stream it is queued on."""

    Stream = Event = Clock

    def __init__(self) -> None:
        self.main = self.now = Clock()

    def current_stream(self) -> Clock:
        return self.now

    def current_device(self) -> str:
        return "cpu"

    @contextlib.contextmanager
    def stream(self, stream: Clock) -> Iterator[None]:
        self.now = stream
        yield
        self.now = self.main


def test_everything_is_waited_for_that_another_stream_does(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks()
    monkeypatch.setattr(torch, "get_device_module", lambda _: clocks)
    shelf = HostShelf(4, CPU)
    begun: dict[str, set[str]] = {}
    room = shelf._room

    def watched(number: int, put: Any) -> Any:
        """Whoever asks for a layer's room is about to copy; every copy of a layer is told by a name of its own."""
        there = room(number, put)
        name = f"{'back' if f'out {number}' in begun else 'out'} {number}"
        assert name not in begun, "copied twice"
        begun[name] = set(clocks.now.seen)
        clocks.now.seen.add(name)
        assert clocks.now is not clocks.main, "the copies run beside"
        return there

    monkeypatch.setattr(shelf, "_room", watched)
    puts = []
    for number in range(4):
        clocks.main.seen.add(f"forward {number}")
        puts.append(shelf.put(number, torch.full((8,), float(number))))
        assert f"forward {number}" in begun[f"out {number}"], "what it copies has been calculated"
        if number:
            assert f"out {number - 1}" in clocks.main.seen, "the card's memory is another's from here on"
            assert puts[number - 1].on_card is None
    for number in reversed(range(4)):
        found = shelf.take(number, puts[number])
        assert torch.equal(found, torch.full((8,), float(number)))
        assert f"out {number}" in clocks.main.seen, "nothing is left behind that a recording would not join"
        if number < 3:
            assert f"back {number}" in clocks.main.seen
        if number:
            assert f"back {number - 1}" in begun, "the next is on its way"
            assert f"backward {number + 1}" in begun[f"back {number - 1}"] or number == 3
            assert f"back {number - 1}" not in clocks.main.seen, "nobody has waited for it yet"
        clocks.main.seen.add(f"backward {number}")
