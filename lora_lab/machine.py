"""What both processes know about this machine."""

import platform

CORES = "LORA_LAB_CORES"
"""The variable that gives a worker its cores, as numbers separated by commas."""


def cpu_name() -> str:
    """Return the CPU's name as Linux reports it."""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
        )
