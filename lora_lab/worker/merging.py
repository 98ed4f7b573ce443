"""Merge a trained adapter into its base model, and compare held-out losses before and after."""

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
from lora_lab.options import ModelSource, Quantization
from lora_lab.worker.adapted import be_quiet, load_adapted, on_its_weights, this_device, without_quantisation
from lora_lab.worker.check import checked_examples
from lora_lab.worker.evaluation import row_losses
from lora_lab.worker.gguf_file import UnreadableGguf, load_gguf, metadata_faults
from lora_lab.worker.models import load_architecture, load_model, load_tokenizer, save_tokenizer

MOST_ROWS = 64
"""Held-out rows that losses are compared on."""

_ROOM = 1.05
"""Free disk space that is needed, per byte of weights: the tokenizer and the files' heads take some."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Held-out losses of one trained model in three forms, in nats per trained token."""

    adapter: float
    """The adapter on the base model as it was trained."""
    merged: float
    """The merged model as it was written, loaded again."""
    requantised: float | None
    """The merged model loaded in 4 bit again; None where the trial did not train on 4 bit."""
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True)
class GgufCheck:
    """What a GGUF file holds when it is read again."""

    loss: float | None
    """Its held-out loss, in nats per trained token; None where transformers does not read this kind of model."""
    unread: str
    """Why there is no loss; empty where there is one."""
    has_template: bool
    """Whether it has a chat template."""


class Merger:
    """Merges one adapter. The held-out rows are read first, so that nothing is written where they are missing."""

    def __init__(self, config: TrialConfig, adapter: Path, progress: Callable[[str], None]) -> None:
        """Read the held-out rows.

        Args:
            progress: gets a line at the start of each part.

        Raises: InvalidInput."""
        be_quiet()
        config, self._unchecked = on_its_weights(config, adapter)
        self._config, self._adapter, self._progress = config, adapter, progress
        self._device = this_device()
        examples, self._padding = checked_examples(config, load_architecture(config.model))
        self._rows = examples.heldout[:MOST_ROWS]

    def merge(self, out: Path, more: float = 0.0) -> Losses:
        """Write the merged model to `out`, and compare.

        Args:
            more: bytes per weight that the disk needs room for besides, for what is made of the merged model.

        Raises: InvalidInput when it does not fit on the disk or cannot be written; then `out` is not made."""
        self._progress("measuring the adapter on the base model as it was trained")
        adapter, tokens = self._loss(load_adapted(self._config, self._adapter, self._device))
        self._progress(f"merging in {self._config.precision.dtype.name}")
        self._write(out, more)
        self._progress("measuring the merged model, loaded again")
        merged, _ = self._loss(self._loaded(without_quantisation(self._config), out))
        requantised = None
        if self._config.method.quantization is not Quantization.none:
            self._progress("measuring the merged model in 4 bit")
            requantised, _ = self._loss(self._loaded(self._config, out))
        return Losses(adapter, merged, requantised, len(self._rows), tokens)

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
        self._progress(f"measuring {file.name}, loaded again")
        has_template = load_tokenizer(self._config.model).chat_template is not None
        try:
            model = load_gguf(file, self._config, load_architecture(self._config.model), self._device)
        except UnreadableGguf as reason:
            return GgufCheck(None, str(reason), has_template)
        return GgufCheck(self._loss(model)[0], "", has_template)

    def _write(self, out: Path, more: float) -> None:
        """Merge into weights that are not quantised, and write them under their name at once."""
        model = load_adapted(without_quantisation(self._config), self._adapter, self._device).merge_and_unload()
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
        # DoRA's norms would be rounded
        config = replace(config, model=model, method=replace(config.method, use_dora=False))
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
