"""docs/paper.md's table of how far the figures can be trusted."""

import statistics

from benchmarks.checks_table import worst_flops
from benchmarks.reports import markdown, stored, where
from benchmarks.steady_table import JOULES, TOKENS, Steady, steady_trials


def trusted() -> str:
    """Return the table: question, answer, and where, when and at which commit that was measured."""
    gpu, host = steady_trials("gpu_bound"), steady_trials("host_bound")
    flops, looking, paged = (stored(f"h100/{name}") for name in ("flop_check", "looking", "paged"))
    sampling = [f"{100 * row['cost_of_readings']:+.2f} % at {row['shape']}" for row in looking["rows"]]
    half = max(row["cost_of_readings_half"] for row in looking["rows"])
    as_ruled = [
        round(row["record"]["metrics"]["vram/optimizer_paged_gib"] * 2**30) == row["predicted_bytes"]
        for row in paged["rows"]
    ]
    ranks = sorted({row["rank"] for row in paged["rows"]})
    unpaged = [
        rank for rank in ranks if not any(row["predicted_bytes"] for row in paged["rows"] if row["rank"] == rank)
    ]
    apart = max(worst_flops(flops, part) for part in ("products", "attention", "recomputation", "total"))
    agree = "Do energy counter and integral of power agree in long windows?"
    same = "Does the same trial give the same figures?"
    short = "Is a window of 5 s enough for J/token?"
    rows = [
        [agree, _agree(gpu, "GPU-bound"), gpu.made],
        [agree, _agree(host, "host-bound"), host.made],
        [same, _same(gpu, "GPU-bound"), gpu.made],
        [same, _same(host, "host-bound"), host.made],
        [short, _short(gpu, "GPU-bound"), gpu.made],
        [short, _short(host, "host-bound"), host.made],
        [
            "What does sampling cost?",
            f"{', '.join(sampling)} (each ± {100 * half:.2f} % or less)",
            where(looking["origin"]),
        ],
        [
            "Are the FLOPs right?",
            f"within {100 * apart:.2f} % of torch's own count, for LoRA with 12 key-value heads instead of 2 (torch "
            "cannot count 4-bit products or shared heads)",
            where(flops["origin"]),
        ],
        [
            "Is the paged optimizer paged?",
            f"at rank {' and '.join(map(str, unpaged))} not at all; exactly what bitsandbytes' rule says in "
            f"{sum(as_ruled)} of {len(as_ruled)} trials",
            where(paged["origin"], paged["rows"][0]["record"]["started_ms"]),
        ],
    ]
    return markdown(["question", "answer", "card, date if stored, commit"], rows)


def _agree(trials: Steady, bound: str) -> str:
    seconds = trials.values("window/seconds")
    return (
        f"{bound}: within {100 * trials.disagreement:.1f} % in {len(trials.metrics)} trials of "
        f"{min(seconds):.0f} to {max(seconds):.0f} s"
    )


def _same(trials: Steady, bound: str) -> str:
    spreads = (
        f"{name} within {100 * trials.spread(key):.1f} %" for name, key in (("tokens/s", TOKENS), ("J/token", JOULES))
    )
    return f"{bound} ({trials.shape}): {', '.join(spreads)}"


def _short(trials: Steady, bound: str) -> str:
    off = 100 * statistics.median(trials.off)
    return f"{bound}: off by {off:.1f} % in the median; {trials.within} of {len(trials.parts)} parts within 1 %"
