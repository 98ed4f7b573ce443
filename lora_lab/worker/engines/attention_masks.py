"""Make attention masks depend on a batch's shape and not on its content.

transformers looks at the padding, which waits for the device, and then passes attention a mask or none: two kernels,
and two compilations. While a CUDA graph is recorded it can't look, and always makes one.
"""

import functools
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_lab.worker.trainables.trainable import base_of

WITHOUT_MASK = "_without_mask"
WITH_MASK = "_with_mask"
"""Suffixes of attention implementations that never, or always, get a mask."""
AS_NEEDED = "as needed"


def leave_out_masks(model: Any) -> None:
    """Run torch's attention as causal, without a mask. This is right for rows that are padded on the right: a token
    never attends to later ones, and padding has no label. transformers makes no mask for an attention function without
    a mask function of its own (masking_utils.py)."""
    AttentionInterface.register(f"sdpa{WITHOUT_MASK}", sdpa_attention_forward)
    base_of(model).set_attn_implementation(f"sdpa{WITHOUT_MASK}")


def always_mask(model: Any) -> None:
    """Pass torch's attention a mask in every batch: for packed rows, and layers with a window."""
    AttentionInterface.register(f"sdpa{WITH_MASK}", sdpa_attention_forward)
    AttentionMaskInterface.register(f"sdpa{WITH_MASK}", _whole_mask)
    base_of(model).set_attn_implementation(f"sdpa{WITH_MASK}")


@functools.wraps(sdpa_mask)
def _whole_mask(*args: Any, **kwargs: Any) -> Any:
    mask = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
    return mask.contiguous()  # a mask that is the same for all rows is a view, which compiled code distinguishes


def attention_of(model: Any) -> tuple[str, str]:
    """Return the attention implementation by transformers' name, and when it gets a mask: never, always, as needed."""
    name = str(model.config._attn_implementation)
    for ending, masks in ((WITHOUT_MASK, "never"), (WITH_MASK, "always")):
        if name.endswith(ending):
            return name.removesuffix(ending), masks
    return name, AS_NEEDED


def needs_no_mask(architecture: Any, seq_len: int) -> bool:
    """Return True where every layer of the model attends to all earlier tokens."""
    window = getattr(architecture, "sliding_window", None)
    kinds = set(getattr(architecture, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        return False
    slides = "sliding_attention" in kinds or (not kinds and window is not None)
    return not slides or (window is not None and window >= seq_len)
