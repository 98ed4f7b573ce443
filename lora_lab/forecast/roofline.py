"""Estimate the time of a step from the card's two measured rates and what the host costs.

A step's work on the card is a sum of parts, each in seconds at the card's best rate: products and attention by the
matrix rate, everything else by the memory's. A part takes `Fitted`'s multiple of that. The host launches the work: per
linear layer and pass, which the card does not wait for where it has enough to do, and per trained matrix in the
optimizer, where it does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_lab.config import TrialConfig
from lora_lab.options import Batching, DataSource, DType, EngineKind, Quantization
from lora_lab.telemetry.flops import PASSES, attention_forward, products, repeated_products, repeated_share
from lora_lab.work import MicroBatch, ModelFacts

_OVERLAP = 4.0
"""The power in the sum of host and card: between neither overlapping (1) and both wholly (infinite)."""

_LINK_BYTES_PER_SECOND = 40e9
"""At which a kernel reads host memory, measured over PCIe 5 with 16 lanes (docs/small_cards.md). Slower links are not
known here."""

_MOVED_BY_OPTIMIZER = 28
"""Bytes that AdamW in fp32 reads and writes for each trained weight: weight and both moments twice, gradient once. Of
adapters it is nothing; of a whole model it was not measured."""

_SHARE_OF_FORWARD = 1 / 2
"""Of the host's time in forward and backward, for a forward that gives the losses. Jobs that shared an H200 took this
long."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """The best rates of a device."""

    flops_per_second: float
    """Of products in the trial's precision."""
    bytes_per_second: float
    """Of a copy in its memory, read and written bytes together."""


Fitted = Mapping[str, float]
"""Multiples of the parts' times at the best rate, and the host's seconds, by name."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """The time of one optimizer step in seconds."""

    card: float
    """In which the card works."""
    host: float
    """In which the host launches that work."""
    waiting: float
    """In which the card waits for the host whatever it has to do."""

    @property
    def seconds(self) -> float:
        """Return the whole time, in which card and host overlap."""
        together: float = (self.card**_OVERLAP + self.host**_OVERLAP) ** (1 / _OVERLAP)
        return together + self.waiting


class Roofline:
    """The time of steps of one configuration on one device."""

    def __init__(self, config: TrialConfig, model: ModelFacts, speeds: Speeds, fitted: Fitted) -> None:
        self._config = config
        self._model = model
        self._speeds = speeds
        self._fitted = fitted
        # an MLP in tiles is calculated twice in any case, and is most of its layer
        is_tiled = config.engine.mlp_tile is not None
        self._repeated = 1.0 if is_tiled else repeated_share(config.gradient_checkpointing.name, model.layers)

    def step(self, batches: Iterable[MicroBatch]) -> StepTime:
        """Return the time of an optimizer step over these micro-batches."""
        each = [self._training(batch) for batch in batches]
        return StepTime(
            card=sum(card for card, _ in each), host=sum(host for _, host in each), waiting=self._optimizer()
        )

    def evaluation(self, batches: Iterable[MicroBatch]) -> float:
        """Return the seconds in which the losses of these batches are calculated. Engines are not used there."""
        total = 0.0
        for batch in batches:
            parts = self._forward_parts(batch)
            card = sum(self._fitted[name] * seconds for name, seconds in parts.items()) + self._from_host(1)
            host = self._fitted["host_eager"] * self._model.linears * _SHARE_OF_FORWARD
            total += StepTime(card, host, self._fitted["waiting_step"]).seconds
        return total

    def parts(self, batch: MicroBatch) -> dict[str, float]:
        """Return a micro-batch's forward and backward in parts, each in seconds at the card's best rate.

        Raises: ValueError where the model's products could not be counted."""
        config, model, counted = self._config, self._model, self._model.counted
        if counted is None:
            raise ValueError("the model's products are not counted")
        again, rate, memory = self._repeated, self._speeds.flops_per_second, self._speeds.bytes_per_second
        squares = batch.rows * batch.width**2
        attention = attention_forward(counted, squares) / (1 if _is_masked(config) else 2)
        work = products(counted, batch.slots) + again * repeated_products(counted, batch.slots)
        cell = 4 if config.precision.dtype is DType.fp32 else 2
        passes = 2 + again
        found = {
            # not a time at a rate: the number of products, of which each takes a few microseconds at least
            f"floor_{_kind(config)}": model.linears * passes,
            "products": work / rate,
            "attention": attention * (PASSES[True] + again) / rate,
            f"layers_{_kind(config)}": batch.slots * model.widths * cell * passes / memory,
            f"logits_{_loss(config)}": 4 * batch.slots * model.vocabulary / memory,
        }
        if config.method.quantization is Quantization.none:
            in_layers = counted.frozen_in_layers or counted.trainable_in_layers or 0
            found["weights"] = in_layers * cell * passes / memory
        else:
            found[f"unpacking_{_kind(config)}"] = counted.frozen_in_layers * (0.5 + cell) * passes / memory
        if config.method.raise_to_fp32:
            found[f"raised_{_loss(config)}"] = 4 * batch.slots * model.hidden * model.vocabulary / rate
            found["raised_layers"] = 4 * batch.slots * model.hidden * model.layers * passes / memory
        return found

    def _forward_parts(self, batch: MicroBatch) -> dict[str, float]:
        """Return the parts of a forward without gradients, as eager calculates it."""
        counted = self._model.counted
        if counted is None:
            raise ValueError("the model's products are not counted")
        rate, memory = self._speeds.flops_per_second, self._speeds.bytes_per_second
        return {
            "floor_eager": float(self._model.linears),
            "products": 2.0 * batch.slots * (counted.frozen + counted.trainable) / rate,
            "attention": attention_forward(counted, batch.rows * batch.width**2) / rate,
            "layers_eager": 2.0 * batch.slots * self._model.widths / memory,
            "logits_whole": 4.0 * batch.slots * self._model.vocabulary / memory,
        }

    def _training(self, batch: MicroBatch) -> tuple[float, float]:
        """Return the seconds of the card and of the host for one micro-batch."""
        card = sum(self._fitted[name] * seconds for name, seconds in self.parts(batch).items()) + self._from_host(
            2 + self._repeated
        )
        return card, self._fitted[f"host_{_kind(self._config)}"] * self._model.linears * self._launches()

    def _from_host(self, passes: float) -> float:
        """Return the seconds in which the 4-bit weights of layers in host memory come over PCIe in these passes."""
        counted, layers = self._model.counted, self._model.layers
        assert counted is not None
        share = self._config.engine.hosted_layers(layers) / layers
        return share * counted.frozen_in_layers * 0.5 * passes / _LINK_BYTES_PER_SECOND

    def _launches(self) -> float:
        """Return what the host launches as a multiple of the launches without checkpointing, in 4 bit."""
        config, fitted = self._config, self._fitted
        if config.engine.kind is EngineKind.graph:  # replays what was recorded, whatever it holds
            return 1.0
        again = 1 + fitted["host_repeated"] * self._repeated
        raised = fitted["host_raised"] if config.method.raise_to_fp32 else 1.0
        return again * raised * (fitted["host_16_bit"] if config.method.quantization is Quantization.none else 1.0)

    def _optimizer(self) -> float:
        """Return the seconds in which the card waits for the optimizer's code."""
        optim = self._config.optimizer.optim or ""
        per_matrix = self._fitted["waiting_bitsandbytes"] if "bit" in optim or "paged" in optim else 0.0
        scaler = 0.0
        if self._config.precision.dtype is DType.fp16 and "fused" not in optim:
            scaler = self._fitted["waiting_scaler"]
        counted = self._model.counted
        trained = counted.trainable if counted is not None else 0
        moved = _MOVED_BY_OPTIMIZER * trained / self._speeds.bytes_per_second
        return self._fitted["waiting_step"] + (per_matrix + scaler) * self._model.matrices + moved


def _kind(config: TrialConfig) -> str:
    """Return the name of the engine, by whose kernels a layer is calculated."""
    return config.engine.kind.name


def _loss(config: TrialConfig) -> str:
    return "chunked" if config.engine.chunked_loss else "whole"


def _is_masked(config: TrialConfig) -> bool:
    """Return whether attention works through whole squares: rows of several lengths side by side, or packed."""
    if config.data.batching is Batching.packed:
        return True
    if config.engine.kind in (EngineKind.compile, EngineKind.graph):
        return False
    pads = config.batch_size > 1 or config.data.batching is Batching.seq_len
    return pads and config.data.source is not DataSource.random_tokens
