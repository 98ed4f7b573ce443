"""One trial from the parent's side: check, start the worker, watch the card, summarise, record."""

import contextlib
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_lab.config import (
    DataSource,
    InvalidInput,
    Isolation,
    MeasureConfig,
    ModelSource,
    TrackingKind,
    TrialConfig,
    Weights,
)
from lora_lab.dataset.rows import SHIPPED, check_row_count, read_jsonl
from lora_lab.events import Event, Ran
from lora_lab.outcome import End, Outcome, Unsupported, end_of
from lora_lab.packages import converted_folder, locate
from lora_lab.secrets import without_secrets
from lora_lab.store.environment import device_facts, environment
from lora_lab.store.fingerprint import point_digest
from lora_lab.store.folder_checks import check_trial_folder
from lora_lab.store.local_store import check_writable
from lora_lab.store.multirun import point_latest
from lora_lab.store.outbox import Outbox, absolute, owner_tags, recover, remember_outside
from lora_lab.store.process_id import this_process
from lora_lab.store.record import Record, chosen, params, run_name
from lora_lab.store.sweep_folder import Planned, SweepFolder
from lora_lab.store.trial_folder import Manifest, TrialFolder
from lora_lab.telemetry.figures import GIB
from lora_lab.telemetry.host_facts import HostFacts, Stated
from lora_lab.telemetry.nvml import Card
from lora_lab.telemetry.rapl import Rapl
from lora_lab.telemetry.sampler import Sampler
from lora_lab.telemetry.sensors import reader
from lora_lab.trial import worker_process
from lora_lab.trial.device_lock import Before, cool_down, device_lock, look_at, see_freed, temperature
from lora_lab.trial.devices import check_capable, choose_card, worker_environment
from lora_lab.trial.display import Display, show_result
from lora_lab.trial.idle_power import keep_for_block, measure_idle, of_block
from lora_lab.trial.standing import show_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for on the command line."""

    config: TrialConfig
    choices: dict[str, str]
    """The chosen option of each group."""
    command: str
    """The shortest command line for this configuration."""
    folder: Path
    """Gets every file of the trial; inside a sweep's folder for a trial of a sweep."""
    in_sweep: bool = False
    """Hydra runs it as a part of a sweep."""


@dataclass(slots=True)
class TrialState:
    """What is known of a trial so far; every event is on disk before anything is done with it."""

    request: Request
    card: Card | None
    asked: Manifest
    folder: TrialFolder
    sampler: Sampler
    display: Display
    seen: HostFacts
    planned: Planned | None
    """Its place in a sweep; None for a trial alone."""
    events: list[Event] = field(default_factory=list)
    before: Before = field(default_factory=Before)

    def on_event(self, event: Event) -> None:
        """Take in what the worker says."""
        self.folder.note_event(event)
        self.events.append(event)
        self.display.show(event)

    def warn(self, text: str) -> None:
        """Something for the user now and for the record."""
        self.seen.warnings.append(text)
        self.display.warn(text)


def run_session(request: Request) -> Outcome:
    """Run one trial and record it. Everything about it is in `request.folder` before any store is asked.

    Raises: InvalidInput before a worker starts, and when the worker finds that the input cannot be meant (in a
    sweep, which has looked at all its points before, that is a recorded failure); KeyboardInterrupt on Ctrl-C,
    after the worker has been ended and what there is has been recorded.
    """
    asked_t = time.monotonic()
    config = request.config
    check_inputs(config)
    check_folder_name(request.folder)
    check_trial_folder(request.folder, config.tracking, request.in_sweep)
    in_sweep = SweepFolder(request.folder.parent).exists  # with another sweeper of Hydra's there is no plan
    card = choose_card(config.device)
    if config.isolation is Isolation.process:
        worker_process.prepare()  # imports torch in the background while MLflow is imported here
    store = Outbox(absolute(config.tracking))
    if not in_sweep:
        look_after_earlier_runs(store)
    state = _begin(request, card, asked_t)
    interrupted: KeyboardInterrupt | None = None
    try:
        end = _measure(state)
    except KeyboardInterrupt as error:
        interrupted = error
        end = End(outcome=Outcome.killed, reason="interrupted by Ctrl-C")
    if end.outcome is Outcome.refused:
        if not in_sweep:
            state.folder.give_up()
            raise InvalidInput(end.reason)
        end = End(outcome=Outcome.failed, reason=f"refused: {end.reason}")
    _finish(state, end, store)
    if interrupted:
        raise interrupted
    return end.outcome


def check_inputs(config: TrialConfig) -> None:
    """Raise InvalidInput for what can be seen from here without torch: files, folders, packages."""
    if config.data.source in (DataSource.jsonl, DataSource.shipped):
        shipped = config.data.source is DataSource.shipped
        rows = read_jsonl(SHIPPED if shipped else Path(str(config.data.path)), config.data.columns, config.data.rows)
        check_row_count(len(rows), config.data.holdout, config.batch_size * config.grad_accum_steps)
    if config.model.weights is Weights.pretrained:
        package = config.model.package
        if config.model.source is ModelSource.package and package and not converted_folder(package).is_dir():
            locate(package)
        if config.model.source is ModelSource.local and not (Path(str(config.model.path)) / "config.json").is_file():
            raise InvalidInput(
                f"model.path={config.model.path} holds no config.json (looked in {Path.cwd()}). "
                "Give a folder that save_pretrained made."
            )
    if config.tracking.kind is TrackingKind.local:
        check_writable(config.tracking)


def check_folder_name(folder: Path) -> None:
    """Raise InvalidInput for a folder that is named after a secret; its name would be in every record."""
    name = os.path.relpath(folder)
    if without_secrets(name) != name:
        with contextlib.suppress(OSError):  # Hydra has made it already
            folder.rmdir()
        raise InvalidInput(
            "the name of the folder for the results (hydra.run.dir, hydra.sweep.dir) holds a password or token and "
            "would be written into the record. Give another name."
        )


def look_after_earlier_runs(store: Outbox) -> None:
    """Record what earlier processes have left behind, on disk and in the store, and say so."""
    for line in recover(store).lines():
        print(line, flush=True)
    if store.fault:
        print(f"warning: {store.outlook('the records')}", flush=True)


def _begin(request: Request, card: Card | None, asked_t: float) -> TrialState:
    """Write what was asked and where it runs."""
    config = request.config
    sweep = SweepFolder(request.folder.parent)
    planned = sweep.planned(request.folder)
    owner = this_process()
    facts = environment() | device_facts(card) | owner_tags(owner, request.folder)
    facts["point"] = point_digest(config)
    facts["command"] = without_secrets(request.command)
    record = Record(
        name=run_name(config, request.choices),
        params=params(config, request.choices),
        chosen=chosen(config, request.choices, shlex.split(request.command)[3:]),
        tags=facts,
    )
    if planned is not None:
        record.name, record.parent = planned.name, sweep.read().record.id
        record.params["repeat"] = str(planned.repeat)
        facts |= {"point": planned.point, "fingerprint": planned.fingerprint, "trial": str(planned.number)}
    if config.vram_limit_gib is not None:
        facts["emulated_capacity_gib"] = f"{config.vram_limit_gib:g}"
    asked = Manifest(owner=owner, t=asked_t, tracking=absolute(config.tracking), record=record)
    folder, rapl = TrialFolder(request.folder), Rapl()
    seen = _seen_so_far(config.measure, card, rapl)
    if planned is None:
        remember_outside(request.folder)
        point_latest(request.folder)
    try:
        folder.begin(asked, config, facts, seen)
    except OSError as error:
        raise InvalidInput(
            f"nothing can be written to {request.folder} ({error.strerror}). Make room there, or give another folder "
            "with hydra.run.dir=FOLDER (hydra.sweep.dir=FOLDER for a sweep)."
        ) from error
    sampler = Sampler(reader(card, rapl), folder.note_sample)
    steps = config.measure.warmup_steps + config.measure.steps
    display = Display(record.name, steps, sampler, sweep if planned else None)
    return TrialState(request, card, asked, folder, sampler, display, seen, planned)


def _seen_so_far(measure: MeasureConfig, card: Card | None, rapl: Rapl) -> HostFacts:
    """What can be known before anything is looked at."""
    return HostFacts(
        no_sensor="" if card else "no NVIDIA card was used",
        no_cpu_sensor=rapl.absent,
        card_bytes=card.total_bytes if card else None,
        parent_pid=os.getpid(),
        stated=Stated(
            board_power_watts=measure.board_power_watts,
            price_per_kwh=measure.price_per_kwh,
            co2_grams_per_kwh=measure.co2_grams_per_kwh,
        ),
    )


def _measure(state: TrialState) -> End:
    """Wait for the device, run the worker to its end, see the device free again.

    Raises: KeyboardInterrupt."""
    config, card = state.request.config, state.card
    try:
        check_capable(config, card)
        with state.display, _device(state), state.sampler:
            end = worker_process.run_worker(config, worker_environment(card), state.folder.path, state.on_event)
    except (Unsupported, InvalidInput, OSError) as error:
        return end_of(error)
    return _within_capacity(state, end)


@contextlib.contextmanager
def _device(state: TrialState) -> Iterator[None]:
    """The device for this trial alone: locked, looked at, cooled down; and seen free again afterwards."""
    config, card = state.request.config, state.card
    asked_t = time.monotonic()
    with device_lock(card, config.share_device, state.display.note):
        state.before = look_at(card, config.share_device)
        if state.before.shared_with:
            state.warn(f"the card was shared with {state.before.shared_with}")
        warm = cool_down(card, config.cooldown_celsius, state.display.note)
        if warm:
            state.warn(warm)
        _take_idle(state)
        state.seen.used_before_bytes = state.before.used_bytes
        celsius = temperature(card)
        state.seen.metrics["time/waiting_seconds"] = time.monotonic() - asked_t
        state.folder.note_seen(state.seen)
        yield
        used_bytes, held = see_freed(card, state.before, config.share_device)
        if held:
            state.warn(held)
        readings = {
            "card/start_celsius": celsius,
            "card/used_before_gib": None if state.before.used_bytes is None else state.before.used_bytes / GIB,
            "card/used_after_gib": None if used_bytes is None else used_bytes / GIB,
        }
        state.seen.metrics |= {name: value for name, value in readings.items() if value is not None}


def _take_idle(state: TrialState) -> None:
    """What the card draws at rest: measured now, or by an earlier trial of the same block of this sweep."""
    config, card, seen, planned = state.request.config, state.card, state.seen, state.planned
    seconds = config.measure.idle_seconds
    if card is None or not seconds or config.share_device:
        seen.no_idle = "share_device=true" if card and seconds else seen.no_sensor or "measure.idle_seconds=0"
        return
    folder, owner = state.folder, this_process()
    earlier = of_block(folder.path.parent, card, planned.repeat, owner) if planned else None
    found = earlier or measure_idle(card, seconds, state.display.note)
    if isinstance(found, str):
        seen.no_idle = found
        return
    with contextlib.suppress(OSError):  # on a full disk the next trial measures it again
        folder.keep_idle(*found, seen)
        if planned and not earlier:
            keep_for_block(folder.path, card, planned.repeat, owner)


def _within_capacity(state: TrialState, end: End) -> End:
    """With vram_limit_gib: was the card's own reading within the limit? The allocator's cap can't hold what others
    allocate (the context, libraries, managed memory)."""
    limit, before = state.request.config.vram_limit_gib, state.before.used_bytes
    if limit is None or before is None:
        return end
    state.seen.warnings.append(f"capacity emulated: {limit:g} GiB of a larger card, whose speed and power these are")
    used = [sample.used_bytes - before for sample in state.sampler.samples if sample.used_bytes is not None]
    peak_gib = max(used, default=0) / GIB
    if end.outcome is not Outcome.finished or peak_gib <= limit:
        return end
    return End(
        outcome=Outcome.out_of_memory,
        reason=f"the card's reading rose by {peak_gib:.2f} GiB, beyond vram_limit_gib={limit:g}: torch kept to its "
        "share, but CUDA's context, libraries and managed memory did not leave room for it",
    )


def _finish(state: TrialState, end: End, store: Outbox) -> None:
    """Summarise, write the files, hand the record to the store, tell the user."""
    sampler, seen = state.sampler, state.seen
    if sampler.fault:
        seen.no_sensor = seen.no_sensor or f"the sensor failed ({sampler.fault})"
    if sampler.seconds:
        seen.metrics["sampler/cpu_share"] = sampler.cpu_seconds / sampler.seconds
        seen.metrics["sampler/readings_per_second"] = len(sampler.samples) / sampler.seconds
    record, summary = state.folder.finish(state.asked, end, state.events, sampler.samples, seen)
    run_id = store.deliver_trial(state.folder, record)
    if run_id is None:
        summary.warnings.append(store.outlook("the trial's record"))
    if record.parent is not None:
        show_line(SweepFolder(state.folder.path.parent), record, end, summary)
        return
    places = [*(store.where(run_id) if run_id else []), f"files {state.folder.path}"]
    stand_ins = [stand_in for event in state.events if isinstance(event, Ran) for stand_in in event.stand_ins]
    show_result(end, summary, stand_ins, places)
