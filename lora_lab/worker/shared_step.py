"""Exchange what the workers of a group found in a step, so that it is one step of one process with all their rows.

A worker's gradient is a mean over its own tokens. The mean over all tokens is the mean of these, weighted by tokens:
ranks with more of them count for more. Gradients, loss and weight travel in one buffer, once an optimizer step, behind
the backward and before the gradients are clipped.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any, Protocol

import torch
from accelerate.data_loader import SeedableRandomSampler
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer

from lora_lab.worker.data import TokenCounts
from lora_lab.worker.group import Group
from lora_lab.worker.in_backward import InBackward
from lora_lab.worker.low_rank import Space, layer_weights
from lora_lab.worker.trainables.trainable import trained_parameters


class Watched(Protocol):
    """What counts the losses and tokens of a step."""

    def step_so_far(self) -> tuple[Tensor, TokenCounts]:
        """Return the mean loss of the step, a scalar on the device, and its counts."""

    def replace_step(self, loss: Tensor, counts: TokenCounts) -> None:
        """Take these instead, for the whole group."""


class SharedStep:
    """Exchanges the steps of one training."""

    def __init__(self, group: Group, model: Any, watched: Watched) -> None:
        self.group = group
        self._parameters = trained_parameters(model)
        self._watched = watched
        sizes = [parameter.numel() for parameter in self._parameters]
        self._buffer = torch.zeros(sum(sizes) + 2, device=self._parameters[0].device)
        *parts, self._loss, self._weight = self._buffer.split([*sizes, 1, 1])
        self._gradients = [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]

    def exchange(self, weight: Tensor | int | None) -> None:
        """Give the parameters the gradients of the whole group, and the telemetry its loss and counts.

        Args:
            weight: the number of tokens that this worker's gradients are the mean of, as Trainer counts them; None for
                a model that does not take it, whose losses are means.
        """
        loss, counts = self._watched.step_so_far()
        weight = counts.trained if weight is None else weight
        totals = torch.tensor(astuple(counts))
        self.group.begin_step()
        self.group.sum(totals)  # on the host, where a worker that is gone is noticed at once
        for parameter in self._parameters:
            if parameter.grad is None:  # of an expert that no token of this worker came to
                parameter.grad = torch.zeros_like(parameter)
        torch._foreach_copy_(self._gradients, [p.grad for p in self._parameters if p.grad is not None])
        self._loss.copy_(loss)
        self._weight.fill_(1.0)
        self._buffer.mul_(weight)
        self.group.sum(self._buffer)
        self._buffer.div_(self._weight.clone())
        for gradient, parameter in zip(self._gradients, self._parameters, strict=True):
            parameter.grad = gradient
        self._watched.replace_step(self._loss[0].clone(), TokenCounts(*totals.tolist()))


class OwnRows(Sampler[int]):
    """This worker's part of the rows of an epoch. They lie in the order that one process would take them in, of which
    each worker takes one micro-batch after the other in turn. What does not fill a micro-batch of each is left out."""

    def __init__(self, rows: int, batch_size: int, group: Group, seed: int) -> None:
        self._order = SeedableRandomSampler(range(rows), generator=torch.Generator(), data_seed=seed)
        self._batch_size = batch_size
        self._group = group
        self._rounds = rows // (batch_size * group.world_size)

    def __len__(self) -> int:
        return self._rounds * self._batch_size

    def __iter__(self) -> Iterator[int]:
        whole = len(self) * self._group.world_size
        for place, row in enumerate(self._order):
            if place < whole and place // self._batch_size % self._group.world_size == self._group.rank:
                yield row

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch."""
        self._order.set_epoch(epoch)


class SharingTrainer(Trainer):
    """Trainer with three documented methods of its own: rows of its own, a step that is shared, and an optimizer that
    is given what it projects, or groups for LoRA+. Alone and with a usual optimizer it is Trainer itself.

    `b_ratio` is the learning rate of B over that of A; None for one rate."""

    optimizer: Any

    def __init__(
        self,
        *,
        shared: SharedStep | None,
        space: Space | None = None,
        b_ratio: float | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self._shared = shared
        self._space = space
        self._b_ratio = b_ratio

    def create_optimizer(self, model: Any = None) -> Any:
        """Make the optimizer, with PEFT's parameter groups for LoRA+, and name the weights whose gradients it
        projects."""
        is_there = self.optimizer is not None
        if self._b_ratio is not None and not is_there:
            return self._with_b_faster(self._b_ratio)
        made = super().create_optimizer(model)
        if self._space is not None and not is_there:
            made.project(self._space, layer_weights(self.model))
        return made

    def _with_b_faster(self, ratio: float) -> Any:
        made = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        kind, arguments = made[0], {name: value for name, value in made[1].items() if name != "lr"}
        self.optimizer = create_loraplus_optimizer(
            self.model,
            kind,
            lr=self.args.learning_rate,
            loraplus_lr_ratio=ratio,
            loraplus_weight_decay=self.args.weight_decay,
            loraplus_lr_embedding=self.args.learning_rate,
            **arguments,
        )
        return self.optimizer

    def forget_optimizer(self) -> None:
        """Drop the optimizer; the next training makes it again."""
        made = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(made, InBackward):
            made.release()
        self.optimizer = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this worker's rows."""
        if self._shared is None:
            alone: DataLoader[Any] = super().get_train_dataloader()
            return alone
        arguments, rows = self.args, self.train_dataset
        loader = DataLoader(
            rows,
            arguments.per_device_train_batch_size,
            sampler=OwnRows(len(rows), arguments.per_device_train_batch_size, self._shared.group, arguments.data_seed),
            collate_fn=self.data_collator,
            drop_last=True,
            pin_memory=arguments.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run a micro-batch; behind the last of a step share it."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self._shared is not None and self.accelerator.sync_gradients:
            self._shared.exchange(num_items_in_batch)
        return loss


def unequal(group: Group, model: Any) -> list[int]:
    """Return the ranks whose trained weights are not those of the lead, bit for bit."""
    digest = hashlib.sha256()
    for parameter in trained_parameters(model):
        digest.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    every = group.gather(digest.hexdigest())
    return [rank for rank, each in enumerate(every) if each != every[0]]


def check_equal(group: Group, model: Any, when: str) -> None:
    """Raise RuntimeError unless the trained weights are equal on all workers.

    Args:
        when: as in "at the start".
    """
    if others := unequal(group, model):
        raise RuntimeError(
            f"the trained weights of rank {' and '.join(map(str, others))} are not those of rank 0 {when}: the workers "
            "would train different models"
        )
