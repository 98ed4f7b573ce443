"""The loss in chunks against torch's own, and against the loss of the models it replaces."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine_models import VOCABULARY, adapted, furthest, loss_and_gradients, padded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab.composition.compose import CONF
from lora_lab.config import TrialConfig
from lora_lab.method_config import MethodConfig, OptimizerConfig, PrecisionConfig
from lora_lab.options import DType, ModelSource, Quantization, Weights
from lora_lab.outcome import Unsupported
from lora_lab.worker.data import IGNORED
from lora_lab.worker.engines import chunked_loss
from lora_lab.worker.engines.chunked_loss import chunk_rows, chunked_cross_entropy, use_chunked_loss
from lora_lab.worker.models import load_architecture, load_model
from lora_lab.worker.readback import read_back

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
]


@contextlib.contextmanager
def chunks_of(elements: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_loss, "CHUNK_ELEMENTS", elements)
        patch.setattr(chunked_loss, "_WIDER", 0)  # where the chunk is compiled
        yield


def drawn(rows: int, size: int, words: int, ignored: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=generator)
    weight = torch.randn(words, size, generator=generator)
    labels = torch.randint(words, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = IGNORED
    return hidden, weight, labels


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient of `factor` times it, by plain operations in these formats."""
    hidden = hidden.detach().requires_grad_()
    loss = cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum", ignore_index=IGNORED)
    (gradient,) = torch.autograd.grad(loss * factor, hidden)
    return loss.detach(), gradient


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    hidden = hidden.detach().requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, labels)
    assert loss.dtype is torch.float32
    (gradient,) = torch.autograd.grad(loss * factor, hidden)
    assert gradient.dtype is hidden.dtype
    return loss.detach(), gradient


def apart(one: Tensor, other: Tensor) -> float:
    """The norm of the difference as a share of the norm."""
    one, other = one.double(), other.double()
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


CASES = given(
    rows=st.integers(1, 40),
    size=st.integers(1, 24),
    words=st.integers(2, 60),
    ignored=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    elements=st.integers(1, 900),
    seed=st.integers(0, 10**6),
)


@CASES
def test_in_fp32_loss_and_gradient_are_torchs(
    rows: int, size: int, words: int, ignored: float, elements: int, seed: int
) -> None:
    made = drawn(rows, size, words, ignored, seed)
    with chunks_of(elements):
        loss, gradient = ours(*made, factor=0.37)
    theirs, slope = reference(*made, factor=0.37)
    torch.testing.assert_close(loss, theirs, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=2e-5)


@CASES
def test_in_bf16_they_are_as_near_the_truth_as_torchs_own(
    rows: int, size: int, words: int, ignored: float, elements: int, seed: int
) -> None:
    hidden, weight, labels = drawn(rows, size, words, ignored, seed)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    truth, slope = reference(hidden.double(), weight.double(), labels, factor=1 / 3)
    their_loss, theirs = reference(hidden, weight, labels, factor=1 / 3)
    with chunks_of(elements):
        loss, gradient = ours(hidden, weight, labels, factor=1 / 3)
    assert float((loss - truth).abs()) <= 2 * float((their_loss - truth).abs()) + 1e-3 * rows
    assert apart(gradient, slope) <= max(2 * apart(theirs, slope), 0.02)


@settings(max_examples=40)
@CASES
def test_under_autocast_it_calculates_as_a_linear_layer_would(
    rows: int, size: int, words: int, ignored: float, elements: int, seed: int
) -> None:
    hidden, weight, labels = drawn(rows, size, words, ignored, seed)
    low, gradient_low = ours(hidden.bfloat16(), weight.bfloat16(), labels)
    with chunks_of(elements), torch.autocast("cpu", torch.bfloat16):
        loss, gradient = ours(hidden, weight, labels)
        assert torch.is_autocast_enabled("cpu"), "and leaves autocast as it was"
    torch.testing.assert_close(loss, low, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, gradient_low.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("count", [3 * 257, 4095, 1021])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_share_of_a_step_is_not_rounded_to_16_bits(dtype: torch.dtype, count: int) -> None:
    """Trainer divides by the step's tokens. As a 16-bit number that share would be off by up to 0.2 percent, in the
    same direction for every gradient of the step."""
    hidden, weight, labels = drawn(400, 32, 60, 0.0, 5)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    factor = (512.0 if dtype is torch.float16 else 1.0) / count
    _, slope = reference(hidden.double(), weight.double(), labels, factor)
    _, gradient = ours(hidden, weight, labels, factor)
    along = float((gradient.double() * slope).sum() / (slope * slope).sum())
    assert along == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("scale", [65536.0, 1024.0, 64.0])
def test_small_fp16_gradients_do_not_vanish(scale: float) -> None:
    """A sure model: nearly all slopes of logits lie below 6e-8, the least that fp16 holds."""
    hidden, weight, labels = drawn(64, 32, 60, 0.2, 7)
    sure = labels.clamp(min=0)
    hidden = (weight[sure] * 0.75).half()
    weight = weight.half()
    factor = scale / 512
    _, slope = reference(hidden.double(), weight.double(), labels, factor)
    _, gradient = ours(hidden, weight, labels, factor)
    _, plain = reference(hidden, weight, labels, factor)
    assert bool(gradient.isfinite().all())
    assert apart(gradient, slope) <= max(0.01, 1.5 * apart(plain, slope))


def test_headroom_is_what_keeps_small_fp16_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The right word's logit is 16 and comes from one number of the hidden state alone: what the other numbers get,
    they get from wrong words, of which each has a ten-millionth."""
    hidden, weight, _ = drawn(8, 16, 400, 0.0, 7)
    labels = torch.zeros(8, dtype=torch.long)
    weight[:, 0], weight[0], weight[0, 0] = 0.0, 0.0, 4.0
    hidden = torch.cat([torch.full((8, 1), 4.0), hidden[:, 1:] * 0.1], dim=1).half()
    weight, factor = weight.half(), 65536 / 512
    logits = (hidden @ weight.t()).double()
    slope = logits.softmax(1)[:, 1:] @ weight[1:].double() * factor
    _, gradient = ours(hidden, weight, labels, factor)
    monkeypatch.setattr(chunked_loss, "_HEADROOM", 1.0)
    _, without = ours(hidden, weight, labels, factor)
    assert apart(gradient[:, 1:], slope[:, 1:]) < 0.005
    assert apart(without[:, 1:], slope[:, 1:]) > 0.05


def test_what_is_ignored_may_be_anything() -> None:
    """As with torch's own: a padded position whose hidden state overflowed costs nothing."""
    hidden, weight, labels = drawn(12, 8, 30, 0.0, 1)
    labels[5:] = IGNORED
    hidden[7], hidden[9, 0] = torch.nan, torch.inf
    theirs, _ = reference(hidden, weight, labels)
    assert bool(theirs.isfinite())
    loss, gradient = ours(hidden, weight, labels)
    torch.testing.assert_close(loss, theirs)
    assert bool(gradient.isfinite().all())


@given(rows=st.integers(1, 10**6), words=st.integers(1, 300_000), hidden_size=st.integers(0, 8192))
def test_chunks_are_few_aligned_and_small_enough(rows: int, words: int, hidden_size: int) -> None:
    size = chunk_rows(rows, words, hidden_size)
    most = max(1, max(2**26, rows * min(8 * hidden_size, words // 4)) // words)
    assert 1 <= size <= most
    chunks = -(-rows // size)
    assert size % 64 == 0 or size == -(-rows // chunks), "aligned, or even"
    aligned = max(most // 64 * 64, min(most, 63))
    assert -(-rows // most) <= chunks <= -(-rows // aligned), "no more chunks than needed"
    assert rows - size * (chunks - 1) > 0


class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_the_logits_never_exist_whole() -> None:
    model = adapted(vocab_size=4096)
    batch = padded([60, 41, 64, 50], 64)
    with Sizes() as plain:  # type: ignore[no-untyped-call]
        model(**batch).loss.backward()
    assert plain.largest >= 4 * 64 * 4096
    use_chunked_loss(model)
    with chunks_of(40 * 4096), Sizes() as seen:  # type: ignore[no-untyped-call]
        model(**batch).loss.backward()
    assert seen.largest <= max(40, 64) * 4096, "a chunk's logits, or the head itself"


@pytest.mark.parametrize("counted", [None, 7, torch.tensor(300)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3", "phi3"])
def test_a_models_loss_and_gradients_stay_what_they_were(kind: str, counted: Any) -> None:
    plain, chunked = adapted(kind), adapted(kind)
    use_chunked_loss(chunked)
    batch: dict[str, Any] = padded([40, 13, 64], 64)
    if counted is not None:
        batch["num_items_in_batch"] = counted
    loss, gradients = loss_and_gradients(plain, batch)
    with chunks_of(50 * VOCABULARY):
        found, slopes = loss_and_gradients(chunked, batch)
    assert found == pytest.approx(loss, rel=1e-5)
    assert furthest(slopes, gradients) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_trained_with_the_whole_model_gets_its_gradient(tied: bool, dtype: torch.dtype) -> None:
    plain, chunked = (adapted(tie_word_embeddings=tied).unload().requires_grad_(True) for _ in range(2))
    use_chunked_loss(chunked)
    batch = padded([40, 13, 64], 64)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32), chunks_of(50 * VOCABULARY):
        losses = [model(**batch).loss for model in (plain, chunked)]
    for loss in losses:
        loss.backward()
    rounding = 1e-4 if dtype is torch.float32 else 0.02
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=rounding)
    for one, other in zip(plain.parameters(), chunked.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert apart(other.grad, one.grad) < rounding
    assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) == tied


class Formats(TorchDispatchMode):
    """Notes the formats of new tensors of one shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self._shape = shape
        self.formats: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.shape == self._shape:
            self.formats.add(found.dtype)
        return found


@pytest.mark.parametrize(("chunks", "in_fp32"), [(1, False), (5, False), (60, False), (70, True)])
def test_the_gradient_of_a_head_in_bf16_is_as_near_as_its_format_allows(
    chunks: int, in_fp32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against fp64. A sum that is rounded once is 0.11 % away (2^-9 / sqrt 3), and one of n roundings by at most sqrt n
    times as much. No copy of it in fp32 is made, unless there are very many chunks."""
    monkeypatch.setattr(chunked_loss, "_PIECE", 1000)
    hidden, weight, labels = drawn(420, 48, 300, 0.1, seed=chunks)
    hidden, weight = hidden.bfloat16().requires_grad_(), (weight / 4).bfloat16().requires_grad_()
    with chunks_of(300 * 420 // chunks), Formats(weight.shape) as seen:
        chunked_cross_entropy(hidden, weight, labels, chunked_loss.chunk_loss_of_trained).mul(1 / 377).backward()
    assert weight.grad is not None
    exact = weight.detach().double().requires_grad_()
    whole = cross_entropy(hidden.detach().double() @ exact.t(), labels, reduction="sum", ignore_index=IGNORED)
    whole.mul(1 / 377).backward()
    assert exact.grad is not None
    bound = 0.0011 * (chunks if not in_fp32 else 1) ** 0.5
    assert apart(weight.grad, exact.grad) < 0.004 + bound  # probabilities are rounded to bf16 too
    assert (torch.float32 in seen.formats) == in_fp32


def test_without_labels_and_for_other_instances_nothing_changes() -> None:
    model, other = adapted(), adapted(seed=1)
    causal = model.get_base_model()
    kind_forward = type(causal).forward
    batch = padded([10, 20], 20)
    asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**asked).logits
    use_chunked_loss(model)
    torch.testing.assert_close(model(**asked).logits, logits, rtol=0, atol=0)
    assert type(causal).forward is kind_forward
    assert "forward" not in other.get_base_model().__dict__
    assert other(**batch).logits is not None
    output = model(**batch)
    assert getattr(output, "logits", None) is None
    assert bool(output.loss.isfinite())


@pytest.mark.parametrize("was_training", [True, False])
def test_the_mode_is_left_as_it_was(was_training: bool) -> None:
    model = adapted(lora={"lora_dropout": 0.1}).train(was_training)
    use_chunked_loss(model)
    assert {module.training for module in model.modules()} == {was_training}


SMALL_GEMMA: dict[str, Any] = {"sliding_window": 64, "query_pre_attn_scalar": 16}
OTHER_LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "softcapped": ("gemma2", {"final_logit_softcapping": 3.0, **SMALL_GEMMA}),
    "scaled": ("granite", {"logits_scaling": 8.0}),
    "scaled otherwise": ("cohere", {"logit_scale": 0.0625}),
}


@pytest.mark.parametrize("head", [20.0, 1.0], ids=["sure", "fresh weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(OTHER_LOSSES))
def test_a_model_that_does_more_with_its_logits_is_refused(name: str, dtype: torch.dtype, head: float) -> None:
    kind, own = OTHER_LOSSES[name]
    model = adapted(kind, head=head, attention="eager", **own).to(dtype)
    with pytest.raises(Unsupported, match="chunked_loss=false"):
        use_chunked_loss(model)
    assert "forward" not in model.get_base_model().__dict__, "it is left as it was"


def test_an_auxiliary_loss_is_not_dropped_in_silence() -> None:
    own: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
    own |= {"output_router_logits": True, "router_aux_loss_coef": 0.02}
    model = adapted("mixtral", lora={"target_modules": ["q_proj", "v_proj"]}, **own).to(torch.bfloat16)
    with pytest.raises(Unsupported, match="chunked_loss=false"):
        use_chunked_loss(model)


def test_a_head_that_is_trained_next_to_adapters_or_has_a_bias_or_an_adapter_is_refused() -> None:
    trained = adapted()
    trained.get_output_embeddings().weight.requires_grad_(True)
    biased = adapted("phi")
    assert biased.get_output_embeddings().bias is not None
    lora = ["q_proj", "lm_head"]
    for model in (
        trained,
        biased,
        adapted(lora={"target_modules": lora}),
        adapted(lora={"modules_to_save": ["lm_head"]}),
    ):
        with pytest.raises(Unsupported, match="chunked_loss=false"):
            use_chunked_loss(model)


@pytest.mark.parametrize("was_training", [True, False])
def test_four_bit_layers_are_not_repacked_by_the_check(was_training: bool, tmp_path: Path) -> None:
    from lora_lab.worker.data import Collator, Example
    from lora_lab.worker.training import make_trainer

    torch.manual_seed(0)
    config = TrialConfig(
        optimizer=OptimizerConfig(optim="adamw_torch"),
        precision=PrecisionConfig(dtype=DType.bf16),
        method=MethodConfig(quantization=Quantization.nf4, double_quantization=True),
    )
    config.model.source, config.model.weights = ModelSource.tiny, Weights.random
    config.model.architecture = yaml.safe_load((CONF / "model/tiny.yaml").read_text())["architecture"]
    model = load_model(config, load_architecture(config.model), torch.device("cpu"))
    model.train(was_training)
    packed = {n: p.detach().clone() for n, p in model.named_parameters() if p.dtype is torch.uint8}
    assert packed
    use_chunked_loss(model)
    now = dict(model.named_parameters())
    for name, weight in packed.items():
        assert torch.equal(now[name], weight), name
        assert not getattr(now[name].quant_state, "packing_format_for_cpu", False), name
    examples = [Example(list(range(3, 40)), [IGNORED] * 4 + list(range(7, 40))) for _ in range(4)]
    trainer = make_trainer(config, model, examples, Collator(258), [], str(tmp_path), torch.device("cpu"))
    trainer.create_optimizer()
    facts = read_back(trainer, frozenset({"flash_cpu"}))
    assert (facts["quantization"], facts["double_quantization"]) == ("nf4", "True")
