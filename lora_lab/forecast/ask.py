"""Ask how long a trial will take: what it has to do, on which device, and the best source of a step's time."""

import sys
from dataclasses import dataclass
from pathlib import Path

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.forecast.cards import PublishedCard
from lora_lab.forecast.estimate import Forecast, forecast, mean_step
from lora_lab.forecast.fitted import constants
from lora_lab.forecast.look import look
from lora_lab.forecast.roofline import Roofline, Speeds, StepTime
from lora_lab.forecast.sources import Source, between, half_of, of_rates, of_trials, same_settings
from lora_lab.machine import cpu_name
from lora_lab.placement import Placement
from lora_lab.store.errors import TrackingFailed
from lora_lab.store.stored_runs import open_store
from lora_lab.store.trials import Trial
from lora_lab.trial.devices import choose_placement
from lora_lab.work import Workload


@dataclass(frozen=True, slots=True)
class Device:
    """The device of a forecast."""

    name: str
    """As trials record it."""
    speeds: Speeds
    limit_watts: float | None
    is_cpu: bool
    is_here: bool


@dataclass(frozen=True, slots=True)
class Question:
    """A trial on a device, whose work is counted."""

    config: TrialConfig
    work: Workload
    device: Device
    roofline: Roofline
    step: StepTime
    """Of a mean step, by the roofline."""

    def answer(self, probed: Path | None) -> Forecast:
        """Return the forecast from the best source there is.

        Args:
            probed: the folder of a probe, which is then the source.

        Raises: InvalidInput where its record cannot be read."""
        source = _source(self.config, self.device, self.roofline, self.step, probed)
        return forecast(self.config, self.work, self.roofline, source, constants().power, self.device.limit_watts)


def ask(config: TrialConfig, named: PublishedCard | None = None) -> Question:
    """Count a trial's work, and look at its device.

    Args:
        named: a card that is not here; None for the device that the trial would run on.

    Raises: InvalidInput, BrokenProcessPool."""
    if config.placement.kind.shares_trials:
        raise InvalidInput(
            f"placement={config.placement.kind.name}: how long the cards wait for each other was not measured, so the "
            "time of a trial over several is not forecast. Leave it out for the time on one card, or run a short "
            "trial: measure=quick."
        )
    work, device = _look(config, named)
    if work.model.counted is None:
        raise InvalidInput(
            "this model's products cannot be counted (a mixture of experts, or layers that are not known here), so its "
            "time cannot be calculated. Run a short trial: measure=quick."
        )
    found = constants()
    roofline = Roofline(config, work.model, device.speeds, found.cpu.constants if device.is_cpu else found.constants)
    return Question(config, work, device, roofline, mean_step(config, work, roofline))


def _look(config: TrialConfig, named: PublishedCard | None) -> tuple[Workload, Device]:
    """Return the work, and the device it is for."""
    if named is not None:
        speeds = named.speeds(config)
        work, _ = look(config, Placement(), None)
        return work, Device(named.name, speeds, named.watts, is_cpu=False, is_here=False)
    placement = choose_placement(config.device)
    work, rates = look(config, placement, lambda text: print(text, file=sys.stderr))
    assert rates is not None
    speeds = Speeds(rates.matmul.flops_per_second, rates.bytes_per_second)
    if not placement.cards:
        return work, Device(cpu_name(), speeds, None, is_cpu=True, is_here=True)
    card = placement.cards[0]
    return work, Device(card.name, speeds, card.limit_watts(), is_cpu=False, is_here=True)


def _source(config: TrialConfig, device: Device, roofline: Roofline, step: StepTime, probed: Path | None) -> Source:
    """Return the best source there is: trials of the same settings, the probe among them, or the rates."""
    found = constants()
    if probed is not None:
        own = [trial for trial in _trials() if trial.tags.get("folder") == str(probed.resolve())]
        if not own:
            raise InvalidInput(f"the probe's record in {probed} cannot be read.")
        half = found.probe.host.half if device.is_cpu else half_of(found.probe, step)
        return of_trials(own, roofline, config, "a probe on this machine, just now", half)
    own = same_settings(_trials(), config, device.name) if device.is_here else []
    if own:
        half = max(half_of(found.stored, step), half_of(found.probe, step))
        half = found.stored.host.half if device.is_cpu else half
        many = f"{len(own)} finished trials" if len(own) > 1 else "a finished trial"
        return of_trials(own, roofline, config, f"{many} of these settings on {device.name}", between(half, len(own)))
    measured = any(kind in device.name for kind in found.cards)
    return of_rates(step, found, device.name, measured, device.is_cpu)


def _trials() -> list[Trial]:
    """Return the own trials; none where there is no store."""
    try:
        trials, _ = open_store(None).runs()
    except (InvalidInput, TrackingFailed):
        return []
    return trials
