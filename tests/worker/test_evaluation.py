"""Held-out loss: one number whatever the batch, and a model that is none the worse for it."""

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import CausalLMOutput

from lora_lab.composition.compose import CONF
from lora_lab.config import TrialConfig
from lora_lab.method_config import MethodConfig, OptimizerConfig, PrecisionConfig
from lora_lab.options import DType, ModelSource, Quantization, Weights
from lora_lab.worker.data import IGNORED, Example
from lora_lab.worker.engines.chunked_loss import use_chunked_loss
from lora_lab.worker.evaluation import Losses, digest_of, row_losses
from lora_lab.worker.general_text import general_examples, general_rows
from lora_lab.worker.models import load_architecture, load_model
from lora_lab.worker.tiny_tokenizer import tiny_tokenizer

# peft 0.21 still asks transformers 5.23 by the older name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

CPU = torch.device("cpu")
PAD = 258


def tiny(dtype: DType, quantization: Quantization = Quantization.none, dropout: float = 0.0) -> PeftModel:
    torch.manual_seed(0)
    config = TrialConfig(
        optimizer=OptimizerConfig(optim="adamw_torch"),
        precision=PrecisionConfig(dtype=dtype),
        method=MethodConfig(
            quantization=quantization,
            double_quantization=quantization is not Quantization.none,
            dropout=dropout,
        ),
    )
    config.model.source, config.model.weights = ModelSource.tiny, Weights.random
    config.model.architecture = yaml.safe_load((CONF / "model/tiny.yaml").read_text())["architecture"]
    return load_model(config, load_architecture(config.model), CPU)


def examples() -> list[Example]:
    """Lengths and shares of trained tokens so uneven that a mean of batch means is far off."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length, prompt in [(50, 2), (9, 7), (30, 29), (64, 60), (12, 1), (40, 20), (3, 2)]:
        ids = torch.randint(PAD, (length,), generator=generator).tolist()
        made.append(Example(ids, [IGNORED] * prompt + ids[prompt:]))
    return made


def evaluate(model: PeftModel, batch_size: int, dtype: DType) -> Losses:
    done: list[tuple[int, int]] = []
    found = row_losses(model, examples(), batch_size, PAD, dtype, CPU, lambda a, b: done.append((a, b)))
    assert done[-1] == (7, 7), "progress ends at the end"
    assert done == sorted(set(done))
    return found


def by_hand(model: PeftModel) -> Losses:
    found = Losses([], [])
    model.eval()
    for example in examples():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.ids])).logits[0].double()
        chances = logits.log_softmax(-1)
        trained = [(place, label) for place, label in enumerate(example.labels[1:]) if label != IGNORED]
        found.nats.append(-sum(float(chances[place, label]) for place, label in trained))
        found.tokens.append(len(trained))
    return found


def test_the_loss_is_that_of_the_tokens_whatever_the_batch_size() -> None:
    model = tiny(DType.fp32)
    # heads and embeddings this small say nearly the same of every token; a trained model does not
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    expected = by_hand(model)
    for batch_size in (1, 2, 5):
        found = evaluate(model, batch_size, DType.fp32)
        assert found.tokens == expected.tokens
        assert found.nats == pytest.approx(expected.nats, rel=1e-5)
        assert found.mean == pytest.approx(sum(expected.nats) / sum(expected.tokens), rel=1e-5)


def test_a_row_has_its_own_loss_however_the_model_calculates_it() -> None:
    """By transformers' function, called by name or by place, in chunks, or by the model's own code, which gives one
    mean over the batch."""
    model = tiny(DType.fp32)
    expected = evaluate(model, 3, DType.fp32)
    causal = model.get_base_model()
    with_function = causal.forward

    def by_itself(labels: Tensor, **inputs: Tensor) -> CausalLMOutput:
        logits = with_function(**inputs).logits
        flat = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        return CausalLMOutput(loss=flat)

    def by_place(labels: Tensor, **inputs: Tensor) -> CausalLMOutput:
        return CausalLMOutput(loss=causal.loss_function(with_function(**inputs).logits, labels, PAD + 1))

    causal.forward = by_place
    assert evaluate(model, 3, DType.fp32).nats == pytest.approx(expected.nats, rel=1e-5)
    causal.forward = by_itself
    assert evaluate(model, 3, DType.fp32).nats == pytest.approx(expected.nats, rel=1e-5)
    del causal.forward
    use_chunked_loss(model)
    assert evaluate(model, 3, DType.fp32).nats == pytest.approx(expected.nats, rel=1e-5)
    assert "_loss_function" not in causal.__dict__


def test_the_digest_is_of_ids_and_labels() -> None:
    rows = examples()
    assert digest_of(rows) == digest_of(examples())
    other = Example(rows[0].ids, [IGNORED, *rows[0].labels[1:-1], IGNORED])
    assert len({digest_of(rows), digest_of(rows[1:]), digest_of([other, *rows[1:]])}) == 3


def test_general_text_is_predicted_whole_and_cut() -> None:
    config = TrialConfig(seq_len=64)
    assert general_rows(config) == 0, "a window takes no longer for it"
    config.train.epochs = 1.0
    rows = general_examples(config, tiny_tokenizer(), 259)
    assert len(rows) == general_rows(config) == 32
    assert all(len(row.ids) == 64 and row.trained == 63 for row in rows)
    assert general_examples(config, tiny_tokenizer(), 5) == [], "no token without an embedding"
    config.measure.general_rows = 0
    assert general_rows(config) == 0


def test_adapters_and_modes_are_left_as_they_were() -> None:
    model = tiny(DType.fp32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for mode in (True, False):
        model.train(mode)
        evaluate(model, 2, DType.fp32)
        assert {module.training for module in model.modules()} == {mode}
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off() -> None:
    model = tiny(DType.fp32, dropout=0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.train()
    assert evaluate(model, 2, DType.fp32) == evaluate(model, 2, DType.fp32)


def packed(model: PeftModel) -> dict[str, tuple[bytes, tuple[int, ...], str, dict[str, object]]]:
    """Everything that 4-bit weights are made of: the packed bytes and all that is needed to read them."""
    found = {}
    for name, weight in model.named_parameters():
        state = getattr(weight, "quant_state", None)
        if state is None:
            continue
        rest: dict[str, object] = {
            key: value.tolist() if isinstance(value, Tensor) else value
            for key, value in state.as_dict(packed=False).items()
        }
        rest |= {"nested": state.nested, "cpu": getattr(state, "packing_format_for_cpu", False)}
        found[name] = (weight.detach().numpy().tobytes(), tuple(weight.shape), str(weight.dtype), rest)
    return found


@pytest.mark.parametrize("quantization", [Quantization.nf4, Quantization.fp4])
@pytest.mark.parametrize("was_training", [True, False])
def test_four_bit_weights_are_not_repacked_and_still_train(quantization: Quantization, was_training: bool) -> None:
    """bitsandbytes repacks them for inference on some CPUs, for good, and training after that is wrong."""
    model = tiny(DType.bf16, quantization)
    model.train(was_training)
    before = packed(model)
    assert len(before) == 14, "every linear layer but the head"
    first = evaluate(model, 2, DType.bf16)
    assert packed(model) == before

    model.train()
    ids = torch.tensor([examples()[0].ids])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert packed(model) == before
    gradients = {
        name: parameter.grad for name, parameter in model.named_parameters() if name.endswith("lora_B.default.weight")
    }
    assert len(gradients) == 14
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert bool(gradient.isfinite().all()), name
        assert bool(gradient.any()), name
    assert evaluate(model, 2, DType.bf16) == first
