"""Speed: ratios of sums over the window, never means of ratios."""

import statistics

from lora_lab.telemetry.window import Window


def throughput(window: Window) -> dict[str, float]:
    """Rates over the window by metric name. 'tokens' are real ones: padding is not counted.

    seconds_per_10k_tokens is the unit of arXiv 2509.12229: 10,000 / (tokens per second).
    """
    real = sum(step.real for step in window.steps)
    slots = sum(step.slots for step in window.steps)
    trained = sum(step.trained for step in window.steps)
    figures = {
        "throughput/tokens_per_second": real / window.seconds,
        "throughput/slots_per_second": slots / window.seconds,
        "throughput/trained_tokens_per_second": trained / window.seconds,
        "throughput/samples_per_second": sum(step.rows for step in window.steps) / window.seconds,
        "throughput/steps_per_second": len(window.steps) / window.seconds,
        "throughput/seconds_per_10k_tokens": 1e4 * window.seconds / real,
        "window/seconds": window.seconds,
        "window/steps": float(len(window.steps)),
        "tokens/real_share": real / slots,
        "tokens/trained_share": trained / slots,
    }
    timed = [step.seconds for step in window.steps if step.seconds is not None]
    if timed:
        figures["throughput/step_seconds_p50"] = statistics.median(timed)
    return figures
