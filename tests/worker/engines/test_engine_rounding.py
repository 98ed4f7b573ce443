"""Compiled layers and the chunked loss round elsewhere than eager does, and no worse: both beside fp32."""

import copy
from typing import Any

import pytest
import torch
from conftest import compiles
from engine_models import adapted, adapters, loss_and_gradients, padded

from lora_lab.worker.engines.attention_masks import leave_out_masks
from lora_lab.worker.engines.chunked_loss import use_chunked_loss
from lora_lab.worker.engines.compiled import compile_layers

pytestmark = [
    compiles,
    pytest.mark.nightly,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


def in_bf16(model: Any) -> Any:
    """Frozen weights in bf16, adapters in fp32, as a trial has them."""
    made = copy.deepcopy(model).to(torch.bfloat16)
    for parameter in adapters(made).values():
        parameter.data = parameter.data.float()
    return made


def test_compiled_gradients_are_as_near_to_fp32_as_eagers() -> None:
    exact = adapted("qwen2", hidden_size=128, head_dim=32)
    eager, compiled = in_bf16(exact), in_bf16(exact)
    for name, parameter in exact.named_parameters():  # the same frozen weights, after their rounding
        parameter.data = dict(eager.named_parameters())[name].data.float()
    use_chunked_loss(compiled)
    leave_out_masks(compiled)
    compile_layers(compiled)
    off = {"eager": 0.0, "compiled": 0.0}
    for seed in range(4):
        batch = padded([96, 96], 96, seed=seed)
        _, truth = loss_and_gradients(exact, batch)
        size = sum(float(gradient.square().sum()) for gradient in truth.values())
        for name, model in (("eager", eager), ("compiled", compiled)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            found = {name: parameter.grad for name, parameter in adapters(model).items()}
            off[name] += sum(float((found[n] - truth[n]).square().sum()) for n in truth) / size
            model.zero_grad()
    assert 0 < off["compiled"] < 1.3 * off["eager"]
    assert off["eager"] < 4 * 0.05**2, "bf16 has eight bits: else something other than rounding is at work"
