"""Run forward and backward of one micro-batch over fixed memory, so that a CUDA graph can replay them.

Trainer calls the model and later `backward()` on the loss. Here the forward already does both, by one replay, and
the loss it returns hands the gradients on when Trainer calls `backward()`. Optimizer, GradScaler, clipping and schedule
stay Trainer's own and see what they always see.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from lora_lab.worker.engines.compute_copies import ComputeCopies
from lora_lab.worker.trainables.trainable import trained_parameters

_WATCHED = 3
"""The first optimizer steps, and replays of a shape, in which memory is measured. After these the rest of the memory in
use grows no more: the optimizer has its state."""

Batch = dict[str, Tensor]
Watch = Callable[[Callable[[], Tensor]], object]


@dataclass(slots=True)
class _Recorded:
    batch: Batch
    loss: Tensor
    graph: torch.cuda.CUDAGraph | None
    replays: int = 0


def forward_and_backward(
    forward: Callable[..., Any], autocast: Callable[[], Any], batch: Batch, parameters: list[Tensor], scale: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Calculate a micro-batch's loss, and the gradients of `scale` times the loss for `parameters`.

    Args:
        forward: the model's.
        autocast: makes the context in which the forward runs.
    """
    with torch.enable_grad():
        with autocast():
            loss = forward(**batch).loss
        gradients = torch.autograd.grad(loss * scale, parameters)
    return loss.detach(), gradients


class GraphStep:
    """Calculates a loss and its gradients into fixed buffers, recorded as a CUDA graph once for each batch shape."""

    def __init__(
        self,
        model: Any,
        autocast: Callable[[], Any],
        graphs: bool = True,
        copies: ComputeCopies | None = None,
        accumulates: bool = True,
    ) -> None:
        """Take the model's present forward.

        Args:
            model: what Trainer will call; its trained parameters stay where they are.
            autocast: makes the context in which the forward runs; it must keep no cache of weights, which
                would go stale.
            copies: what the forward uses instead of some of the parameters, in another format.
            graphs: False calculates each step operation by operation: on a CPU, for tests.
            accumulates: whether an optimizer step takes the gradients of more than one micro-batch. Otherwise the
                optimizer gets the buffer that the step writes, and there is no second one.
        """
        self.forward = model.forward
        self.parameters = trained_parameters(model)
        self.device = self.parameters[0].device
        self.unrecorded = 0
        """Micro-batches in training of a shape that was not recorded."""
        self.on_unrecorded: Callable[[tuple[int, ...]], object] = tuple
        """Called with such a batch's shape, before it is calculated operation by operation."""
        self.working_bytes = 0
        """What a replay needs beyond what torch's allocator counts: the memory that is allocated and freed within a
        graph."""
        self.replay_peak_bytes = 0
        """The most memory in use during a replay, measured in the first steps and the first replays of each shape."""
        self.recording_peak_bytes = 0
        """The most memory in use while steps were recorded."""
        self.replays = 0
        self._copies = ComputeCopies() if copies is None else copies
        self._used = [self._copies.get(p, p) for p in self.parameters]
        self._autocast = autocast
        self._graphs = graphs
        self._steps = 0
        self._flat = torch.zeros(sum(p.numel() for p in self.parameters), device=self.device)
        self._gradients = _views(self._flat, self.parameters)
        self._handed = torch.zeros_like(self._flat) if accumulates else self._flat
        self._handed_gradients = _views(self._handed, self.parameters)
        self._scaler: Any = None
        self._scale = torch.ones((), device=self.device)
        self._recorded: dict[Any, _Recorded] = {}
        self._pool: Any = None

    def use_scaler(self, scaler: Any) -> None:
        """Scale the loss by this GradScaler's scale, so that small gradients do not underflow in fp16.

        Args:
            scaler: Trainer's, or None.
        """
        self._scaler = scaler
        if scaler is not None:  # it has no tensor yet, before it is first used
            self._scale.fill_(scaler.get_scale())

    def record(self, batch: Batch, watch: Watch = lambda run: run()) -> None:
        """Record a step for batches of this shape; the content does not matter. Record the largest shapes first: the
        graphs share their memory.

        Args:
            batch: as the model will be called, on any device.
            watch: gets the step and runs it once more, unrecorded, after libraries have chosen their kernels.
        """
        fixed = {name: tensor.to(self.device, copy=True) for name, tensor in batch.items()}
        run = functools.partial(self.calculate, fixed)
        if not self._graphs:
            run()
            watch(run)
            self._recorded[_shape(fixed)] = _Recorded(fixed, torch.zeros(()), None)
            return
        here = torch.cuda.current_stream()
        aside = torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            run()
            watch(run)
        here.wait_stream(aside)
        torch.cuda.synchronize()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # cuBLAS keeps 32 MiB for each thread and stream that multiplied; a recorded step gets workspaces of its own
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        self.recording_peak_bytes = max(self.recording_peak_bytes, torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = run()
        used_within = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        self.working_bytes = max(self.working_bytes, used_within)
        self._recorded[_shape(fixed)] = _Recorded(fixed, loss, graph)

    def forget(self) -> None:
        """Drop every recording and its memory."""
        self._recorded.clear()
        self._pool = None
        self.working_bytes = self.replay_peak_bytes = 0

    def calculate(self, batch: Batch) -> Tensor:
        """Run forward and backward operation by operation: return the loss, write the gradients to their buffers."""
        self._copies.refresh()
        loss, gradients = forward_and_backward(self.forward, self._autocast, batch, self._used, self._scale)
        torch._foreach_copy_(self._gradients, gradients)
        return loss

    def run(self, batch: Batch) -> Tensor:
        """Return the loss of a micro-batch, a scalar. Its gradients stay in the buffers until the next."""
        if self._scaler is not None and self._scaler._scale is not None:
            # the GradScaler sees an overflow only in gradients of its present scale
            self._scale.copy_(self._scaler._scale)
        recorded = self._recorded.get(_shape(batch))
        if recorded is None:
            self.unrecorded += 1
            self.on_unrecorded(tuple(batch["input_ids"].shape))
            with torch.compiler.set_stance("force_eager"):
                return self.calculate(batch)
        for name, tensor in batch.items():
            recorded.batch[name].copy_(tensor, non_blocking=True)
        self.replays += 1
        if recorded.graph is None:
            return self.calculate(recorded.batch)
        if recorded.replays < _WATCHED or self._steps < _WATCHED:
            recorded.replays += 1
            self.replay_peak_bytes = max(self.replay_peak_bytes, torch.cuda.memory_allocated() + self.working_bytes)
        recorded.graph.replay()
        return recorded.loss.clone()

    def hand_over(self, grad: Tensor) -> None:
        """Add the gradients of the last `run` to those of the parameters, for a loss that was multiplied with `grad`
        since. All of them are in one buffer, so that this is one kernel.

        Raises: RuntimeError for a second micro-batch of a step that accumulates none."""
        factor = grad / self._scale
        if self.parameters[0].grad is None:
            self._steps += 1
            torch.mul(self._flat, factor, out=self._handed)
            for parameter, gradient in zip(self.parameters, self._handed_gradients, strict=True):
                parameter.grad = gradient
        elif self._handed is self._flat:
            raise RuntimeError("a step with one micro-batch got a second: set grad_accum_steps to as many as it has")
        else:
            self._handed.addcmul_(self._flat, factor)


class _HandOver(torch.autograd.Function):
    """One autograd node for all parameters: one each would take as long as the rest of Trainer's step."""

    @staticmethod
    def forward(ctx: Any, step: GraphStep, batch: Batch, _anchor: Tensor) -> Tensor:
        ctx.step = step
        return step.run(batch)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        # what Trainer did to the loss: the GradScaler's scale, a share of an accumulated step
        ctx.step.hand_over(grads[0])
        return None, None, None


def use_graph_step(model: Any, step: GraphStep) -> None:
    """Let `model` train by `step`. Every other call goes to the forward as it was."""

    def forward(model: Any, **inputs: Any) -> Any:
        if not (model.training and torch.is_grad_enabled() and inputs.get("labels") is not None):
            return step.forward(**inputs)
        return CausalLMOutput(loss=_HandOver.apply(step, tensors(inputs), anchor))

    anchor = torch.zeros((), device=step.device, requires_grad=True)  # so that the loss has a backward
    model.forward = MethodType(forward, model)  # accelerate wraps it, and unwraps it, as a method


def tensors(inputs: Mapping[str, Any]) -> Batch:
    """Keep the entries that are tensors. Switches such as return_dict are left out.

    Raises: TypeError for a number, which would be lost without a word.
    """
    numbers = [name for name, value in inputs.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    if numbers:
        raise TypeError(f"a recorded step takes tensors, and {numbers[0]} is a plain number")
    return {name: value for name, value in inputs.items() if torch.is_tensor(value)}


def _views(flat: Tensor, parameters: list[Any]) -> list[Tensor]:
    parts = flat.split([p.numel() for p in parameters])
    return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]


def _shape(batch: Batch) -> tuple[Any, ...]:
    return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(batch.items()))
