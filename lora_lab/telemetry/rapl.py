"""Read the energy of the CPU packages, where Linux lets this user do so (RAPL, /sys/class/powercap)."""

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Rapl:
    """The packages' running counters as one: their sum, unwrapped."""

    def __init__(self, root: Path = POWERCAP, absent: str = "") -> None:
        """Open the counters.

        Args:
            absent: why nothing is to be read; empty where something is."""
        self._counters: list[_Counter] = []
        self.absent = absent
        """Why nothing can be read; empty when something can."""
        if absent:
            return
        # AMD's packages have this name too; package-0 alone has children (cores, memory) that it already holds
        zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        packages = [zone for zone in zones if _text(zone / "name").startswith("package")]
        if not packages:
            self.absent = f"this machine offers no RAPL package under {root}"
            return
        try:
            self._counters = [_Counter(zone) for zone in packages]
        except (OSError, ValueError) as error:
            self.absent = f"the kernel does not let this user read {packages[0]}/energy_uj ({_why(error)})"

    def joules(self) -> float | None:
        """Return the joules of all packages since this object was made; None when they cannot be read (any more)."""
        if not self._counters:
            return None
        try:
            return sum(counter.microjoules() for counter in self._counters) / 1e6
        except (OSError, ValueError) as error:
            self.absent, self._counters = f"the CPU's energy could not be read any more ({_why(error)})", []
            return None


class _Counter:
    def __init__(self, zone: Path) -> None:
        self._file = zone / "energy_uj"
        self._range = int(_text(zone / "max_energy_range_uj") or 0)
        self._last = int(self._file.read_text(encoding="ascii"))
        self._sum = 0

    def microjoules(self) -> int:
        now = int(self._file.read_text(encoding="ascii"))
        step = now - self._last
        self._sum += step if step >= 0 else step + self._range  # it wraps at its range, after minutes to hours
        self._last = now
        return self._sum


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
