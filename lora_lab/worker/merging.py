"""Write a trained model as one, adapters merged into their base, and compare held-out losses before and after."""

import contextlib
import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lora_lab.config import InvalidInput, ModelConfig, TrialConfig
from lora_lab.options import Init, ModelSource, Quantization
from lora_lab.quality.row_losses import HeldoutRows
from lora_lab.worker.check import checked_examples
from lora_lab.worker.data import Example
from lora_lab.worker.evaluation import digest_of, row_losses
from lora_lab.worker.gguf_file import UnreadableGguf, load_gguf, metadata_faults
from lora_lab.worker.models import load_architecture, load_model
from lora_lab.worker.tokenizer_files import load_tokenizer, save_tokenizer
from lora_lab.worker.trained import (
    be_quiet,
    load_dequantised,
    load_trained,
    on_its_weights,
    this_device,
    without_quantisation,
)

MOST_ROWS = 64
"""Held-out rows that losses are compared on."""

_ROOM = 1.05
"""Free disk space that is needed, per byte of weights: the tokenizer and the files' heads take some."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Held-out losses of one trained model in three forms, in nats per trained token."""

    trained: float
    """The model as it was trained: an adapter on its base."""
    merged: float
    """The merged model as it was written, loaded again."""
    requantised: float | None
    """The merged model loaded in 4 bit again; None where the trial did not train on 4 bit."""
    rows: int
    tokens: int
    recorded: float | None = None
    """`trained`, as the trial recorded it; None where that is not known of these rows."""


@dataclass(frozen=True, slots=True)
class Written:
    """What is known of a merged model that was written."""

    losses: Losses | None
    """None where there are no rows to measure them on."""
    unchecked: tuple[str, ...] = ()
    """What could not be checked, and why, a sentence each."""


@dataclass(frozen=True, slots=True)
class GgufCheck:
    """What a GGUF file holds when it is read again."""

    loss: float | None
    """Its held-out loss, in nats per trained token; None where it was not measured."""
    unread: str
    """Why there is no loss; empty where there is one."""
    has_template: bool
    """Whether it has a chat template."""


class Merger:
    """Merges one trained model. Where its rows are gone it merges all the same, and measures no loss."""

    def __init__(
        self,
        config: TrialConfig,
        trained: Path,
        progress: Callable[[str], None],
        recorded: HeldoutRows | None = None,
    ) -> None:
        """Read the held-out rows.

        Args:
            progress: gets a line at the start of each part.
            recorded: the losses that the trial recorded.

        Raises: InvalidInput when the base model is missing or is not as the trial had it."""
        be_quiet()
        config, why = on_its_weights(config, trained)
        self._unchecked = [f"Not checked: whether the base weights are the trial's ({why})."] if why else []
        self._config, self._trained, self._progress = config, trained, progress
        self._device = this_device()
        self._rows: list[Example] = []
        self._padding = 0
        self._recorded: float | None = None
        self._read_rows(recorded)

    def _read_rows(self, recorded: HeldoutRows | None) -> None:
        architecture = load_architecture(self._config.model)
        try:
            examples, self._padding = checked_examples(self._config, architecture)
        except InvalidInput as fault:
            self._unchecked.append(f"Not checked: any held-out loss, because the rows could not be read: {fault}")
            return
        self._rows = examples.heldout[:MOST_ROWS]
        if not self._rows:
            self._unchecked.append("Not checked: any held-out loss, because no row is held out.")
        elif recorded is None:
            self._unchecked.append(
                "Not checked: whether these are the trial's held-out rows, because its record has no losses of them."
            )
        elif digest_of(examples.heldout[: len(recorded.nats)]) != recorded.digest:
            self._unchecked.append(
                "These are not the held-out rows that the trial was evaluated on: the data was changed, or the "
                "tokenizer makes other tokens of it."
            )
        else:  # it may have evaluated fewer rows
            self._rows = self._rows[: len(recorded.nats)]
            count = len(self._rows)
            self._recorded = sum(recorded.nats[:count]) / sum(recorded.tokens[:count])

    def merge(self, out: Path, more: float = 0.0) -> Written:
        """Write the merged model to `out`, and compare.

        Args:
            more: bytes per weight that the disk needs room for besides, for what is made of the merged model.

        Raises: InvalidInput when it does not fit on the disk or cannot be written; then `out` is not made."""
        if not self._rows:
            self._progress(f"merging in {self._config.precision.dtype.name}")
            self._write(out, more)
            return Written(None, tuple(self._unchecked))
        self._progress("measuring the model as it was trained")
        trained, tokens = self._loss(load_trained(self._config, self._trained, self._device))
        self._progress(f"merging in {self._config.precision.dtype.name}")
        self._write(out, more)
        self._progress("measuring the merged model, loaded again")
        merged, _ = self._loss(self._loaded(without_quantisation(self._config), out))
        requantised = None
        if self._config.method.quantization is not Quantization.none:
            self._progress("measuring the merged model in 4 bit")
            requantised, _ = self._loss(self._loaded(self._config, out))
        losses = Losses(trained, merged, requantised, len(self._rows), tokens, self._recorded)
        return Written(losses, tuple(self._unchecked))

    def write_shapes(self, folder: Path) -> None:
        """Write the model's config and tokenizer to `folder`, without weights."""
        load_architecture(self._config.model).save_pretrained(folder)
        save_tokenizer(self._config.model, folder)

    def check_vocabulary(self, file: Path) -> None:
        """Raise InvalidInput where a GGUF file's tokenizer, end of turn or chat template is not the model's."""
        faults = metadata_faults(file, load_tokenizer(self._config.model))
        if faults:
            raise InvalidInput(
                "nothing was written, because llama.cpp would not read text as this model was trained:\n  "
                + "\n  ".join(faults)
            )

    def gguf(self, file: Path) -> GgufCheck:
        """Measure a GGUF file that was made of the merged model."""
        has_template = load_tokenizer(self._config.model).chat_template is not None
        if not self._rows:
            return GgufCheck(None, "there are no rows to measure it on", has_template)
        self._progress(f"measuring {file.name}, loaded again")
        try:
            model = load_gguf(file, self._config, load_architecture(self._config.model), self._device)
        except UnreadableGguf as reason:
            return GgufCheck(None, f"transformers cannot read it: {reason}", has_template)
        return GgufCheck(self._loss(model)[0], "", has_template)

    def _write(self, out: Path, more: float) -> None:
        """Merge into weights that are not quantised, and write them under their name at once."""
        if self._config.method.init is Init.loftq:  # on whole weights its adapter would add what 4 bit has not lost
            model = load_dequantised(self._config, self._trained, self._device)
        else:
            model = load_trained(without_quantisation(self._config), self._trained, self._device)
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        # on a CPU, fp32 stands in for fp16
        model = model.to(getattr(torch, self._config.precision.dtype.value))
        _check_room(model, out, more)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
            try:
                model.save_pretrained(place)
                save_tokenizer(self._config.model, Path(place))
                Path(place).chmod(0o755)
                if out.is_dir():  # and empty
                    out.rmdir()
                os.rename(place, out)
            except (OSError, SafetensorError) as fault:
                raise InvalidInput(f"the merged model could not be written to {out}: {fault}") from fault
            with contextlib.suppress(FileExistsError):
                Path(place).mkdir()  # for the context manager to remove

    def _loaded(self, config: TrialConfig, folder: Path) -> Any:
        """Load a merged model as the trial loaded its base model. The new adapter on it changes nothing."""
        model = ModelConfig(
            source=ModelSource.local, path=str(folder), trust_remote_code=config.model.trust_remote_code
        )
        # DoRA's norms would be rounded, and a start that takes something out of the weights round them again
        method = replace(config.method, use_dora=False, init=Init.kaiming)
        config = replace(config, model=model, method=method)
        return load_model(config, load_architecture(model), self._device)

    def _loss(self, model: Any) -> tuple[float, int]:
        """Return the held-out loss and the number of tokens. The model is given up."""
        config = self._config
        found = row_losses(
            model,
            self._rows,
            config.batch_size,
            self._padding,
            config.precision.dtype,
            self._device,
            lambda _done, _total: None,
        )
        del model
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return found.mean, sum(found.tokens)


def _check_room(model: Any, out: Path, more: float) -> None:
    """Raise InvalidInput when the disk has no room for the weights and `more` bytes per weight."""
    needed = int(_ROOM * sum(each.numel() * (each.element_size() + more) for each in model.parameters()))
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise InvalidInput(
            f"what is written takes {needed / 2**30:.2f} GiB, and the disk of {out.parent} has {free / 2**30:.2f} GiB "
            "free. Make room, or name a folder on another disk."
        )
