"""Add a trial's energy: gross, net of idle, of the CPU, and, under separate names, what the user stated."""

from collections.abc import Sequence

from lora_lab.telemetry.energy import DISAGREEMENT_TOLD, Energy, cpu_energy, energy_of
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.host_facts import HostFacts
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.window import Window

_GROSS, _NET, _CPU = "energy/joules_per_token", "energy/net_joules_per_token", "energy/cpu_joules_per_token"
_NO_WINDOW = "the measured window was not completed"
JOULES_PER_KWH = 3.6e6


def add_energy(summary: Summary, window: Window | None, samples: Sequence[Sample], seen: HostFacts) -> None:
    """Add every figure below `energy/`, and the tags that name their sources."""
    summary.tags["energy_source"] = "none"
    if window is None:
        summary.without((_GROSS, _NET), seen.no_sensor or _NO_WINDOW)
        summary.absent[_CPU] = seen.no_cpu_sensor or _NO_WINDOW
        _add_stated(summary, window, 0, seen)
        return
    real = sum(step.real for step in window.steps)
    _add_card(summary, window, samples, seen)
    cpu = cpu_energy(window, samples)
    if isinstance(cpu, str):
        summary.absent[_CPU] = seen.no_cpu_sensor or cpu
    else:
        summary.metrics |= {
            "energy/cpu_joules": cpu.joules,
            "energy/cpu_joules_error": cpu.error_joules,
            _CPU: cpu.joules / real,
        }
    _add_stated(summary, window, real, seen)


def of_card(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples that hold a reading of a card's energy or power."""
    return [s for s in samples if (s.energy_joules, s.instant_watts, s.average_watts) != (None, None, None)]


def _add_card(summary: Summary, whole: Window, samples: Sequence[Sample], seen: HostFacts) -> None:
    read = of_card(samples)
    if not read:
        summary.without((_GROSS, _NET), seen.no_sensor or "no power sensor was read")
        return
    energy, window = energy_of(whole, read)
    real = sum(step.real for step in window.steps)
    if energy.power is not None:
        summary.metrics["energy/power_integral_joules"] = energy.power.joules
        summary.metrics["energy/power_integral_joules_error"] = energy.power.error_joules
    if energy.joules is None or energy.error_joules is None:
        watched = read[-1].t >= window.end  # or a sensor that failed on the way is why
        summary.without((_GROSS, _NET), energy.reason if watched else seen.no_sensor or energy.reason)
        return
    summary.tags["energy_source"] = energy.source
    _tell_source(summary, energy)
    left_out = len(whole.stretches) - len(window.stretches)
    if left_out:
        summary.metrics["energy/stretches_left_out"] = float(left_out)
        summary.warnings.append(
            f"the energy of {left_out} of {len(whole.stretches)} stretches of training is not known, and is left out "
            "with their steps"
        )
    summary.metrics |= {
        "energy/joules": energy.joules,
        "energy/joules_error": energy.error_joules,
        "energy/mean_power_watts": energy.joules / window.seconds,
        _GROSS: energy.joules / real,
        f"{_GROSS}_error": energy.error_joules / real,
    }
    if seen.idle is None:
        summary.absent[_NET] = f"no idle draw to take off: {seen.no_idle}"
        return
    net = energy.joules - seen.idle.watts * window.seconds
    error = energy.error_joules + seen.idle.error_watts * window.seconds
    summary.metrics |= {
        "energy/idle_watts": seen.idle.watts,
        "energy/idle_watts_error": seen.idle.error_watts,
        "energy/net_joules": net,
        "energy/net_joules_error": error,
        _NET: net / real,
        f"{_NET}_error": error / real,
    }
    summary.tags |= {"idle_state": seen.idle.state, "idle_source": seen.idle.source}


def _tell_source(summary: Summary, energy: Energy) -> None:
    if energy.reason:
        summary.tags["energy_source_reason"] = energy.reason
        summary.warnings.append(f"energy is the integral of power, not the counter's: {energy.reason}")
    if energy.disagreement is None:
        return
    summary.metrics["energy/power_disagreement"] = energy.disagreement
    if abs(energy.disagreement) > DISAGREEMENT_TOLD:
        summary.warnings.append(
            f"the integral of power is {energy.disagreement:+.1%} off the energy counter; no cause is known to the "
            "run, and differences of that size between cards or drivers mean nothing"
        )


def _add_stated(summary: Summary, window: Window | None, real: int, seen: HostFacts) -> None:
    """Add energy by a stated constant board power P, E/N = P t / N (arXiv 2509.12229), and cost and CO2 from energy."""
    stated = seen.stated
    if stated.board_power_watts is not None:
        estimated = None if window is None else stated.board_power_watts * window.seconds
        summary.add("energy/estimated_joules", estimated, _NO_WINDOW)
        per_token = None if estimated is None else estimated / real
        summary.add("energy/estimated_joules_per_token", per_token, _NO_WINDOW)
    measured = summary.metrics.get(_GROSS)
    asked = {
        "cost/card_per_million_tokens": stated.price_per_kwh,
        "co2/card_grams_per_million_tokens": stated.co2_grams_per_kwh,
    }
    for name, per_kwh in asked.items():
        if per_kwh is not None:
            found = None if measured is None else measured * 1e6 / JOULES_PER_KWH * per_kwh
            summary.add(name, found, summary.absent.get(_GROSS, ""))
