"""Keep an optimizer's state for a projection of each layer's gradient to a low rank, as GaLore and APOLLO do.

Both let an optimizer work on the projected gradient G' (rank x columns, or rows x rank: the shorter side is projected).
While it steps, the weight is exchanged for zeros of that shape; what it makes of these is its update.

- GaLore (arXiv 2403.03507) projects to the gradient's first singular vectors, and projects the update back.
- APOLLO (arXiv 2412.05270) projects at random. It takes the update for its size alone: the whole gradient is scaled, in
  each channel or as one, by how much the optimizer has scaled G'. The random numbers are drawn again in each step, from
  the same seed, and not kept.

No package serves. That of APOLLO's authors may not be used commercially. In pytorch-optimizer 4.1 APOLLO projects the
scaled G' back, which is another method, and GaLore keeps its projections where neither a checkpoint that is read safely
nor a count of the state finds them.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lab.options import Projection
from lora_lab.worker.engines.compiled import decoder_layers

_GALORE_SCALE = 0.25
"""The share of its update that GaLore takes, as published."""
_APOLLO_SCALE = {Projection.apollo: 1.0, Projection.apollo_mini: math.sqrt(128)}
"""The factor on APOLLO's update, as published."""
_MOST_GROWTH = 1.01
"""By which the norm of APOLLO's update may grow from step to step, as published."""
_BASIS, _STEPS, _NORM = "basis", "projection_steps", "update_norm"
_TINY = 1e-8


@dataclass(frozen=True, slots=True)
class Space:
    """How gradients are projected."""

    kind: Projection
    rank: int
    steps: int
    """After as many the projection is chosen again."""

    @property
    def named(self) -> str:
        """Return its name in the read-back."""
        return f"{self.kind.name} of rank {self.rank}"


@dataclass(frozen=True, slots=True)
class _Exchanged:
    """A weight while its optimizer works on zeros."""

    parameter: Any
    group: dict[str, Any]
    weight: Tensor
    gradient: Tensor | None
    """The whole one; None where it is not needed any more."""
    projected: Tensor
    basis: Tensor


class Projected:
    """Mixed into an optimizer's class, before it. Until `project` was called it changes nothing."""

    state: Any
    _space: Space
    _places: dict[int, int]

    def project(self, space: Space, weights: list[Any]) -> None:
        """Project the gradients of these weights from now on; those whose shorter side is longer than the rank."""
        self._space = space
        self._places = {id(weight): place for place, weight in enumerate(weights) if min(weight.shape) > space.rank}

    @torch.no_grad()
    def step(self: Any, closure: Any = None) -> None:
        """Update every weight that has a gradient."""
        exchanged = [
            self._exchange(parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and id(parameter) in self._places
        ]
        super().step()  # type: ignore[misc]
        for each in exchanged:
            self._finish(each)

    @property
    def projection(self: Any) -> str:
        """Return what is projected; none before the first step, and where no layer is wider than the rank."""
        return self._space.named if any(_STEPS in state for state in self.state.values()) else "none"

    def _exchange(self: Any, parameter: Any, group: dict[str, Any]) -> _Exchanged:
        gradient, weight, state = parameter.grad, parameter.data, self.state[parameter]
        basis = self._basis(parameter, gradient, state)
        projected = basis.t() @ gradient if _is_wide(gradient) else gradient @ basis
        parameter.grad = None
        parameter.data = torch.zeros_like(projected)
        parameter.grad = projected
        kept = None if self._space.kind is Projection.galore else gradient
        return _Exchanged(parameter, group, weight, kept, projected, basis)

    def _basis(self: Any, parameter: Any, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the matrix (shorter side, rank) that projects."""
        steps, space = state.get(_STEPS, 0), self._space
        if space.kind is Projection.galore:
            is_old = _BASIS in state and steps % space.steps
            return state[_BASIS] if is_old else first_singular_vectors(gradient, space.rank)
        number = self._places[id(parameter)] * 1_000_003 + steps // space.steps
        generator = torch.Generator(gradient.device).manual_seed(number)
        shape = (min(gradient.shape), space.rank)
        return torch.randn(shape, generator=generator, device=gradient.device) / math.sqrt(space.rank)

    def _finish(self: Any, each: _Exchanged) -> None:
        """Give the weight its update."""
        parameter, weight, state = each.parameter, each.weight, self.state[each.parameter]
        update, rate = parameter.data, float(each.group["lr"])
        parameter.grad = None
        parameter.data = weight
        weight.mul_(1 - rate * each.group.get("weight_decay", 0.0))  # the optimizer has decayed zeros
        if each.gradient is None:
            back = each.basis @ update if _is_wide(weight) else update @ each.basis.t()
            weight.add_(back, alpha=_GALORE_SCALE)
            state[_BASIS] = each.basis
        elif rate:
            weight.sub_(self._scaled(each, update, rate, state))
        state[_STEPS] = state.get(_STEPS, 0) + 1

    def _scaled(self: Any, each: _Exchanged, update: Tensor, rate: float, state: dict[str, Any]) -> Tensor:
        """Return APOLLO's update, in the gradient's own memory."""
        assert each.gradient is not None
        if self._space.kind is Projection.apollo:
            channel = 0 if _is_wide(each.gradient) else 1
            sizes = [torch.linalg.vector_norm(part, dim=channel, keepdim=True) for part in (update, each.projected)]
        else:
            sizes = [torch.linalg.vector_norm(part) for part in (update, each.projected)]
        scaled = each.gradient.mul_(sizes[0] / (sizes[1] + _TINY))
        norm = torch.linalg.vector_norm(scaled) / rate
        if _NORM in state:
            growth = torch.clamp(norm / (state[_NORM] + _TINY), min=_MOST_GROWTH) / _MOST_GROWTH
            scaled, norm = scaled.div_(growth), norm / growth
        state[_NORM] = norm
        return scaled.mul_(_APOLLO_SCALE[self._space.kind])


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def first_singular_vectors(gradient: Tensor, rank: int) -> Tensor:
    """Return those of the shorter side, of shape (shorter side, rank). Where the decomposition does not converge, an
    orthogonal basis of what the gradient makes of random vectors."""
    matrix = gradient.float() if _is_wide(gradient) else gradient.float().t()
    try:
        found: Tensor = torch.linalg.svd(matrix, full_matrices=False).U[:, :rank].contiguous()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        generator = torch.Generator(matrix.device).manual_seed(0)
        random = torch.randn((matrix.shape[1], rank), generator=generator, device=matrix.device)
        found = torch.linalg.qr(matrix @ random).Q
    return found


def layer_weights(model: Any) -> list[Any]:
    """List the weights of the linear layers within decoder layers, in the model's order. Embeddings and the head are
    none: their gradients have no low rank."""
    found = {
        id(module.weight): module.weight
        for layer in decoder_layers(model)
        for module in layer.modules()
        if isinstance(module, torch.nn.Linear)
    }
    return list(found.values())
