"""Describe every metric once: title, unit, format, and which way is better. All tables read it from here.

docs/measurement.md has each one's formula, source and error.
"""

from dataclasses import dataclass
from enum import Enum

from lora_lab.phase import Phase


class Better(Enum):
    """Which way is better."""

    higher = "higher"
    lower = "lower"


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of a trial."""

    key: str
    """Its name in the store."""
    title: str
    unit: str
    form: str = "{:.4g}"
    """How a value is written."""
    better: Better | None = None
    """None where neither way is."""
    heading: str = ""
    """The head of a column; by default title and unit."""

    @property
    def column(self) -> str:
        """Return the head of a table's column."""
        return self.heading or f"{self.title} {self.unit}".strip()

    def write(self, value: float) -> str:
        """Return a value with its unit."""
        return f"{self.form.format(value)} {self.unit}".strip()


_HIGHER, _LOWER = Better.higher, Better.lower
_PARTS = {"load": "loading", "first_step": "first step", "steady": "window", "evaluation": "evaluation"}
_KINDS = {"allocated": "allocated", "reserved": "reserved", "device": "card", "process": "process"}

_ALL = (
    Metric("throughput/tokens_per_second", "throughput", "tokens/s", "{:,.0f}", _HIGHER, "tokens/s"),
    Metric("throughput/tokens_per_second_error", "error of throughput", "tokens/s", "{:,.0f}", _LOWER, "± tokens/s"),
    Metric("throughput/seconds_per_10k_tokens", "time per 10k tokens", "s", "{:,.2f}", _LOWER, "s per 10k tokens"),
    Metric("throughput/slots_per_second", "slots", "1/s", "{:,.0f}", _HIGHER),
    Metric("throughput/trained_tokens_per_second", "trained tokens", "1/s", "{:,.0f}", _HIGHER),
    Metric("throughput/samples_per_second", "rows", "1/s", "{:,.2f}", _HIGHER),
    Metric("throughput/steps_per_second", "steps", "1/s", "{:,.3f}", _HIGHER),
    Metric("throughput/step_seconds_p50", "step time, median", "s", "{:.3f}", _LOWER, "step s"),
    Metric("throughput/step_seconds_p95", "step time, 95th percentile", "s", "{:.3f}", _LOWER, "step s p95"),
    Metric("throughput/data_wait_share", "waiting for data", "of the time", "{:.1%}", _LOWER),
    Metric("throughput/gpu_busy_share", "GPU at work", "of the time", "{:.0%}", _HIGHER, "GPU busy"),
    Metric("throughput/gpu_busy_seconds_per_step", "GPU at work per step", "s", "{:.4f}", _LOWER),
    Metric("throughput/kernels_per_step", "kernels per step", "", "{:,.0f}", _LOWER),
    Metric("throughput/kernel_seconds", "kernels per step", "s", "{:.4f}", _LOWER, "kernel s"),
    Metric("throughput/step_to_kernel_ratio", "step over its kernels", "times", "{:.2f}", _LOWER, "step over kernels"),
    Metric("tokens/real_share", "real tokens", "of the slots", "{:.1%}", _HIGHER),
    Metric("tokens/trained_share", "trained tokens", "of the slots", "{:.1%}", _HIGHER),
    Metric("window/seconds", "window", "s", "{:.1f}"),
    Metric("window/steps", "steps in the window", "", "{:,.0f}"),
    Metric("window/steps_left_out", "slow first steps left out", "", "{:,.0f}", _LOWER),
    Metric("window/steps_skipped", "steps skipped by an overflow", "", "{:,.0f}", _LOWER),
    Metric("flops/mfu", "of its matrix rate", "(MFU)", "{:.1%}", _HIGHER, "MFU"),
    Metric("flops/hfu", "of its matrix rate, all work", "(HFU)", "{:.1%}", _HIGHER, "HFU"),
    Metric("flops/model_tflop_per_second", "useful work", "TFLOP/s", "{:.1f}", _HIGHER),
    Metric("flops/hardware_tflop_per_second", "all work", "TFLOP/s", "{:.1f}", _HIGHER),
    Metric("flops/matmul_tflop_per_second", "the device's matrix rate", "TFLOP/s", "{:.1f}"),
    Metric("flops/per_token", "useful work per token", "FLOP"),
    Metric("flops/per_token_products", "products per token", "FLOP"),
    Metric("flops/per_token_attention_causal", "causal attention per token", "FLOP"),
    Metric("flops/per_token_attention_square", "full attention per token", "FLOP"),
    Metric("flops/per_token_recomputation", "recomputation per token", "FLOP"),
    Metric("vram/peak_allocated_gib", "VRAM, torch's peak", "GiB", "{:.2f}", _LOWER, "VRAM GiB"),
    Metric("vram/peak_reserved_gib", "VRAM, reserved by torch", "GiB", "{:.2f}", _LOWER, "reserved GiB"),
    Metric("vram/peak_device_gib", "VRAM, card's peak", "GiB", "{:.2f}", _LOWER, "card GiB"),
    Metric("vram/peak_process_gib", "VRAM, worker's peak", "GiB", "{:.2f}", _LOWER, "process GiB"),
    *(
        Metric(f"vram/{part}_{kind}_gib", f"VRAM, {what}, {name}", "GiB", "{:.2f}", _LOWER, f"{what} {name} GiB")
        for part, what in _PARTS.items()
        for kind, name in _KINDS.items()
    ),
    Metric("vram/optimizer_gib", "optimizer state", "GiB", "{:.3f}", _LOWER),
    Metric("vram/optimizer_eligible_gib", "optimizer state that can be paged", "GiB", "{:.3f}"),
    Metric("vram/optimizer_paged_gib", "paged optimizer state", "GiB", "{:.3f}"),
    Metric("vram/optimizer_paged_tensors", "paged tensors", "", "{:,.0f}"),
    Metric("vram/other_gib", "VRAM outside torch", "GiB", "{:.2f}", _LOWER),
    Metric("vram/allocator_retries", "allocator's retries", "", "{:,.0f}", _LOWER),
    Metric("vram/spilled_gib", "VRAM spilled to main memory", "GiB", "{:.2f}", _LOWER),
    Metric("energy/joules_per_token", "energy", "J/token", "{:.4f}", _LOWER, "J/token"),
    Metric("energy/joules_per_token_error", "error of energy", "J/token", "{:.5f}", _LOWER, "± J/token"),
    Metric("energy/net_joules_per_token", "energy net of idle", "J/token", "{:.4f}", _LOWER, "net J/token"),
    Metric("energy/net_joules_per_token_error", "error of net energy", "J/token", "{:.5f}", _LOWER),
    Metric("energy/cpu_joules_per_token", "CPU energy", "J/token", "{:.4f}", _LOWER, "CPU J/token"),
    Metric("energy/joules", "energy of the window", "J", "{:,.1f}", None, "J"),
    Metric("energy/joules_error", "its error", "J", "{:,.1f}", _LOWER),
    Metric("energy/net_joules", "energy of the window net of idle", "J", "{:,.1f}"),
    Metric("energy/net_joules_error", "its error", "J", "{:,.1f}", _LOWER),
    Metric("energy/cpu_joules", "CPU energy of the window", "J", "{:,.1f}"),
    Metric("energy/cpu_joules_error", "its error", "J", "{:,.1f}", _LOWER),
    Metric("energy/mean_power_watts", "mean power", "W", "{:.0f}", None, "mean W"),
    Metric("energy/idle_watts", "idle power", "W", "{:.1f}", None, "idle W"),
    Metric("energy/idle_watts_error", "error of idle power", "W", "{:.1f}", _LOWER),
    Metric("energy/power_integral_joules", "integral of power", "J", "{:,.1f}"),
    Metric("energy/power_integral_joules_error", "its error", "J", "{:,.1f}", _LOWER),
    Metric("energy/power_disagreement", "integral of power against the counter", "", "{:+.2%}"),
    Metric("energy/stretches_left_out", "stretches without energy", "", "{:,.0f}", _LOWER),
    Metric("energy/estimated_joules", "energy by stated power", "J", "{:,.1f}"),
    Metric("energy/estimated_joules_per_token", "energy by stated power", "J/token", "{:.4f}"),
    Metric("cost/card_per_million_tokens", "card's electricity, 10^6 tokens", "in your currency", "{:.4f}", _LOWER),
    Metric("co2/card_grams_per_million_tokens", "card's CO2, 10^6 tokens", "g", "{:.1f}", _LOWER),
    Metric("loss/eval_before", "held-out loss before", "nats per token", "{:.4f}", _LOWER, "loss before"),
    Metric("loss/eval", "held-out loss", "nats per token", "{:.4f}", _LOWER, "held-out loss"),
    Metric("loss/eval_change", "change of held-out loss", "nats per token", "{:+.4f}", _LOWER, "change of loss"),
    Metric("loss/eval_change_low", "its 95 % interval from", "nats per token", "{:+.4f}", _LOWER),
    Metric("loss/eval_change_high", "its 95 % interval to", "nats per token", "{:+.4f}", _LOWER),
    Metric("loss/eval_rows_improved", "held-out rows with a lower loss", "of them", "{:.0%}", _HIGHER, "rows improved"),
    Metric("loss/general_before", "loss on general text before", "nats per token", "{:.4f}", _LOWER),
    Metric("loss/general_after", "loss on general text", "nats per token", "{:.4f}", _LOWER, "general loss"),
    Metric("loss/general_change", "change of general loss", "nats per token", "{:+.4f}", _LOWER, "general change"),
    Metric("loss/general_change_low", "its 95 % interval from", "nats per token", "{:+.4f}", _LOWER),
    Metric("loss/general_change_high", "its 95 % interval to", "nats per token", "{:+.4f}", _LOWER),
    Metric("quality/answers", "held-out prompts answered", "", "{:,.0f}"),
    Metric("quality/rouge_l_answers", "of them scored by ROUGE-L", "", "{:,.0f}"),
    *(
        Metric(f"quality/{key}_{who}", f"{title}, {name}", unit, form, better, f"{title}, {name}")
        for who, name in {"base": "before", "tuned": "after"}.items()
        for key, title, unit, form, better in (
            ("stop_rate", "turns ended", "of the answers", "{:.0%}", _HIGHER),
            ("answer_tokens", "length of answers", "tokens", "{:.1f}", None),
            ("exact_match", "exact answers", "of the answers", "{:.1%}", _HIGHER),
            ("rouge_l", "ROUGE-L", "F1", "{:.2f}", _HIGHER),
        )
    ),
    *(
        Metric(f"quality/{key}_{who}_{end}", f"{title} {name}, 95 % {word}", unit, form)
        for key, title, unit, form in (
            ("exact_match", "exact answers", "of the answers", "{:.1%}"),
            ("rouge_l", "ROUGE-L", "F1", "{:.2f}"),
        )
        for who, name in {"base": "before", "tuned": "after"}.items()
        for end, word in {"low": "from", "high": "to"}.items()
    ),
    Metric("loss/train", "training loss in the window", "nats per token", "{:.4f}", _LOWER, "training loss"),
    Metric("job/hours", "whole job", "h", "{:.2f}", _LOWER, "job h"),
    Metric("job/kwh", "energy of the job", "kWh", "{:.3f}", _LOWER, "job kWh"),
    Metric("job/kwh_error", "its error", "kWh", "{:.3f}", _LOWER),
    Metric("job/cost", "electricity of the job", "in your currency", "{:.2f}", _LOWER, "job cost"),
    Metric("job/joules_per_token", "energy of the job", "J/token", "{:.4f}", _LOWER, "job J/token"),
    Metric("job/best_heldout_loss", "best held-out loss", "nats per token", "{:.4f}", _LOWER, "best held-out loss"),
    Metric("job/best_step", "its step", "", "{:,.0f}"),
    Metric("job/steps", "steps of the job", "", "{:,.0f}"),
    Metric("job/steps_planned", "steps planned", "", "{:,.0f}"),
    Metric("job/steps_taken_again", "steps taken again", "", "{:,.0f}", _LOWER),
    Metric("job/epochs", "epochs", "", "{:.2f}"),
    Metric("job/tokens", "tokens of the job", "", "{:,.0f}"),
    Metric("job/trained_tokens", "tokens trained on", "", "{:,.0f}"),
    Metric("job/attempts", "attempts", "", "{:,.0f}"),
    Metric("job/evaluations", "evaluations", "", "{:,.0f}"),
    Metric("job/evaluation_seconds", "evaluations", "s", "{:,.1f}", _LOWER),
    Metric("job/checkpoints", "checkpoints", "", "{:,.0f}"),
    Metric("job/checkpoint_seconds", "checkpoints", "s", "{:,.1f}", _LOWER),
    Metric("job/spikes", "spikes of the loss", "", "{:,.0f}", _LOWER),
    Metric("engine/compile_seconds", "compilation", "s", "{:.1f}", _LOWER),
    Metric("engine/shapes", "prepared shapes", "", "{:,.0f}"),
    Metric("engine/late_compilations", "late compilations", "", "{:,.0f}", _LOWER),
    Metric("engine/replayed_micro_batches", "replayed micro-batches", "", "{:,.0f}"),
    Metric("engine/unrecorded_micro_batches", "micro-batches that were not recorded", "", "{:,.0f}", _LOWER),
    Metric("engine/graph_working_gib", "memory within a replay", "GiB", "{:.2f}", _LOWER),
    Metric("card/foreign_processes", "other processes on the card", "", "{:,.0f}", _LOWER),
    Metric("card/thermal_share", "clocks held down by heat", "of the time", "{:.1%}", _LOWER),
    Metric("card/brake_share", "clocks held down by a brake signal", "of the time", "{:.1%}", _LOWER),
    Metric("card/power_cap_share", "clocks held down by the power limit", "of the time", "{:.1%}"),
    Metric("card/temperature_drift_celsius", "temperature drift", "°C", "{:+.0f}"),
    Metric("card/start_celsius", "temperature at the start", "°C", "{:.0f}"),
    Metric("card/window_end_celsius", "temperature at the window's end", "°C", "{:.0f}"),
    Metric("card/sm_mhz_median", "clock, median", "MHz", "{:,.0f}"),
    Metric("card/memory_mhz_median", "memory clock, median", "MHz", "{:,.0f}"),
    Metric("card/sm_clock_spread", "clock's spread", "", "{:.1%}", _LOWER),
    Metric("card/used_before_gib", "card in use before", "GiB", "{:.2f}"),
    Metric("card/used_after_gib", "card in use after", "GiB", "{:.2f}"),
    Metric("sampler/cpu_share", "sampling, of a CPU core", "", "{:.1%}", _LOWER),
    Metric("sampler/readings_per_second", "samples", "1/s", "{:.1f}"),
    *(Metric(f"time/{phase.value}_seconds", phase.value.replace("_", " "), "s", "{:.1f}") for phase in Phase),
    Metric("time/asked_to_first_step_seconds", "time to the first step", "s", "{:.1f}", _LOWER),
    Metric("time/waiting_seconds", "waiting for the device", "s", "{:.1f}"),
    Metric("overhead/before_first_step_seconds", "overhead before the first step", "s", "{:.2f}", _LOWER),
    Metric("host/peak_gib", "host memory, worker's peak", "GiB", "{:.2f}", _LOWER),
    Metric("estimate/low_gib", "estimated memory, at least", "GiB", "{:.2f}"),
    Metric("estimate/high_gib", "estimated memory, at most", "GiB", "{:.2f}"),
    Metric("estimate/enough_gib", "estimated memory, enough", "GiB", "{:.2f}"),
    Metric("estimate/allocated_gib", "estimate of torch's peak", "GiB", "{:.2f}"),
    Metric("estimate/reserved_gib", "estimate of what torch reserves", "GiB", "{:.2f}"),
    Metric("estimate/card_gib", "estimate of the worker's peak", "GiB", "{:.2f}", None, "estimated GiB"),
    Metric("estimate/allocated_error", "estimate over torch's peak", "", "{:+.1%}"),
    Metric("estimate/reserved_error", "estimate over what torch reserved", "", "{:+.1%}"),
    Metric("estimate/card_error", "estimate over the worker's peak", "", "{:+.1%}"),
    Metric("out_of_memory/asked_gib", "allocation that failed", "GiB", "{:.2f}"),
    Metric("out_of_memory/peak_allocated_gib", "torch's peak when memory ran out", "GiB", "{:.2f}"),
    Metric("out_of_memory/peak_device_gib", "card's peak when memory ran out", "GiB", "{:.2f}"),
    *(
        Metric(f"data/{key}", title, "", "{:,.0f}")
        for key, title in {
            "rows_read": "rows read",
            "rows_train": "rows to train on",
            "rows_heldout": "rows held out",
            "rows_truncated": "rows cut at seq_len",
            "rows_without_labels": "rows without a token to train on",
            "rows_lost": "rows with incomplete text",
            "rows_apart": "rows tokenised in two parts",
            "rows_repeated": "repeated rows",
            "rows_heldout_prompt_trained": "held-out rows whose prompt is trained on",
            "rows_near_repeated": "nearly repeated rows",
            "rows_dropped": "repeated rows left out",
            "rows_in_both": "rows left out because they are held out",
            "rows_low_perplexity": "rows left out for their low perplexity",
            "length_median": "tokens of a row, median",
            "length_p95": "tokens of a row, 95 % have no more",
            "length_max": "tokens of the longest row",
            "tokens_cut": "tokens beyond seq_len",
        }.items()
    ),
    Metric("efficientllm/amu", "AMU", "", "{:.3f}"),
    Metric("efficientllm/pcu", "PCU", "", "{:.3f}"),
    Metric("efficientllm/al_seconds", "AL", "s", "{:.3f}"),
    Metric("efficientllm/st_samples_per_second_per_parameter", "ST", "1/s per parameter"),
    Metric("efficientllm/aec_watts", "AEC", "W", "{:.0f}"),
    Metric("efficientllm/mcr_size_only", "MCR, size only", "", "{:.2f}"),
)

METRICS = {metric.key: metric for metric in _ALL}
"""By key. A metric that another version recorded may be missing."""


def metric(key: str) -> Metric:
    """Return a metric's description; one made of its key for what this version does not know."""
    return METRICS.get(key) or Metric(key, key, "")
