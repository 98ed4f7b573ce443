"""Share a model's frozen weights out between the workers of a group: placement=fsdp.

Each worker keeps one part of each decoder layer's bytes. The whole is gathered for the moment in which the layer is
calculated, in the forward and again in the backward, while the next layer's bytes are already under way. Frozen weights
have no gradients to reduce and no optimizer state, so nothing but the gathering is needed: the trained adapters stay
whole on each worker, and `SharedStep` exchanges them as in placement=ddp.

A weight stays the object that it was, with its class, shape and format: only its memory comes and goes. So 4-bit
weights keep what bitsandbytes needs to unpack them, a head may be the embeddings' own weight, layers may be compiled
whole, and whatever counts or reads back weights works as before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.options import PlacementKind, Quantization
from lora_lab.worker.experts import expert_weights
from lora_lab.worker.group import Group
from lora_lab.worker.mlps import text_layers
from lora_lab.worker.trainables.trainable import base_of
from lora_lab.worker.weight_counts import scales_of, stored_bytes

_ALIGNED = 256
"""Bytes. Kernels load several numbers at a time."""


class Shard:
    """Weights that are gathered together, of which this worker keeps a part."""

    def __init__(self, weights: Sequence[Tensor], group: Group, device: torch.device) -> None:
        """Take the memory of `weights`, which may lie elsewhere than on `device`. They have none until `gather`."""
        self._group = group
        starts, end = [], 0
        for weight in weights:
            starts.append(end)
            end += _rounded(weight.nbytes, _ALIGNED)
        self._bytes = _rounded(end, _ALIGNED * group.world_size)
        self._whole = torch.empty(self._bytes, dtype=torch.uint8, device=device)
        for weight, start in zip(weights, starts, strict=True):
            view = self._whole[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
            view.copy_(weight.detach())
            weight.data = view
        self.part = group.part_of(self._whole)
        """The bytes that this worker keeps."""
        self._under_way: Any = None
        self._is_here = True
        self.release()

    def start(self) -> None:
        """Begin to gather, unless it is done or under way."""
        if not self._is_here:
            self._whole.untyped_storage().resize_(self._bytes)
            self._under_way = self._group.start_gathering(self._whole, self.part)
            self._is_here = True

    def gather(self) -> None:
        """Have the whole weights here, for what is queued on the device from now on."""
        self.start()
        if self._under_way is not None:
            self._group.finish(self._under_way)
            self._under_way = None

    def release(self) -> None:
        """Give the memory of the whole back."""
        if self._is_here:
            self.gather()  # what is under way would write into memory that is gone
            self._whole.untyped_storage().resize_(0)
            self._is_here = False


class Shards:
    """All shards of a model, by the calls that need them, in the order in which a forward comes to these."""

    def __init__(self) -> None:
        self._calls: list[GatheringCall] = []
        self._here: list[Shard] = []
        self._backward_of: GatheringCall | None = None

    def add(self, module: Any, shard: Shard) -> None:
        """Gather a shard whenever the module is called, and for its backward."""
        call = GatheringCall(module, shard, self, len(self._calls))
        self._calls.append(call)
        module._compiled_call_impl = call

    @property
    def held_bytes(self) -> int:
        """Return the bytes of the parts that this worker keeps."""
        return sum(shard.part.untyped_storage().nbytes() for shard in {call.shard for call in self._calls})

    def come_to(self, call: "GatheringCall") -> None:
        """Have a call's shard whole, and begin to gather that of the next call."""
        self._have(call, self._calls[call.place + 1] if call.place + 1 < len(self._calls) else None)

    def come_back_to(self, call: "GatheringCall") -> None:
        """Begin the backward of a call: have its shard whole, and begin to gather that of the call before."""
        if self._backward_of is None:
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        self._backward_of = call
        before = self._calls[call.place - 1] if call.place else None
        self._have(call, before if before is not None and before.needs_weights_back else None)

    def is_backward_of(self, call: "GatheringCall") -> bool:
        """Return whether it is the backward of this call."""
        return self._backward_of is call

    def _have(self, call: "GatheringCall", following: "GatheringCall | None") -> None:
        wanted = [call.shard] if following is None else [call.shard, following.shard]
        call.shard.gather()
        for other in self._here:
            if other not in wanted:
                other.release()
        self._here = wanted
        wanted[-1].start()

    def _end_backward(self) -> None:
        self._backward_of = None
        for shard in self._here:
            shard.release()
        self._here = []


class GatheringCall:
    """Calls a module with its whole weights."""

    def __init__(self, module: Any, shard: Shard, shards: Shards, place: int) -> None:
        self.call: Callable[..., Any] = module._compiled_call_impl or module._call_impl
        """The module's own call, or that compiled."""
        self.shard = shard
        self.shards = shards
        self.place = place
        self.needs_weights_back = not isinstance(module, nn.Embedding)
        """Whether the backward reads the weights: that of a look-up does not."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        if self.shards.is_backward_of(self):  # calculated once more by checkpointing: the weights are here, and stay
            return self.call(*args, **kwargs)
        self.shards.come_to(self)
        output = self.call(*args, **kwargs)
        if self.needs_weights_back and torch.is_grad_enabled():
            first = next((each for each in _tensors(output) if each.requires_grad), None)
            if first is not None:
                first.register_hook(self._before_backward)
        self.shard.release()
        return output

    def _before_backward(self, _: Tensor) -> None:
        self.shards.come_back_to(self)


def call_of(module: Any) -> Callable[..., Any]:
    """Return a module's own call, or what stands for it: compiled, or checkpointed."""
    outermost = module._compiled_call_impl or module._call_impl
    return outermost.call if isinstance(outermost, GatheringCall) else outermost


def set_call(module: Any, call: Callable[..., Any]) -> None:
    """Let a module be called by this. Where its weights are gathered, they are before."""
    gathering = module._compiled_call_impl
    if isinstance(gathering, GatheringCall):
        gathering.call = call
    else:
        module._compiled_call_impl = call  # torch calls this instead of the class's own call, hooks included


def check_shards(config: TrialConfig, skeleton: Any) -> None:
    """Raise InvalidInput where the frozen weights are to be shared out, and the model's modules do not allow it."""
    if config.placement.kind is not PlacementKind.fsdp:
        return
    fault = ""
    if not text_layers(skeleton):
        fault = "it has no layers that transformers repeats"
    elif config.method.quantization is not Quantization.none and any(expert_weights(skeleton)):
        fault = "it is a mixture, whose experts go into 4 bit only once the whole model is on the card"
    if fault:
        raise InvalidInput(
            f"placement=fsdp cannot be used with {type(skeleton).__name__}: {fault}. Use placement=ddp or "
            "placement=one."
        )


def share_out(model: Any, group: Group, device: torch.device) -> None:
    """Leave this worker its part of the frozen weights on `device`; what is small or between the layers is there whole.
    The model may lie in host memory: no more than one layer is whole on the device.

    Args:
        model: without what is trained.
    """
    shards, causal = Shards(), base_of(model)
    whole = stored_bytes(model.parameters())
    layers = text_layers(model)
    within = {id(module) for layer in layers for module in layer.modules()}
    tables = [m for m in causal.modules() if isinstance(m, nn.Embedding | nn.Linear) and id(m) not in within]
    head = causal.get_output_embeddings()
    before = [module for module in tables if module is not head]
    made: dict[int, Shard] = {}  # a head may have the embeddings' own weight
    for module in [*before, *layers, *([] if head is None else [head])]:
        parameters = list(module.parameters()) if id(module) in within else [module.weight]
        new = [parameter for parameter in parameters if id(parameter) not in made]
        if new:
            shard = Shard([*new, *(scale for each in new for scale in scales_of(each))], group, device)
            made |= {id(parameter): shard for parameter in new}
        shards.add(module, made[id(parameters[0])])
    nn.Module.to(model, device)
    model.hf_device_map = {"": device}  # as where it had been loaded there
    if device.type == "cuda":
        torch.cuda.empty_cache()  # where the wholes were
    causal.shards, causal.whole_bytes = shards, whole


def shards_of(model: Any) -> Shards | None:
    """Return a model's shards; None for one that each worker has whole."""
    found: Shards | None = base_of(model).__dict__.get("shards")
    return found


def held_and_whole(model: Any) -> tuple[int, int]:
    """Count the bytes of frozen weights that this worker holds at this moment, and those of the whole model as it was
    loaded. Both count what 4-bit weights need to be unpacked."""
    shards = shards_of(model)
    assert shards is not None
    here = stored_bytes(parameter for _, parameter in model.named_parameters() if not parameter.requires_grad)
    return here + shards.held_bytes, base_of(model).whole_bytes


@contextmanager
def gathered(module: Any) -> Iterator[None]:
    """Have a module's whole weights within, for code that does not call the module."""
    call = module._compiled_call_impl
    if not isinstance(call, GatheringCall):
        yield
        return
    call.shards.come_to(call)
    yield
    call.shard.release()


def _tensors(output: Any) -> Iterator[Tensor]:
    for each in output if isinstance(output, tuple | list) else [output]:
        if isinstance(each, Tensor):
            yield each


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step
