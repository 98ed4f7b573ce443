"""Count a trial's floating-point operations by formulas over the model's weights and the counted tokens.

A product with N weights takes 2N operations per token, one multiplication and one addition per weight (Kaplan et al.,
arXiv 2001.08361, section 2.1); its backward takes as many for the gradient of its input, and as many again for that
of its weights, which frozen weights do not have. Attention has two products over a square of tokens in its forward
(scores, values) and four in its backward. `benchmarks/flop_check.py` compares all of this with torch's own count.

Left out, as is usual: norms, activations, softmax, dequantizing 4-bit weights, the optimizer. So is what DoRA adds to
LoRA.
"""

import math

from lora_lab.events import MatmulRate, ModelCounted, Step
from lora_lab.telemetry.window import Window

FUSED = frozenset({"flash", "flash_cpu", "memory_efficient", "cudnn"})
"""Attention kernels that do not store the scores; their backward calculates them again."""
UNFUSED = frozenset({"math"})

PASSES = {True: 3.5, False: 3.0}
"""Attention's forward and backward in forwards, fused or not: (2 + 5) / 2 products, as torch's FlopCounterMode counts
flash (torch/utils/flop_counter.py, sdpa_backward_flop_count), and (2 + 4) / 2."""

_NO_WINDOW = "the measured window was not completed"
_NO_COUNT = "the model's weights were not counted"
_NO_LENGTHS = "the steps do not say how long their documents are"
_NO_RATE = "the device's matrix product rate was not measured"
_TILES = "MLPs in tiles are calculated more than once, and how often was not counted"

_OF_THE_MODEL = (
    "flops/per_token",
    "flops/per_token_products",
    "flops/per_token_attention_causal",
    "flops/per_token_attention_square",
    "flops/per_token_recomputation",
    "flops/model_tflop_per_second",
    "flops/mfu",
)
_OF_THE_DEVICE = ("flops/hardware_tflop_per_second", "flops/hfu")


def flops(
    counted: ModelCounted | None,
    window: Window | None,
    repeated: float | None,
    attention_kernel: str,
    rate: MatmulRate | None,
    devices: int = 1,
) -> tuple[dict[str, float], dict[str, str]]:
    """Return figures by metric name, and the reason for every one that is missing.

    The model's work (`per_token`, `model_tflop_per_second`, `mfu`) is what the training needs for the real
    tokens: no padding, no recomputation, each token attending to its own document so far, whatever kernel ran. The
    device's (`hardware_tflop_per_second`, `hfu`) is all that it had to do. All of `per_token*` is in operations per
    real token, over the window's steps; skipped steps did the same work.

    Args:
        counted: the model's weights; None when the worker did not count them.
        window: the measured steps; None when there is no window.
        repeated: share of the decoder layers whose forward gradient checkpointing calculates once more in the
            backward, see `repeated_share`; None where MLPs are in tiles, which are calculated more than once by
            themselves. A compiler's own choice is not known: with engine=compile and graph it may keep some of that,
            or recompute more.
        attention_kernel: the read-back fact of that name, as in "flash" or "flash, memory_efficient".
        rate: the device's best rate in operations per second; None when it was not measured.
        devices: how many such devices share the trial; `mfu` and `hfu` are of all of them.
    """
    metrics: dict[str, float] = {}
    absent: dict[str, str] = {}
    if rate is None:
        absent |= dict.fromkeys(("flops/mfu", "flops/hfu", "flops/matmul_tflop_per_second"), _NO_RATE)
    else:
        metrics["flops/matmul_tflop_per_second"] = rate.flops_per_second / 1e12
    why = ""
    if window is None:
        why = _NO_WINDOW
    elif counted is None:
        why = _NO_COUNT
    elif not all(step.attended and step.attended_slots for step in window.steps):
        why = _NO_LENGTHS
    if why or counted is None or window is None:
        return metrics, absent | dict.fromkeys((*_OF_THE_MODEL, *_OF_THE_DEVICE), why)

    real = sum(step.real for step in window.steps)
    squares = sum(step.attended for step in window.steps)
    square = attention_forward(counted, squares) * PASSES[False]
    causal = square / 2
    work = products(counted, real) + causal
    again = repeated_products(counted, real) + attention_forward(counted, squares) / 2
    metrics |= {
        "flops/per_token": work / real,
        "flops/per_token_products": products(counted, real) / real,
        "flops/per_token_attention_causal": causal / real,
        "flops/per_token_attention_square": square / real,
        "flops/model_tflop_per_second": work / window.seconds / 1e12,
    }
    if rate is not None:
        metrics["flops/mfu"] = work / window.seconds / (devices * rate.flops_per_second)

    if repeated is None:
        return metrics, dict.fromkeys((*_OF_THE_DEVICE, "flops/per_token_recomputation"), _TILES) | absent
    metrics["flops/per_token_recomputation"] = repeated * again / real
    kernels = frozenset(attention_kernel.split(", "))
    if not (kernels <= FUSED or kernels <= UNFUSED):
        seen = "was not seen" if attention_kernel == "not seen" else f"is {attention_kernel}, whose cost is not known"
        return metrics, dict.fromkeys(_OF_THE_DEVICE, f"the attention kernel {seen}") | absent
    fused = kernels <= FUSED
    done = sum(_hardware(counted, step, repeated, fused) for step in window.steps)
    metrics["flops/hardware_tflop_per_second"] = done / window.seconds / 1e12
    if rate is not None:
        metrics["flops/hfu"] = done / window.seconds / (devices * rate.flops_per_second)
    return metrics, absent


def repeated_share(checkpointing: str, layers: int | None) -> float:
    """Return the share of decoder layers that are calculated twice, from the read-back fact `gradient_checkpointing`.

    Args:
        checkpointing: none, full, selective or offloaded; False or True in trials from before there were more than two.
        layers: how many there are. Of those, `selective` has the first, the third, ...: every_n_layers=2 in
            transformers, which may be one more than half. Half where the number is not known.
    """
    if checkpointing == "selective":
        return math.ceil(layers / 2) / layers if layers else 0.5
    return 1.0 if checkpointing in ("full", "offloaded", "True") else 0.0


def products(counted: ModelCounted, tokens: int) -> float:
    """Return the operations of all products with weights, forward and backward: (4 x frozen + 6 x trained) per token.

    A frozen weight needs the forward and its input's gradient, 2 + 2; a trained one its own gradient too, 2 + 2 + 2.
    Full training takes 6 for each. The first layer needs no gradient of its input and is counted as if it did:
    too much by 2 operations per token for each weight of its products q, k and v.
    """
    return float(tokens * (4 * counted.frozen + 6 * counted.trainable))


def repeated_products(counted: ModelCounted, tokens: int) -> float:
    """Return the operations of products that gradient checkpointing repeats: the forward of the decoder layers,
    2 x (their frozen + their trained weights) per token. The head lies outside them."""
    trained = counted.trainable if counted.trainable_in_layers is None else counted.trainable_in_layers
    return float(tokens * 2 * (counted.frozen_in_layers + trained))


def attention_forward(counted: ModelCounted, squares: int) -> float:
    """Return the operations of attention's forward over whole squares: 4 x T x T x (query heads x head size), over the
    layers, for rows of T tokens; two products of 2 x T x T x width each. Causal attention needs half.

    Args:
        counted: the model's weights.
        squares: sum of T x T over the rows.
    """
    return 4.0 * squares * counted.attention_width


def _hardware(counted: ModelCounted, step: Step, repeated: float, fused: bool) -> float:
    """Return the operations that a step took on the device. A fused kernel leaves out what lies after a token; but
    where a row is padded or holds several documents, transformers passes a mask (masking_utils.py,
    _ignore_causal_mask_sdpa), and with one the kernel works through the whole square."""
    whole = not fused or step.attended < step.attended_slots
    forward = attention_forward(counted, step.attended_slots) / (1 if whole else 2)
    done = products(counted, step.slots) + forward * PASSES[fused]
    return done + repeated * (repeated_products(counted, step.slots) + forward)
