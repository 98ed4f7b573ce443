"""Offload what gradient checkpointing keeps to host memory, between a layer's forward and its backward.

Checkpointing keeps each layer's input, from which the layer is calculated once more. Over all layers these are 1.4 GB
for 16,384 tokens of Qwen2.5-1.5B. Here each input goes to host memory while its layer is calculated, and comes back
during the backward of the next layer. The last layer's input stays: its backward comes first.

torch.autograd.graph.save_on_cpu offloads too, but waits for each copy, which a CUDA graph can't record.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lab.outcome import Unsupported, says_out_of_memory
from lora_lab.worker.engines.checkpointed_calls import CheckpointedCall
from lora_lab.worker.shards import set_call


@dataclass(slots=True)
class _Input:
    """A layer's input, on the card or in host memory."""

    shape: torch.Size
    dtype: torch.dtype
    copied: Any
    """Event: the copy in host memory is complete."""
    on_card: Tensor | None
    arrived: Any = None
    """Event: it is on the card again; None if there is nothing to wait for."""


class HostShelf:
    """Holds the layers' inputs in host memory, and the stream that copies them: for one forward and its backward at a
    time. Both may be recorded as a CUDA graph, if a step of that shape ran before."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self._of_device = torch.get_device_module(device)
        self._pinned = device.type == "cuda"
        self._aside = self._of_device.Stream()
        self._rooms = [torch.empty(0, dtype=torch.uint8) for _ in range(layers)]
        """Pinned buffers, each as large as its layer's largest input so far."""
        self._inputs: list[_Input | None] = [None] * layers
        self._recorded: list[Tensor] = []
        """Buffers that a CUDA graph copies to when it is replayed."""

    @property
    def host_bytes(self) -> int:
        """Host memory as asked for: torch rounds pinned memory up to powers of two."""
        return sum(room.numel() for room in self._rooms)

    def put(self, number: int, layer_input: Tensor) -> _Input:
        """Start an asynchronous copy of a layer's input to host memory. Its GPU copy is freed when the next layer's
        input arrives."""
        self._make_room(number, layer_input)
        if self._pinned and torch.cuda.is_current_stream_capturing():
            self._recorded.append(self._rooms[number])
        here = self._of_device.current_stream()
        self._aside.wait_stream(here)
        copied = self._of_device.Event()
        put = _Input(layer_input.shape, layer_input.dtype, copied, on_card=layer_input.detach())
        with self._of_device.stream(self._aside):
            self._room(number, put).copy_(layer_input.detach(), non_blocking=True)
            copied.record(self._aside)
        self._inputs[number] = put
        before = self._inputs[number - 1] if number else None
        if before is not None:  # the copy had a whole layer's time: no wait
            here.wait_event(before.copied)
            before.on_card = None
        return put

    def take(self, number: int, put: _Input) -> Tensor:
        """Return a layer's input on the card, for the backward, and start the copy of the layer before.

        Args:
            put: what `put` returned for it.

        Raises: RuntimeError after another forward.
        """
        if self._inputs[number] is not put:
            raise RuntimeError(
                "gradient_checkpointing=offloaded has room for one forward before its backward, and for one call of a "
                "layer in it. Use gradient_checkpointing=full."
            )
        here = self._of_device.current_stream()
        here.wait_event(put.copied)
        if put.on_card is None:
            self._bring(number, put)
        if put.arrived is not None:
            here.wait_event(put.arrived)
        found, put.on_card, put.arrived = put.on_card, None, None
        before = self._inputs[number - 1] if number else None
        if before is not None and before.on_card is None:
            self._bring(number - 1, before)
        assert found is not None
        return found

    def _bring(self, number: int, put: _Input) -> None:
        # allocated on this stream: earlier users of the memory are done when the copy begins
        put.on_card = torch.empty(put.shape, dtype=put.dtype, device=self._of_device.current_device())
        self._aside.wait_stream(self._of_device.current_stream())
        put.arrived = self._of_device.Event()
        with self._of_device.stream(self._aside):
            put.on_card.copy_(self._room(number, put), non_blocking=True)
            put.arrived.record(self._aside)

    def _room(self, number: int, put: _Input) -> Tensor:
        size = put.shape.numel() * put.dtype.itemsize
        return self._rooms[number][:size].view(put.dtype).view(put.shape)

    def _make_room(self, number: int, layer_input: Tensor) -> None:
        size = layer_input.numel() * layer_input.element_size()
        if self._rooms[number].numel() >= size:
            return
        try:
            self._rooms[number] = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError as error:
            if not says_out_of_memory(str(error)):
                raise
            # torch's message says that the card is full
            wanted = size * len(self._rooms) / 2**30
            raise Unsupported(
                f"gradient_checkpointing=offloaded needs at least {wanted:.2f} GiB of host memory that stays in place, "
                f"and this machine gave {self.host_bytes / 2**30:.2f} so far. Use gradient_checkpointing=full, or "
                "fewer tokens per batch."
            ) from error


class OffloadedCall(CheckpointedCall):
    """Calls a decoder layer checkpointed, with its input on the shelf."""

    def __init__(
        self, layer: Any, number: int, shelf: HostShelf | None, keeps_random_state: bool, within: bool
    ) -> None:
        """Take the layer's present call.

        Args:
            layer: a decoder layer.
            number: its place on the shelf.
            shelf: None for a layer whose input stays on the card.
            keeps_random_state, within: see `checkpoint_layers`.
        """
        super().__init__(layer, keeps_random_state, within)
        self._number = number
        self._shelf = shelf

    def _train(self, *args: Any, **kwargs: Any) -> Any:
        shelf, number = self._shelf, self._number
        if shelf is None:
            return super()._train(*args, **kwargs)
        if not (args and isinstance(args[0], Tensor)):
            raise Unsupported(
                f"gradient_checkpointing=offloaded: {type(self._layer).__name__} is not given its input first. "
                "Use gradient_checkpointing=full."
            )
        place, shape = args[0].data_ptr(), args[0].shape  # the hooks must not keep the tensor itself

        def pack(saved: Tensor) -> Any:
            is_input = saved.data_ptr() == place and saved.shape == shape
            return shelf.put(number, saved) if is_input else saved

        def unpack(packed: Any) -> Tensor:
            return shelf.take(number, packed) if isinstance(packed, _Input) else packed

        # checkpoint has hooks of its own inside: these see what it keeps, and nothing of the layer; and what compiled
        # code keeps
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return super()._train(*args, **kwargs)


def offload_checkpoints(layers: list[Any], device: torch.device, keeps_random_state: bool, within: bool) -> None:
    """Make decoder layers checkpoint with offloaded inputs in training.

    Args:
        layers: in the order in which they run; already compiled, if at all.
        keeps_random_state, within: see `checkpoint_layers`.

    Raises: Unsupported where there are no layers.
    """
    if not layers:
        raise Unsupported(
            "gradient_checkpointing=offloaded: this model has no layers of the kind that transformers repeats. "
            "Use gradient_checkpointing=none."
        )
    # the layers before the first trained one have no backward: nothing would wait for the copy of an input back to one
    # of them, and a CUDA graph can't end while a copy is under way
    first = next((number for number, layer in enumerate(layers) if _is_trained(layer)), len(layers) - 1)
    last = len(layers) - 1
    shelf = HostShelf(last - first, device)
    for number, layer in enumerate(layers):
        kept = shelf if first <= number < last else None
        set_call(layer, OffloadedCall(layer, number - first, kept, keeps_random_state, within))


def _is_trained(layer: Any) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())
