"""Identify the process that a record belongs to, and find out whether it is still running."""

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """One process of one machine since one boot. A pid alone is not enough, because it is used again."""

    host: str
    boot_id: str
    pid: int
    started: int
    """Clock ticks between boot and the process's start (field 22 of /proc/PID/stat)."""

    @property
    def is_here(self) -> bool:
        """Return whether it is, or was, a process of this machine."""
        return self.host == platform.node()

    @property
    def gone(self) -> bool:
        """Return whether the process has ended. Nothing is known about processes of other machines: False."""
        if not self.is_here:
            return False
        return self.boot_id != _boot_id() or _started(self.pid) != self.started


def this_process() -> Owner:
    """Return the process that calls this."""
    return Owner(host=platform.node(), boot_id=_boot_id(), pid=os.getpid(), started=_started(os.getpid()) or 0)


@functools.cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _started(pid: int) -> int | None:
    """Return a process's start in clock ticks since boot; None when there is no process, or only a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces
    return None if fields[0] == "Z" else int(fields[19])
