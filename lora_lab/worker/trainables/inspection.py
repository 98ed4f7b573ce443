"""Read from a live model and its optimizer which adapters are trained, and how."""

from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.vera import VeraLayer

from lora_lab.method_config import MethodConfig
from lora_lab.worker.trainables.start import lora_layers, start_of
from lora_lab.worker.trainables.tokens import trained_token_count


def adapter_facts(model: Any, optimizer: Any) -> dict[str, str]:
    """Return facts by name, as plain text. How A and B started and learn is not said where there are none."""
    matrices = [
        (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in lora_layers(model).values()
    ]
    kinds = {"vera": VeraLayer, "lora": LoraLayer}
    found = [name for name, kind in kinds.items() if any(isinstance(module, kind) for module in model.modules())]
    facts = {
        "adapters": ", ".join(found) or "none",
        "adapters_trained_tokens": str(trained_token_count(model)),
        "adapters_frozen_a": str(bool(matrices) and not any(a.requires_grad for a, _ in matrices)),
    }
    if matrices:
        facts["adapters_start"] = start_of(model).seen
    rates = {id(p): group.get("initial_lr", group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    ratios = {f"{rates[id(b)] / rates[id(a)]:.6g}" for a, b in matrices if id(a) in rates and id(b) in rates}
    if ratios:
        facts["adapters_b_learning_rate_ratio"] = ", ".join(sorted(ratios))
    return facts


def adapter_differences(facts: dict[str, str], method: MethodConfig) -> list[str]:
    """Return what is not as a method with adapters asks for, a sentence each."""
    ratio = 1.0 if method.b_learning_rate_ratio is None else method.b_learning_rate_ratio
    asked = {
        "adapters": method.kind.name,
        "adapters_trained_tokens": str(len(set(method.trained_tokens))),
        "adapters_frozen_a": str(method.freeze_a),
        "adapters_start": method.init.name,
        "adapters_b_learning_rate_ratio": f"{ratio:.6g}",
    }
    return [
        f"{key}: asked for {value}, got {facts[key]}"
        for key, value in asked.items()
        if key in facts and facts[key] != value
    ]
