"""Give a trial's figures the names of EfficientLLM (arXiv 2505.13840, section 5.1), so that tables can be compared.

Only what follows from our own figures; docs/measurement.md says where the definitions differ.
"""

from collections.abc import Sequence
from statistics import mean

from lora_lab.events import Event, ModelCounted
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.host_facts import HostFacts
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.window import Window

_SIXTEEN_BIT_BYTES = 2


def add_efficientllm(
    summary: Summary, window: Window, events: Sequence[Event], samples: Sequence[Sample], seen: HostFacts
) -> None:
    """Add AMU, PCU, AL, ST, AEC and MCR, each where its parts are known."""
    metrics = summary.metrics
    used = [s.used_bytes for s in window.inside(samples) if s.used_bytes is not None]
    if used and seen.card_bytes:
        metrics["efficientllm/amu"] = mean(used) / seen.card_bytes
    if "throughput/gpu_busy_share" in metrics:
        metrics["efficientllm/pcu"] = metrics["throughput/gpu_busy_share"]
    metrics["efficientllm/al_seconds"] = window.seconds / len(window.steps)
    if "energy/mean_power_watts" in metrics:
        metrics["efficientllm/aec_watts"] = metrics["energy/mean_power_watts"]
    counted = next((event for event in events if isinstance(event, ModelCounted)), None)
    if counted is not None:
        metrics["efficientllm/st_samples_per_second_per_parameter"] = (
            metrics["throughput/samples_per_second"] / counted.weight_elements
        )
        metrics["efficientllm/mcr_size_only"] = counted.weight_elements * _SIXTEEN_BIT_BYTES / counted.weight_bytes
