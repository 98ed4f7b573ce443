"""The measured part of a trial, cut out of its events."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.events import Event, Step, WindowClosed, WindowOpened


@dataclass(frozen=True, slots=True)
class Window:
    """Steps between two moments at which the device was idle."""

    start: float
    """time.monotonic() seconds."""
    end: float
    steps: tuple[Step, ...]

    @property
    def seconds(self) -> float:
        """Length of the window."""
        return self.end - self.start


def find_window(events: Sequence[Event]) -> Window | None:
    """The window, or None when it never opened, never closed, or a step's loss never arrived: figures of half a
    window are not kept, nor those of a whole one with a part of its steps."""
    opened = next((event for event in events if isinstance(event, WindowOpened)), None)
    closed = next((event for event in events if isinstance(event, WindowClosed)), None)
    if opened is None or closed is None or closed.t <= opened.t:
        return None
    steps = (event for event in events if isinstance(event, Step))
    inside = tuple(step for step in steps if opened.after_step < step.step <= closed.after_step)
    whole = inside and len(inside) == closed.after_step - opened.after_step
    return Window(opened.t, closed.t, inside) if whole else None
