"""What the look through a loaded model finds: leaks between packed documents, tokens that see later ones, parts that
text does not reach."""

from typing import Any

import pytest
import torch
from odd_models import SHAPES, trial
from torch import nn

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.method_config import PrecisionConfig
from lora_lab.options import Attention, Batching, DType
from lora_lab.worker.models import load_architecture, load_model
from lora_lab.worker.probe import Seen, judge, look_through

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning"),
]
CPU = torch.device("cpu")
LEAKING = {"lfm2", "gpt_oss", "granitemoehybrid", "falcon", "mamba"}
"""Models in which transformers makes no mask from position_ids, or whose state runs on from token to token."""


def packed(name: str, dtype: DType = DType.fp32) -> TrialConfig:
    config = trial(name, target_modules=["in_proj"] if name == "mamba" else ["all-linear"])
    config.data.batching, config.precision = Batching.packed, PrecisionConfig(dtype=dtype)
    return config


def load(config: TrialConfig, warn: Any = lambda _: None) -> Any:
    return load_model(config, load_architecture(config.model), CPU, warn)


def moved_by_another_document(model: Any) -> float:
    """How far the second document's logits move when the first one is another."""
    positions = torch.tensor([[*range(20), *range(15)]])
    second = torch.randint(3, 96, (15,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [torch.tensor([[*first, *second]]) for first in ([5] * 20, list(range(40, 60)))]
    with torch.no_grad():
        one, other = (model(input_ids=row, position_ids=positions).logits[0, 20:] for row in rows)
    return float((one - other).abs().max())


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"bert"}))
def test_packed_is_refused_just_where_documents_see_each_other(name: str) -> None:
    config = packed(name)
    if name in LEAKING:
        with pytest.raises(InvalidInput, match=r"data\.batching=longest"):
            load(config)
        config.data.batching = Batching.longest
        assert load(config) is not None
    else:
        # a mixture of experts multiplies in other groups then, which rounds otherwise
        assert moved_by_another_document(load(config).eval()) < 1e-6


@pytest.mark.parametrize("attention", [Attention.sdpa, Attention.eager])
@pytest.mark.parametrize("dtype", [DType.fp32, DType.bf16])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3"])
def test_no_format_makes_a_sound_model_look_as_if_it_leaked(name: str, dtype: DType, attention: Attention) -> None:
    config = packed(name, dtype)
    config.attention = attention
    model = load(config).get_base_model()
    seen = look_through(model, config, CPU, getattr(torch, dtype.value))
    assert (seen.later, seen.other_document) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize(("size", "refused"), [(0.0, False), (1e-8, False), (1e-3, True), (1.0, True)])
def test_a_small_leak_is_seen(name: str, size: float, refused: bool) -> None:
    """A share of every token's state goes to the next one, whichever document it is in."""
    torch.manual_seed(0)  # how much of a state reaches the losses depends on the weights
    config = packed(name)
    model = load(config).get_base_model()

    class Leaking(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *inputs: Any, **named: Any) -> Any:
            out = self.inner(*inputs, **named)
            state = out[0] if isinstance(out, tuple) else out
            # ten tokens on: from one document's end into the next
            state = state + size * torch.roll(state, 10, dims=1) * (torch.arange(state.shape[1]) >= 10)[:, None]
            return (state, *out[1:]) if isinstance(out, tuple) else state

    layers = model.transformer.h if name == "gpt2" else model.model.layers
    layers[0] = Leaking(layers[0])
    seen = look_through(model, config, CPU, torch.float32)
    assert seen.later == 0.0
    assert size / 10 <= (seen.other_document or 0.0) <= 10 * size
    if refused:
        with pytest.raises(InvalidInput, match="sees the one before it"):
            judge(seen, config, name)
    else:
        assert judge(seen, config, name) == []


@pytest.mark.parametrize("batching", [Batching.longest, Batching.seq_len])
def test_a_model_that_sees_later_tokens_is_refused(batching: Batching) -> None:
    config = trial("bert")
    config.data.batching = batching
    with pytest.raises(InvalidInput, match="not causal"):
        load(config)


def test_a_model_whose_logits_have_no_gradient_is_said_and_not_judged() -> None:
    [said] = judge(Seen(None, None, []), packed("llama"), "mine")
    assert "could not be found out" in said


def test_adapters_are_put_only_where_text_runs() -> None:
    warned: list[str] = []
    model = load(trial("gemma3"), warned.append)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert not [name for name in names if "language_model" not in name]
    assert ["vision_tower" in line and "multi_modal_projector" in line for line in warned] == [True]
    with pytest.raises(InvalidInput, match="no adapter"):
        load(trial("gemma3", target_modules=["fc1"]))
    ids = torch.randint(3, 90, (2, 8))
    model(input_ids=ids, token_type_ids=torch.zeros_like(ids), labels=ids).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "granitemoehybrid", "qwen3_moe"])
def test_text_reaches_every_part_of_a_text_model(name: str) -> None:
    """Experts that these few tokens did not choose among them."""
    warned: list[str] = []
    load(trial(name), warned.append)
    assert warned == []


def test_the_look_is_short_however_long_the_rows_are() -> None:
    """Over a whole row, the logits would take more memory than the training does."""
    config = trial("llama")
    config.data.batching, config.seq_len = Batching.seq_len, 4096
    model = load(config).get_base_model()
    widths: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    look_through(model, config, CPU, torch.float32)
    assert 12 < widths[0] < 64


def test_the_look_leaves_nothing_behind() -> None:
    config = trial("llama")
    model = load(config).get_base_model()
    before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    state, training = torch.get_rng_state(), model.training
    look_through(model, config, CPU, torch.float32)
    assert {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == training
    assert not [hook for module in model.modules() for hook in module._forward_hooks]
