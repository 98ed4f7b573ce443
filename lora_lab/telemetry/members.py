"""Share the energy of a job between the trials that trained together in it."""

from lora_lab.telemetry.figures import Summary

_ENERGY = (
    *("energy/joules", "energy/net_joules", "energy/cpu_joules"),
    *("energy/joules_per_token", "energy/net_joules_per_token", "energy/cpu_joules_per_token"),
    *("energy/power_integral_joules", "energy/estimated_joules", "energy/estimated_joules_per_token"),
    *("cost/card_per_million_tokens", "co2/card_grams_per_million_tokens"),
)


def share_energy(summary: Summary, members: int) -> None:
    """Divide every energy, and what follows from it, by the members. They take the same rows in each step, so each has
    the same tokens, and equal parts are parts by tokens. Power stays the card's, as time and memory stay the job's."""
    for name in _ENERGY:
        for key in (name, f"{name}_error"):
            if key in summary.metrics:
                summary.metrics[key] /= members
