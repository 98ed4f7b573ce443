"""Find the largest batch or row length that a card takes."""

from dataclasses import replace

from lora_lab.config import TrialConfig
from lora_lab.fit.estimate import Estimate, estimate
from lora_lab.fit.shapes import Shapes
from lora_lab.fit.step import sizes_of
from lora_lab.options import Attention

_UNITS = {"seq_len": 64, "batch_size": 1}
"""Row lengths are looked at in steps of as many tokens."""
_MOST = 2**22
_LESS = 0.97


class Search:
    """Looks for the limits of one configuration. Estimates are kept: most questions need the same few."""

    def __init__(self, config: TrialConfig, shapes: Shapes) -> None:
        self._config, self._shapes = config, shapes
        self._known: dict[tuple[int, int], Estimate] = {}
        self._by_tokens = config.attention is not Attention.eager and not sizes_of(config, shapes).is_masked
        """Whether tokens alone count, however they are divided into rows."""

    def largest(self, setting: str, capacity: float, certain: bool) -> int:
        """Return the largest value of `setting` with which the trial fits, 0 where none does.

        Between two estimates at powers of two it is taken as a straight line, and a certain answer is tried.

        Args:
            setting: seq_len or batch_size.
            capacity: of the card, in bytes.
            certain: False asks for the largest that may fit.
        """
        unit = _UNITS[setting]
        most = self._shapes.longest if setting == "seq_len" and self._shapes.longest else _MOST
        if self._need(setting, unit, certain) > capacity:
            return 0
        value = unit
        while value < most and self._need(setting, min(2 * value, most), certain) <= capacity:
            value = min(2 * value, most)
        if value >= most:
            return most
        above = min(2 * value, most)
        low, high = (self._need(setting, each, certain) for each in (value, above))
        found = value + int((above - value) * (capacity - low) / (high - low))
        found = max(value, found // unit * unit)
        while certain and found > value and self._need(setting, found, certain) > capacity:
            found = max(value, int(found * _LESS) // unit * unit)
        return found

    def _need(self, setting: str, value: int, certain: bool) -> int:
        rows = replace(self._config, batch_size=value)
        found = self._at(rows if setting == "batch_size" else replace(self._config, seq_len=value))
        return found.high if certain else found.low

    def _at(self, config: TrialConfig) -> Estimate:
        tokens = config.batch_size * config.seq_len
        key = (tokens, 0) if self._by_tokens else (config.batch_size, config.seq_len)
        if key not in self._known:
            self._known[key] = estimate(config, self._shapes)
        return self._known[key]
