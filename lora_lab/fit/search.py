"""Find the largest batch or row length that a card takes."""

from dataclasses import replace

from lora_lab.config import TrialConfig
from lora_lab.fit.estimate import TOO_LARGE, Estimate, estimate
from lora_lab.fit.shapes import Shapes
from lora_lab.fit.step import sizes_of
from lora_lab.options import Attention

UNITS = {"seq_len": 64, "batch_size": 1}
"""Row lengths are looked at in steps of as many tokens."""
_MOST = 2**22
_LESS = 0.97


class Search:
    """Looks for the limits of one configuration. Estimates are kept: most questions need the same few."""

    def __init__(self, config: TrialConfig, shapes: Shapes) -> None:
        self._config, self._shapes = config, shapes
        self._known: dict[tuple[int, int], Estimate] = {}
        self._by_tokens = (
            config.attention is not Attention.eager and shapes.window is None and not sizes_of(config, shapes).is_masked
        )
        """Whether tokens alone count, however they are divided into rows."""

    def largest(self, setting: str, capacity: float, certain: bool) -> int:
        """Return the largest value of `setting` with which the trial fits, 0 where none does.

        It looks at the trial's own value, at its doubles, and between the last two along a straight line. A certain
        answer is tried.

        Args:
            setting: seq_len or batch_size.
            capacity: of the card, in bytes.
            certain: False asks for the largest that may fit.
        """
        unit = UNITS[setting]
        most = self._shapes.longest if setting == "seq_len" and self._shapes.longest else _MOST

        def fits(value: int) -> bool:
            found = self._at(setting, value)
            return found.is_enough(capacity) if certain else found.verdict(capacity) != TOO_LARGE

        # the trial's own value first: the answer must not contradict what is said of the trial itself
        own = self._config.seq_len if setting == "seq_len" else self._config.batch_size
        value = next((start for start in (min(own, most), unit) if fits(start)), 0)
        if not value:
            return 0
        while value < most and fits(min(2 * value, most)):
            value = min(2 * value, most)
        if value >= most:
            return most
        above = min(2 * value, most)
        low, high = (self._need(setting, each, certain) for each in (value, above))
        found = value + int((above - value) * (capacity - low) / (high - low))
        found = max(value, found // unit * unit)
        while certain and found > value and not fits(found):
            found = max(value, int(found * _LESS) // unit * unit)
        return found

    def _need(self, setting: str, value: int, certain: bool) -> int:
        found = self._at(setting, value)
        return found.enough if certain else found.low

    def _at(self, setting: str, value: int) -> Estimate:
        rows, length = self._config.batch_size, self._config.seq_len
        rows, length = (value, length) if setting == "batch_size" else (rows, value)
        key = (rows * length, 0) if self._by_tokens else (rows, length)
        if key not in self._known:
            self._known[key] = estimate(replace(self._config, batch_size=rows, seq_len=length), self._shapes)
        return self._known[key]
