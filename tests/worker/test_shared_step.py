"""What workers exchange in a step, and which rows each of them takes: without any other process."""

import functools
from dataclasses import dataclass, field

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from engine_models import adapted, adapters, padded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_lab.seat import Seat
from lora_lab.worker.data import TokenCounts
from lora_lab.worker.engines.graph_step import GraphStep, use_graph_step
from lora_lab.worker.group import Group
from lora_lab.worker.shared_step import OwnRows, SharedStep

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Pair(Group):
    """This worker and another one, whose part of each sum is given."""

    def __init__(self, *theirs: Tensor) -> None:
        super().__init__(Seat())
        self.world_size = 2
        self._theirs = list(theirs)

    def begin_step(self) -> None:
        pass

    def sum(self, tensor: Tensor) -> None:
        """Without anything given the other worker has the same."""
        tensor.add_(self._theirs.pop(0) if self._theirs else tensor.clone())


@dataclass
class Watched:
    loss: Tensor = field(default_factory=lambda: torch.tensor(3.0))
    counts: TokenCounts = field(default_factory=lambda: TokenCounts(rows=2, slots=20, real=12, trained=10))

    def step_so_far(self) -> tuple[Tensor, TokenCounts]:
        return self.loss, self.counts

    def replace_step(self, loss: Tensor, counts: TokenCounts) -> None:
        self.loss, self.counts = loss, counts


@pytest.mark.parametrize("weight", [10, None, torch.tensor(10)])
def test_gradients_and_losses_are_weighted_by_tokens_and_counts_are_added(weight: Tensor | int | None) -> None:
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[1.0, -2.0]]), torch.tensor([4.0])
    theirs = 30 * torch.tensor([5.0, 2.0, 0.0, 1.0, 1.0])
    watched = Watched()
    group = Pair(torch.tensor([2, 40, 36, 30, 7, 9]), theirs)
    SharedStep(group, model, watched).exchange(weight)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[4.0, 1.0]]))
    torch.testing.assert_close(model.bias.grad, torch.tensor([1.0]))
    assert float(watched.loss) == pytest.approx(1.5)
    assert watched.counts == TokenCounts(rows=4, slots=60, real=48, trained=40, attended=7, attended_slots=9)


def test_a_weight_that_only_the_other_worker_has_used_gets_its_share() -> None:
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[1.0, 1.0]])
    SharedStep(Pair(torch.zeros(6, dtype=torch.int64), 10 * torch.ones(5)), model, Watched()).exchange(10)
    torch.testing.assert_close(model.bias.grad, torch.tensor([0.5]))


def test_an_overflow_of_one_worker_is_seen_by_all() -> None:
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.ones(1, 2), torch.ones(1)
    theirs = torch.tensor([float("inf"), 1.0, 1.0, 1.0, 1.0])
    SharedStep(Pair(torch.zeros(6, dtype=torch.int64), theirs), model, Watched()).exchange(10)
    assert model.weight.grad is not None
    assert not bool(torch.isfinite(model.weight.grad).all())


@pytest.mark.parametrize("often", [1, 2])
@pytest.mark.parametrize("is_recorded", [False, True])
def test_with_a_twin_every_step_has_the_gradients_that_it_has_alone(often: int, is_recorded: bool) -> None:
    """The buffers of graph's step and of the exchange are both handed to the optimizer, one after the other."""
    found: list[list[dict[str, Tensor]]] = []
    for shares in (False, True):
        model = adapted()
        model.train()
        if is_recorded:
            step = GraphStep(
                model, functools.partial(torch.autocast, "cpu", enabled=False), graphs=False, accumulates=often > 1
            )
            use_graph_step(model, step)
            step.record({**padded([9, 14], 16), "num_items_in_batch": torch.tensor(7)})
        shared = SharedStep(Pair(), model, Watched())
        steps = []
        for number in range(3):
            for micro in range(often):
                batch = padded([9, 14], 16, seed=10 * number + micro)
                model(**batch, num_items_in_batch=torch.tensor(7)).loss.backward()
            if shares:
                shared.exchange(7)
            steps.append({name: p.grad.clone() for name, p in adapters(model).items() if p.grad is not None})
            for parameter in adapters(model).values():
                parameter.grad = None
        found.append(steps)
    for alone, together in zip(*found, strict=True):
        assert alone.keys() == together.keys()
        assert max(float(gradient.abs().max()) for gradient in alone.values()) > 0
        for name, gradient in alone.items():
            torch.testing.assert_close(together[name], gradient)


@given(
    rows=st.integers(1, 60),
    batch_size=st.integers(1, 5),
    world_size=st.integers(2, 4),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)
def test_the_workers_take_the_rows_of_one_process_in_turns(
    rows: int, batch_size: int, world_size: int, seed: int, epoch: int
) -> None:
    whole = SeedableRandomSampler(range(rows), generator=torch.Generator(), data_seed=seed)
    whole.set_epoch(epoch)
    order = list(whole)
    own = []
    for rank in range(world_size):
        sampler = OwnRows(rows, batch_size, Group(Seat(rank, world_size)), seed)
        sampler.set_epoch(epoch)
        own.append(list(sampler))
        assert len(own[-1]) == len(sampler) == rows // (batch_size * world_size) * batch_size
    per_step = batch_size * world_size
    for place in range(rows // per_step):
        taken = [row for each in own for row in each[place * batch_size : (place + 1) * batch_size]]
        assert taken == order[place * per_step : (place + 1) * per_step]


@given(count=st.integers(0, 20), world_size=st.integers(1, 4))
def test_shares_of_items_are_put_together_in_their_order(count: int, world_size: int) -> None:
    items = list(range(count))
    groups = [Group(Seat(rank, world_size)) for rank in range(world_size)]
    shares = [group.share_of(items) for group in groups]
    assert len({len(share) for share in shares}) == 1

    class Gathered(Group):
        def gather(self, mine: object) -> list[list[int]]:  # type: ignore[override]
            return shares

    assert Gathered(Seat(0, world_size)).joined(shares[0], count) == items
