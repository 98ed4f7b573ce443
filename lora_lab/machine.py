"""This machine, as far as both sides need to know it."""

import platform


def cpu_name() -> str:
    """As Linux has it."""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
        )
