"""What a worker says of a whole training, attempt by attempt."""

from dataclasses import dataclass, field, replace

from synthetic import step

from lora_lab.events import Ended, Evaluated, Event, PhaseBegan, Ready, WindowClosed, WindowOpened
from lora_lab.job_events import Checkpointed, JobPlanned, Resumed
from lora_lab.phase import Phase


@dataclass
class SyntheticJob:
    """What a worker says of a whole training, part by part; one second a step and 1,000 tokens in it."""

    t: float = 10.0
    """The clock."""
    events: list[Event] = field(default_factory=list)
    stretches: list[tuple[float, float]] = field(default_factory=list)
    """From when to when it trained, in complete stretches."""

    def say(self, event: Event) -> "SyntheticJob":
        self.events.append(event)
        return self

    def start(self, steps: int = 1000, resumed: int | None = None, pid: int = 17) -> "SyntheticJob":
        """A worker begins, and goes on from a checkpoint where there is one."""
        self.say(Ready(t=self.t, pid=pid, prepared=True)).say(PhaseBegan(t=self.t, phase=Phase.start.value))
        self.t += 5.0
        if resumed is not None:
            self.say(Resumed(t=self.t, step=resumed, folder=f"checkpoints/{resumed:06d}"))
        self.say(JobPlanned(t=self.t, steps=steps, steps_per_epoch=steps // 2))
        return self.say(PhaseBegan(t=self.t, phase=Phase.warm_up.value))

    def steps(self, first: int, last: int, loss: float = 2.0) -> None:
        for number in range(first, last + 1):
            self.t += 1.0
            self.say(replace(step(number, 1.0, t=self.t), loss=loss, learning_rate=1e-4))

    def stretch(self, after: int, last: int, closed: bool = True, loss: float = 2.0) -> "SyntheticJob":
        """The steps behind `after` up to `last`, as one window."""
        begin = self.t
        self.say(PhaseBegan(t=begin, phase=Phase.window.value)).say(WindowOpened(t=begin, after_step=after))
        self.steps(after + 1, last, loss)
        if closed:
            self.say(WindowClosed(t=self.t, after_step=last))
            self.stretches.append((begin, self.t))
        return self

    def evaluate(self, at: int, loss: float, seconds: float = 7.0) -> "SyntheticJob":
        self.say(PhaseBegan(t=self.t, phase=Phase.evaluation.value))
        self.t += seconds
        return self.say(Evaluated(t=self.t, phase=Phase.evaluation.value, loss=loss, rows=4, tokens=40, step=at))

    def checkpoint(self, at: int, seconds: float = 3.0) -> "SyntheticJob":
        self.say(PhaseBegan(t=self.t, phase=Phase.checkpoint.value))
        self.t += seconds
        folder = f"checkpoints/{at:06d}"
        return self.say(Checkpointed(t=self.t, step=at, folder=folder, total_bytes=10, epoch=at / 500))

    def end(self) -> "SyntheticJob":
        self.say(PhaseBegan(t=self.t, phase=Phase.saving.value))
        self.t += 2.0
        return self.say(Ended(t=self.t, outcome="finished", reason=""))
