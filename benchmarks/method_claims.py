"""Check what GaLore's and LOMO's papers say of memory, by live tensors of trials with method=full.

    python -m benchmarks.method_claims OUT                    a 7B model's shapes with 4 of its 32 layers, batch 1 x 256
    python -m benchmarks.method_claims OUT --layers 8         with more layers; AdamW with all 32 takes 104 GiB
    python -m benchmarks.method_claims OUT --held-in bf16     method=full_bf16

Writes OUT/method_claims.json. Optimizer state and peaks are measured with these layers. What the whole model takes is
calculated by the rules of lora_lab.fit, and how far these are off is measured with LAYERS layers, too. Few layers
suffice: GaLore decomposes every matrix in its first step, for seconds each.

Without a card it is a dry run with the tiny model: state is measured, peaks are not, and no verdict is given.

The papers hold weights, gradients and moments in bf16. With fp32 lora_lab keeps a bf16 copy of each weight for its
products (autocast). With bf16 it keeps moments in fp32 and rounds weights at random. Every verdict says which it is of.
"""

import argparse
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compose import compose
from benchmarks.reports import markdown, stored
from lora_lab.config import TrialConfig
from lora_lab.events import Event, OptimizerMemory, PhaseMemory
from lora_lab.files import write_json
from lora_lab.fit.estimate import estimate
from lora_lab.fit.optimizer import optimizer_state, trained_weights
from lora_lab.fit.shapes import shapes_of
from lora_lab.phase import Phase
from lora_lab.store.environment import device_facts, environment
from lora_lab.trial import worker_process
from lora_lab.trial.devices import choose_placement, worker_environment

_LAYERS, _ALL_LAYERS = 4, 32
_BASE = (
    *("data=random_tokens", "data.rows=8", "batch_size=1", "model.weights=random", "tracking=none"),
    *("measure.warmup_steps=1", "measure.steps=2", "measure.eval_rows=1", "measure.profile_steps=0"),
    *("measure.idle_seconds=0", "learning_rate=1e-5"),
)
_SEVEN_B = (
    *("model=llama3_1_8b", "model.architecture.vocab_size=32000", "model.architecture.intermediate_size=11008"),
    *("model.architecture.num_key_value_heads=32", "seq_len=256"),
)
"""The shapes of LLaMA-7B, and GaLore's 256 tokens."""
_TINY = ("model=tiny", "seq_len=64")
_METHODS = {"fp32": "method=full", "bf16": "method=full_bf16"}
_IN_BACKWARD = ("optimizer.in_backward=true", "max_grad_norm=0")

CASES = {
    "adamw": ("optimizer=adamw_fused",),
    "galore": ("optimizer=galore", "optimizer.projection_rank={rank}"),
    "galore_8bit": ("optimizer=galore_8bit", "optimizer.projection_rank={rank}", *_IN_BACKWARD),
    "adamw_checkpointed": ("optimizer=adamw_fused", "gradient_checkpointing=full"),
    "lomo": ("optimizer=lomo", "max_grad_norm=0", "gradient_checkpointing=full"),
}
"""What runs; the rank is a quarter of the hidden size, as in the paper. GaLore's 8-bit form updates layer by layer."""

_EVALUATION = Phase.evaluation_before.value
_TRAINING = ("first_step", Phase.warm_up.value, Phase.window.value)
_CLOSE = 0.02
"""A published figure is rounded, and of shapes that are not stated to the last one."""
_RULE_IS_OFF = 0.05
"""From here on what a rule says of the whole model is no evidence."""
_RTX_4090 = 24564 * 2**20 / 1e9
"""The memory of the card that GaLore's paper names, in GB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a paper says, and how it is seen here."""

    paper: str
    says: str
    published: float
    at_least: bool
    """Whether the seen value supports the claim from `published` on, or up to it."""
    unit: str


CLAIMS = {
    "galore_state": Claim(
        paper="arXiv 2403.03507", says="optimizer state down by up to", published=0.655, at_least=True, unit="share"
    ),
    "galore_8bit_state": Claim(
        paper="arXiv 2403.03507",
        says="8-bit optimizer state down by up to",
        published=0.825,
        at_least=True,
        unit="share",
    ),
    "galore_8bit_total": Claim(
        paper="arXiv 2403.03507", says="8-bit total memory down by up to", published=0.633, at_least=True, unit="share"
    ),
    "galore_on_24_gb": Claim(
        paper="arXiv 2403.03507",
        says="7B trains on a card of 24 GB; needed",
        published=_RTX_4090,
        at_least=False,
        unit="GB",
    ),
    "lomo_of_standard": Claim(
        paper="arXiv 2306.09782",
        says="memory down to this of the standard",
        published=0.108,
        at_least=False,
        unit="share",
    ),
    "lomo_of_inference": Claim(
        paper="arXiv 2306.09782", says="memory of inference, times", published=1.0, at_least=False, unit="times"
    ),
}


def table() -> str:
    """Return docs/methods.md's tables, from the stored trials."""
    return "\n\n".join(_table(stored(f"h200/{name}")) for name in ("method_claims", "method_claims_bf16"))


def _table(content: dict[str, Any]) -> str:
    forms = {"share": "{:.1%}", "GB": "{:.1f} GB", "times": "{:.3f}"}
    lines = []
    for own in claims_of(content["trials"], content["dry_run"], content.get("held_in", "fp32")).values():
        values = [forms[own["unit"]].format(own[name]) for name in ("published", "measured", "whole")]
        lines.append([own["paper"], own["says"], *values, f"{own['rule_off_by']:.1%}", own["verdict"]])
    head = ["paper", "says", "published", f"measured, {content['layers']} layers", "all 32 layers, by the rules"]
    origin = content["origin"]
    made = f"Measured on an {origin['device']}, commit {origin['commit'][:7]}."
    return f"{markdown([*head, 'rules off by', 'verdict'], lines)}\n\n{made}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=_LAYERS)
    parser.add_argument("--held-in", choices=_METHODS, default="fp32")
    asked = parser.parse_args()
    out, layers, held_in = asked.out, asked.layers, asked.held_in
    out.mkdir(parents=True, exist_ok=True)
    placement = choose_placement("auto")
    is_dry = not placement.cards
    facts = {**environment(), **device_facts(placement)}
    facts["commit"] = os.environ.get("LORA_LAB_COMMIT", facts["commit"])  # where only the files are
    trials: dict[str, dict[str, Any]] = {}
    for case in CASES:
        trials[case] = _run(words_of(case, is_dry, layers, held_in))
        print(case, trials[case]["outcome"], trials[case]["reason"], flush=True)
        verdicts = claims_of(trials, is_dry, held_in)
        content = {
            "origin": facts,
            "dry_run": is_dry,
            "layers": layers,
            "held_in": held_in,
            "trials": trials,
            "claims": verdicts,
        }
        write_json(out / "method_claims.json", content)


def words_of(case: str, is_dry: bool, layers: int, held_in: str) -> list[str]:
    """Return the overrides of a trial."""
    model = _TINY if is_dry else (*_SEVEN_B, f"model.architecture.num_hidden_layers={layers}")
    rank = 64 if is_dry else 1024
    return [_METHODS[held_in], *_BASE, *model, *(word.format(rank=rank) for word in CASES[case])]


def _run(words: list[str]) -> dict[str, Any]:
    """Run one trial. Return bytes of its live state and its peaks, and what the rules say of it and of all layers."""
    found: dict[str, Any] = {"command": " ".join(words), "state": None, "peak": None, "evaluation": None}

    def note(event: Event) -> None:
        if isinstance(event, OptimizerMemory):
            found["state"] = event.total_bytes
        elif isinstance(event, PhaseMemory) and event.phase in _TRAINING:
            found["peak"] = max(found["peak"] or 0, event.peak_allocated_bytes)
        elif isinstance(event, PhaseMemory) and event.phase == _EVALUATION:
            found["evaluation"] = event.peak_allocated_bytes

    config = compose(words)
    placement = choose_placement("auto")
    with tempfile.TemporaryDirectory() as folder:
        end = worker_process.run_workers(config, worker_environment(placement), Path(folder), note)
    whole = compose([*words, f"model.architecture.num_hidden_layers={_ALL_LAYERS}"]) if placement.cards else config
    return {
        **found,
        "outcome": end.outcome.value,
        "reason": end.reason,
        "by_rule": _by_rule(config),
        "whole_by_rule": _by_rule(whole),
    }


def _by_rule(config: TrialConfig) -> dict[str, int]:
    """Return the bytes of state, of live tensors, of the whole process, and of a card that is enough with 95 %
    certainty, as lora_lab.fit calculates them."""
    shapes = shapes_of(config.model)
    said = estimate(config, shapes)
    state = optimizer_state(config.optimizer, trained_weights(config.method, shapes)).total
    return {"state": state, "peak": said.allocated, "card": said.card, "enough": said.enough}


def claims_of(trials: dict[str, dict[str, Any]], is_dry: bool, held_in: str = "fp32") -> dict[str, dict[str, Any]]:
    """Return for each claim what was published, what is seen, and whether that supports it."""
    found = {}
    for name, claim in CLAIMS.items():
        measured, whole, off = _seen(name, trials)
        found[name] = {
            "paper": claim.paper,
            "says": claim.says,
            "published": claim.published,
            "unit": claim.unit,
            "measured": measured,
            "whole": whole,
            "rule_off_by": off,
            "verdict": verdict(claim, whole, off, is_dry, held_in),
        }
    return found


def verdict(claim: Claim, whole: float | None, off: float | None, is_dry: bool, held_in: str) -> str:
    """Judge a claim by what is seen of the whole model.

    Args:
        off: how far the rule that calculated it is off where it was measured, as a share; None where it was not."""
    if is_dry:
        return "not judged: a dry run with tiny shapes"
    if whole is None or off is None:
        return "not testable here: a trial is missing or did not finish"
    if off > _RULE_IS_OFF:
        return f"not testable here: what was measured is {off:.0%} off the rule"
    most = claim.published if claim.unit == "GB" else claim.published * (1 + _CLOSE)  # a card has what it has
    holds = whole >= claim.published - _CLOSE if claim.at_least else whole <= most
    return f"supported, with weights in {held_in}" if holds else f"not reached with weights in {held_in}"


def _seen(name: str, trials: dict[str, dict[str, Any]]) -> tuple[float | None, float | None, float | None]:
    """Return a claim's value as measured, as calculated for the whole model, and how far the rule was off."""
    cases, kind, figure = {
        "galore_state": (("galore", "adamw"), "state", _less),
        "galore_8bit_state": (("galore_8bit", "adamw"), "state", _less),
        "galore_8bit_total": (("galore_8bit", "adamw"), "peak", _less),
        "galore_on_24_gb": (("galore_8bit",), "peak", _gigabytes),
        "lomo_of_standard": (("lomo", "adamw_checkpointed"), "peak", _share),
        "lomo_of_inference": (("lomo",), "peak", _gigabytes),
    }[name]
    there = [trials[case] for case in cases if case in trials]
    if len(there) < len(cases) or any(each["outcome"] != "finished" or each[kind] is None for each in there):
        return None, None, None
    off = max(abs(each[kind] / each["by_rule"][kind] - 1) for each in there)
    if name == "lomo_of_inference":
        trial = there[0]
        times = trial[kind] / trial["evaluation"]
        return times, times, 0.0  # the larger the model, the less its activations add: no rule is needed
    by_rule = "enough" if name == "galore_on_24_gb" else kind
    return figure(*(each[kind] for each in there)), figure(*(each["whole_by_rule"][by_rule] for each in there)), off


def _less(one: float, other: float) -> float:
    return 1 - one / other


def _share(one: float, other: float) -> float:
    return one / other


def _gigabytes(one: float) -> float:
    return one / 1e9


if __name__ == "__main__":
    main()
