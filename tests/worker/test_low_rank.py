"""Optimizers whose state is of a low rank, against the formulas of their papers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_lab.options import Projection
from lora_lab.worker import low_rank
from lora_lab.worker.low_rank import Projected, Space, first_singular_vectors

RATE, BETAS, EPS, RANK = 0.01, (0.9, 0.999), 1e-8, 4


class ProjectedAdamW(Projected, torch.optim.AdamW):
    pass


class Adam:
    """The moments of Adam for one tensor, by its formula."""

    def __init__(self) -> None:
        self.first = self.second = torch.zeros(())
        self.steps = 0

    def direction(self, gradient: Tensor) -> Tensor:
        self.steps += 1
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * gradient
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * gradient**2
        first, second = self.first / (1 - BETAS[0] ** self.steps), self.second / (1 - BETAS[1] ** self.steps)
        return first / (second.sqrt() + EPS)


def gradients(shape: tuple[int, int], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def stepped(kind: Projection, start: Tensor, given: list[Tensor], **more: Any) -> tuple[Tensor, Any]:
    """The weight after these gradients."""
    weight = torch.nn.Parameter(start.clone())
    optimizer = ProjectedAdamW([weight], lr=RATE, betas=BETAS, eps=EPS, weight_decay=more.pop("decay", 0.0))
    optimizer.project(Space(kind, more.pop("rank", RANK), more.pop("steps", 2)), [weight])
    for gradient in given:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_galore_steps_in_the_space_of_the_first_singular_vectors(shape: tuple[int, int]) -> None:
    given, weight, adam = gradients(shape, 5), torch.ones(shape), Adam()
    found, _ = stepped(Projection.galore, weight, given, decay=0.1)
    for number, gradient in enumerate(given):
        wide = gradient if shape[0] < shape[1] else gradient.t()
        if number % 2 == 0:
            basis = torch.linalg.svd(wide, full_matrices=False)[0][:, :RANK]
        update = 0.25 * basis @ adam.direction(basis.t() @ wide)
        weight = (1 - RATE * 0.1) * weight - RATE * (update if shape[0] < shape[1] else update.t())
    torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Projection.apollo, Projection.apollo_mini])
def test_apollo_scales_the_whole_gradient(kind: Projection) -> None:
    shape, rank = (8, 20), RANK if kind is Projection.apollo else 1
    given, weight, adam, norm = gradients(shape, 5), torch.ones(shape), Adam(), None
    found, _ = stepped(kind, weight, given, rank=rank)
    for number, gradient in enumerate(given):
        generator = torch.Generator().manual_seed(number // 2)
        projection = torch.randn((shape[0], rank), generator=generator) / math.sqrt(rank)
        low = projection.t() @ gradient
        direction = adam.direction(low)
        if kind is Projection.apollo:
            update = gradient * direction.norm(dim=0) / low.norm(dim=0)
        else:
            update = gradient * direction.norm() / low.norm()
        if norm is not None and update.norm() > 1.01 * norm:
            update = update * 1.01 * norm / update.norm()
        norm = update.norm()
        weight = weight - RATE * update * (1.0 if kind is Projection.apollo else math.sqrt(128))
    torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-6)


def test_a_full_rank_is_no_projection_and_a_narrow_weight_is_left_alone() -> None:
    start, given = torch.ones(RANK, 20), gradients((RANK, 20), 3)
    found, optimizer = stepped(Projection.galore, start, given)
    plain = torch.nn.Parameter(start.clone())
    ordinary = torch.optim.AdamW([plain], lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0)
    for gradient in given:
        plain.grad = gradient.clone()
        ordinary.step()
    assert torch.equal(found, plain)
    assert optimizer.projection == "none"


@pytest.mark.parametrize(("kind", "basis"), [(Projection.galore, 8 * RANK), (Projection.apollo, 0)])
def test_the_state_is_of_the_rank(kind: Projection, basis: int) -> None:
    _, optimizer = stepped(kind, torch.ones(8, 20), gradients((8, 20), 2))
    [state] = optimizer.state.values()
    assert sum(t.numel() for t in state.values() if torch.is_tensor(t) and t.numel() > 1) == 2 * RANK * 20 + basis
    assert optimizer.projection == f"{kind.name} of rank {RANK}"


@pytest.mark.parametrize("kind", list(Projection))
def test_a_stored_state_goes_on_as_if_nothing_had_been(kind: Projection) -> None:
    given = gradients((8, 20), 5)
    whole, _ = stepped(kind, torch.ones(8, 20), given)
    half, optimizer = stepped(kind, torch.ones(8, 20), given[:3])
    weight = torch.nn.Parameter(half.clone())
    again = ProjectedAdamW([weight], lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0)
    again.project(Space(kind, RANK, 2), [weight])
    again.load_state_dict(optimizer.state_dict())
    for gradient in given[3:]:
        weight.grad = gradient.clone()
        again.step()
    assert torch.equal(weight, whole)


def test_a_learning_rate_of_zero_moves_nothing() -> None:
    for kind in Projection:
        weight = torch.nn.Parameter(torch.ones(8, 20))
        optimizer = ProjectedAdamW([weight], lr=0.0)
        optimizer.project(Space(kind, RANK, 2), [weight])
        weight.grad = gradients((8, 20), 1)[0]
        optimizer.step()
        assert torch.equal(weight, torch.ones(8, 20))


def test_a_decomposition_that_does_not_converge_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(shape, generator=generator) for shape in ((8, 2), (2, 20))]
    matrix = parts[0] @ parts[1]
    monkeypatch.setattr(low_rank.torch.linalg, "svd", fails)
    basis = first_singular_vectors(matrix, 2)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(basis @ basis.t() @ matrix, matrix, rtol=1e-4, atol=1e-4)
