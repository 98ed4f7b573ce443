"""Several adapters on one frozen base, which train together.

Each micro-batch is repeated for every member, and goes through the base once: the first rows are the first member's.
Every adapter is one of PEFT's own, so that it is drawn, counted, optimised and saved as an adapter alone is. Only the
products are calculated together: a matrix product for all rows of the base, a batched one for all adapters of a layer.
A row never meets another member's adapter, so what goes wrong in one stays there.

On a CPU each member's product is calculated by itself, in the shape that it has alone. MKL's kernels depend on the
number of rows, and a batched product sums in another order: the last bits of gradients would differ from those of an
adapter alone, and with them every later loss.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lora_lab.config import TrialConfig
from lora_lab.outcome import Unsupported
from lora_lab.worker.data import IGNORED
from lora_lab.worker.engines.chunked_loss import chunk_loss, chunked_cross_entropy, is_in_chunks
from lora_lab.worker.trainables.lora import Lora
from lora_lab.worker.trainables.trainable import base_of, trained_parameters

_FIRST = "default"
"""PEFT's name for the adapter of a model that has one."""


class MembersLora(Lora):
    """Trains an adapter for each member."""

    def __init__(self, configs: Sequence[TrialConfig]) -> None:
        super().__init__(configs[0])
        self._each = [Lora(config) for config in configs]
        self.names = [_FIRST, *(f"member_{number}" for number in range(1, len(configs)))]

    def build(self, model: Any, unreached: Sequence[str]) -> Any:
        """Freeze the model and put fresh adapters into it. Each is drawn from the random numbers that it has alone.

        Raises: InvalidInput as Lora does; Unsupported where an adapter is not of a linear layer."""
        asked = [each.adapters(model, unreached) for each in self._each]
        start = _random_state(model.device)
        adapted = super().build(model, unreached)
        behind = _random_state(model.device)
        for each, name, config in zip(self._each[1:], self.names[1:], asked[1:], strict=True):
            _draw_from(start, model.device)
            adapted.add_adapter(name, config)
            each.name_base(config)
        _draw_from(behind, model.device)
        adapted.base_model.set_adapter(self.names)
        for layer in _adapted_layers(adapted):
            is_linear = isinstance(layer.get_base_layer(), torch.nn.Linear | Conv1D)
            if not is_linear or not set(self.names) <= set(layer.lora_A) or layer.lora_variant:
                raise Unsupported(
                    f"cotrain adapts linear layers, and {type(layer).__name__} is an adapter of another kind. Name "
                    "linear layers in method.target_modules, or leave cotrain out."
                )
        return adapted


class Members:
    """The members' adapters in a live model."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        self._model = model
        self._names = tuple(names)
        self._causal = base_of(model)
        self._layers = _adapted_layers(model)
        self._own = [type(layer) for layer in self._layers]
        self._forwards: list[tuple[Any, Any, Any]] = []
        """Modules with the forward that they have while all members train, and the one of their own that they had
        before; None where that was their class's."""
        self.losses = torch.zeros(len(self._names), device=model.device)
        """The loss of each member in the latest micro-batch, of shape (members,). A CUDA graph writes into it."""
        self.diverged: set[int] = set()
        """The members that train on no longer: their numbers."""
        self.parameters: list[list[Tensor]] = []
        """What each member trains, in the order of a model that has its adapter alone."""
        for number in range(len(self._names)):
            with self.only(number):
                self.parameters.append(trained_parameters(model))

    def __len__(self) -> int:
        return len(self._names)

    def join(self, apart: bool, compiles: bool = False) -> None:
        """Let the members train together from now on. An engine has changed the model before.

        Args:
            apart: calculate each member's products by themselves.
            compiles: whether chunks of the loss are compiled."""
        count, how = len(self), _Apart if apart else _InOne
        # classes, and not a function of each layer: torch compiles all layers at once where they are alike
        kinds = {kind: type(f"{how.__name__}{kind.__name__}", (how, kind), {}) for kind in set(self._own)}
        for layer in self._layers:
            scales = torch.tensor([layer.scaling[name] for name in self._names], device=self.losses.device)
            layer.members, layer.member_scales = self._names, scales.view(-1, 1, 1)
            layer.__class__ = kinds[type(layer)]
        if apart:
            within = {module for layer in self._layers for module in layer.modules()}
            plain = (m for m in self._causal.modules() if isinstance(m, torch.nn.Linear) and m not in within)
            for module in plain:
                self._give(module, functools.partial(_in_parts, module.forward, count))
        own = self._causal.forward
        if is_in_chunks(self._causal):
            loss: Callable[..., Any] = functools.partial(
                self._in_chunks, torch.compile(chunk_loss, dynamic=False) if compiles else chunk_loss
            )
        else:
            loss = functools.partial(self._of_logits, own)

        @functools.wraps(own)  # Trainer reads from the signature how the loss is divided
        def forward(*args: Any, labels: Tensor | None = None, **inputs: Any) -> Any:
            if args or labels is None:
                return own(*args, labels=labels, **inputs)
            return loss(labels, **{name: _repeated(value, count) for name, value in inputs.items()})

        self._give(self._causal, forward)

    def _give(self, module: Any, forward: Any) -> None:
        self._forwards.append((module, forward, module.__dict__.get("forward")))
        module.forward = forward

    def _of_logits(self, own: Callable[..., Any], labels: Tensor, **inputs: Any) -> Any:
        """Run the model's own forward, and its own loss function for each member's rows. Return its output, whose loss
        is the sum."""
        function, losses = self._causal.loss_function, list[Tensor]()

        def each(logits: Tensor, labels: Tensor, *args: Any, **more: Any) -> Tensor:
            parts = zip(logits.chunk(len(self)), labels.chunk(len(self)), strict=True)
            losses.extend(function(part, wanted, *args, **more) for part, wanted in parts)
            return torch.stack(losses).sum()

        before = self._causal.__dict__.get("_loss_function")
        self._causal.loss_function = each
        try:
            output = own(labels=_repeated(labels, len(self)), **inputs)
        finally:
            del self._causal._loss_function
            if before is not None:
                self._causal.loss_function = before
        if not losses:
            raise Unsupported(
                f"cotrain: {type(self._causal).__name__} calculates its loss by itself, so the members' losses cannot "
                "be kept apart. Leave cotrain out."
            )
        self.losses.copy_(torch.stack(losses).detach())
        return output

    def _in_chunks(self, chunk: Any, labels: Tensor, num_items_in_batch: Tensor | None = None, **inputs: Any) -> Any:
        """Do the same with the loss in chunks, as `use_chunked_loss` does it."""
        from transformers.modeling_outputs import CausalLMOutput

        inputs.pop("return_dict", None)
        hidden = self._causal.get_decoder()(**inputs).last_hidden_state
        shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].reshape(-1)
        count = (shifted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        weight = self._causal.get_output_embeddings().weight
        parts = [part.reshape(-1, part.shape[-1]) for part in hidden.chunk(len(self))]
        losses = torch.stack([chunked_cross_entropy(part, weight, shifted, chunk) / count for part in parts])
        self.losses.copy_(losses.detach())
        return CausalLMOutput(loss=losses.sum())

    def clip(self, _: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradients of each member to a norm of their own. Trainer calls it instead of Accelerator's method.

        Accelerator's takes all gradients together, in every step: without clipping, with an infinite norm. It
        multiplies them by that norm over their own, so that one gradient that is no number makes all of them so.

        Returns: the norm of all gradients together, before."""
        norms = [torch.nn.utils.clip_grad_norm_(own, max_norm, norm_type) for own in self.parameters]
        whole: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        return whole

    @contextmanager
    def only(self, number: int) -> Iterator[None]:
        """Within, the model has one member's adapter alone, under the name and with the calls that it has alone."""
        name = self._names[number]
        tuner = self._model.base_model
        with ExitStack() as stack:
            for module, together, before in self._forwards:
                stack.enter_context(_swapped(module.__dict__, "forward", before, together))
            for layer, own in zip(self._layers, self._own, strict=True):
                stack.callback(setattr, layer, "__class__", type(layer))
                layer.__class__ = own
                stack.enter_context(_swapped(layer.__dict__, "_active_adapter", [_FIRST], layer._active_adapter))
                for holder, key, kept in _by_adapter(layer, name):
                    stack.enter_context(_swapped(holder, key, {_FIRST: kept[name]}, kept))
            configs = tuner.peft_config
            stack.enter_context(_swapped(tuner.__dict__, "peft_config", {_FIRST: configs[name]}, configs))
            stack.enter_context(_swapped(tuner.__dict__, "active_adapter", _FIRST, tuner.active_adapter))
            yield


def _adapted_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _random_state(device: torch.device) -> list[Tensor]:
    """Return where the generators are that adapters are drawn from: the CPU's, and the card's."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _draw_from(state: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)


def _by_adapter(layer: Any, name: str) -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
    """Yield the dictionaries of a layer that have an entry for each adapter: whose they are, and under which key."""
    for key, kept in [*layer.__dict__.items()]:
        if isinstance(kept, dict) and name in kept:
            yield layer.__dict__, key, kept
    for module in layer._modules.values():
        if isinstance(module, torch.nn.ModuleDict) and name in module._modules:
            yield module.__dict__, "_modules", module._modules


@contextmanager
def _swapped(holder: dict[str, Any], key: str, within: Any, after: Any) -> Iterator[None]:
    """Put a value under a key within, and another one afterwards. A value of None is no entry."""
    _put(holder, key, within)
    try:
        yield
    finally:
        _put(holder, key, after)


def _put(holder: dict[str, Any], key: str, value: Any) -> None:
    if value is None:
        holder.pop(key, None)
    else:
        holder[key] = value


def _repeated(value: Any, count: int) -> Any:
    """Repeat a tensor of a batch for every member; what is not one for each row stays."""
    return value.repeat(count, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) and value.dim() > 1 else value


def _in_parts(call: Callable[[Tensor], Tensor], count: int, rows: Tensor) -> Tensor:
    """Call a layer for each member's rows by themselves."""
    return torch.cat([call(part) for part in rows.chunk(count)])


class _Apart:
    """A layer that calculates each member's products as PEFT does with its adapter alone."""

    def forward(self: Any, rows: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs); the first rows are the first member's."""
        base = _in_parts(self.base_layer, len(self.members), rows)
        rows = self._cast_input_dtype(rows, self.lora_A[self.members[0]].weight.dtype)
        # not base and adapter of one member after the other: a row's gradient is summed in the order of these lines
        added = [
            self.lora_B[name](self.lora_A[name](part)) * self.scaling[name]
            for name, part in zip(self.members, rows.chunk(len(self.members)), strict=True)
        ]
        return (base + torch.cat(added)).to(base.dtype)


class _InOne:
    """A layer that multiplies all rows with the base at once, and adds all adapters' products by one batched product
    for each of A and B. Adapters of a lower rank are filled up with zeros."""

    def forward(self: Any, rows: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs); the first rows are the first member's."""
        base = self.base_layer(rows)
        highest = max(self.r[name] for name in self.members)
        a = _stacked([_filled(self.lora_A[name].weight, (0, 0, 0, highest - self.r[name])) for name in self.members])
        b = _stacked([_filled(self.lora_B[name].weight, (0, highest - self.r[name])) for name in self.members])
        b = (b * self.member_scales).mT
        if not torch.is_autocast_enabled(rows.device.type):  # else it would be a copy of all rows, to no avail
            rows = self._cast_input_dtype(rows, a.dtype)
        inner = torch.bmm(rows.reshape(len(self.members), -1, rows.shape[-1]), a.mT)
        own = base.reshape(len(self.members), -1, base.shape[-1])
        found: Tensor = torch.baddbmm(own.to(inner.dtype), inner, b.to(inner.dtype)).to(base.dtype).view_as(base)
        return found


class _LaidOut(torch.autograd.Function):
    """Hands on a gradient in the layout of its weights. The products give it transposed, and a recorded step would
    copy such gradients by a kernel for each weight of each adapter."""

    @staticmethod
    def forward(_: Any, stacked: Tensor) -> Tensor:
        return stacked.view_as(stacked)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


def _stacked(weights: list[Tensor]) -> Tensor:
    """Stack the members' weights, (members, *shape)."""
    found: Tensor = _LaidOut.apply(torch.stack(weights))
    return found


def _filled(weight: Tensor, zeros: tuple[int, ...]) -> Tensor:
    return torch.nn.functional.pad(weight, zeros) if any(zeros) else weight
