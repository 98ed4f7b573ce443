"""Write down a training step as allocations and frees, and find the moment at which most is held."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Tape:
    """The allocations of a step in their order. A tensor is known by its number."""

    events: list[tuple[int, int]] = field(default_factory=list)
    """A tensor's number, and its bytes: positive where it begins, negative where it ends."""
    parts: list[str] = field(default_factory=list)
    """What each tensor belongs to, by its number."""
    sizes: list[int] = field(default_factory=list)
    """Bytes of each tensor, by its number."""

    loaded: int = 0
    """Events before the first step."""
    returns_cached: bool = False
    """Whether what is cached after loading is returned to the driver."""

    is_expandable: bool = True
    """Whether the allocator's segments grow, see lora_lab/segments.py."""
    has_own_pool: bool = False
    """Whether steps have addresses of their own, as those on another stream and of a CUDA graph do."""
    is_recorded: bool = False
    """Whether the step is recorded as a CUDA graph: once, and while nothing that is cached is returned."""

    def new(self, size: float, part: str) -> int:
        """Begin a tensor of `size` bytes; return its number."""
        number = len(self.sizes)
        self.sizes.append(int(size))
        self.parts.append(part)
        self.events.append((number, int(size)))
        return number

    def free(self, *numbers: int | None) -> None:
        """End tensors; None is none."""
        self.events.extend((number, -self.sizes[number]) for number in numbers if number is not None)

    def end(self, part: str, after: int) -> None:
        """End every tensor of a part that began after tensor number `after`."""
        self.free(*(number for number in range(after, len(self.sizes)) if self.parts[number] == part))

    def loading_peak(self) -> int:
        """Return the most bytes that are held before the first step."""
        held = most = 0
        for _, size in self.events[: self.loaded]:
            held += size
            most = max(most, held)
        return most

    def peak(self) -> Counter[str]:
        """Return bytes by part at the moment after loading at which their sum is largest."""
        held = most = 0
        moment = -1
        for place, (_, size) in enumerate(self.events):
            held += size
            if held > most and place >= self.loaded:
                most, moment = held, place
        found: Counter[str] = Counter()
        for number, size in self.events[: moment + 1]:
            found[self.parts[number]] += size
        return found
