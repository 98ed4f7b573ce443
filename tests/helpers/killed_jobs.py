"""A job that trains every weight, once whole, and once killed in its third step and resumed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_trials import train

from lora_lab.base_weights import MODEL
from lora_lab.config import TrainConfig, TrialConfig
from lora_lab.events import Event, Step
from lora_lab.worker.trial import run_trial


def assert_it_goes_on_to_the_same_weights(config: TrialConfig, folder: Path) -> None:
    config = replace(config, train=TrainConfig(max_steps=4, checkpoint_every=2, eval_every=2, warmup=0))

    def killed(event: Event) -> None:
        if isinstance(event, Step) and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(config, folder / "cut", killed)
    for name, asked in (("whole", config), ("cut", replace(config, resume=True))):
        train(asked, folder / name)
    whole, again = (load_file(folder / name / MODEL / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
