"""Run one trial from the parent's side: check it, start the worker, watch the card, summarise, record."""

import contextlib
import os
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.cotrain import Member, Together
from lora_lab.events import Event, Ran
from lora_lab.libraries_cache import note_libraries
from lora_lab.options import Isolation
from lora_lab.outcome import End, Outcome, Unsupported, end_of
from lora_lab.placement import Placement
from lora_lab.secrets import without_secrets
from lora_lab.store.attempts import moved_from
from lora_lab.store.claim import claim
from lora_lab.store.environment import device_facts, environment
from lora_lab.store.fingerprint import point_digest
from lora_lab.store.finishing import finish
from lora_lab.store.folder_checks import check_trial_folder
from lora_lab.store.heartbeat import Heartbeat
from lora_lab.store.live_run import LiveRun
from lora_lab.store.multirun import point_latest
from lora_lab.store.outbox import Outbox, absolute, owner_tags
from lora_lab.store.process_id import this_process
from lora_lab.store.record import Record, chosen, params, run_name
from lora_lab.store.recovery import recover, remember_outside
from lora_lab.store.sweep_folder import Membership, SweepFolder
from lora_lab.store.trial_folder import RECORD, Manifest, TrialFolder
from lora_lab.telemetry.figures import GIB
from lora_lab.telemetry.host_facts import HostFacts, Stated
from lora_lab.telemetry.rapl import Rapl
from lora_lab.telemetry.sampler import RECENT, Sampler
from lora_lab.telemetry.sensors import reader
from lora_lab.trial import worker_process
from lora_lab.trial.beside import Beside
from lora_lab.trial.capacity import within_capacity
from lora_lab.trial.data_parallel import check_same_number, placement_of, settled
from lora_lab.trial.device_lock import Before, cool_down, device_lock, look_at, see_freed, temperature
from lora_lab.trial.devices import check_capable, worker_environment
from lora_lab.trial.display import Display
from lora_lab.trial.estimated import check_fits, check_free, note_estimate
from lora_lab.trial.idle_power import keep_for_block, measure_idle, of_block
from lora_lab.trial.inputs import check_folder_name, check_inputs
from lora_lab.trial.result import show_result
from lora_lab.trial.standing import show_line

_MOST_SECONDS_TO_CLAIM = 10.0
"""How long a job that goes on waits for another start that delivers its record."""

ENDED_BY_CLUSTER = "ended by the cluster"
"""How the reason begins of a trial whose node was taken back."""

INTERRUPTED = "interrupted by Ctrl-C"

_ENDING = threading.Lock()
_CPU_IS_SHARED = "trials on other slots use the CPU too, and one counter has the energy of all of it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A trial as it was asked for on the command line."""

    config: TrialConfig
    choices: dict[str, str]
    """The chosen option of each group."""
    command: str
    """The shortest command line for this configuration."""
    folder: Path
    """The folder of all files of the trial. For a trial of a sweep it is inside the sweep's folder."""
    in_sweep: bool = False
    """Whether Hydra runs it as part of a sweep. This includes other sweepers, which plan nothing."""
    member: Membership | None = None
    """Its place in a planned sweep; None for a single trial."""
    resumed: Manifest | None = None
    """The latest attempt at the job that goes on in `folder`; None for a trial that begins."""
    beside: Beside | None = None
    """Its place among trials that run side by side; None for a trial that runs alone."""
    together: Together | None = None
    """The job that it trains in with others; None for a trial alone."""
    cluster: str = ""
    """The cluster that runs it for another process, which delivers its record; empty on the user's own machine."""


@dataclass(slots=True)
class TrialState:
    """State of a trial so far. Every event is on disk before it is used."""

    request: Request
    placement: Placement
    asked: Manifest
    folder: TrialFolder
    sampler: Sampler
    display: Display
    seen: HostFacts
    sweep: SweepFolder | None
    """The sweep whose progress is shown; None for a single trial."""
    before: Before = field(default_factory=Before)
    live: LiveRun | None = None
    members: tuple[Member, ...] = ()
    """The trials that train together in its worker; none for a trial alone."""

    def on_event(self, event: Event) -> None:
        """Record and show an event of the worker."""
        self.folder.note_event(event)
        self.display.show(event)
        if self.live is not None:
            self.live.see(event)

    def warn(self, text: str) -> None:
        """Show a warning to the user, and keep it for the record."""
        self.seen.warnings.append(text)
        self.display.warn(text)


def run_session(request: Request) -> Outcome:
    """Run one trial and record it. Everything about it is in `request.folder` before any store is asked.

    Raises: InvalidInput before a worker starts (also for a single trial that cannot fit its card), and when the worker
        finds invalid input (in a sweep, which has checked all its points before, that is a recorded failure);
        KeyboardInterrupt on Ctrl-C, after the worker was ended and all measurements so far were recorded.
    """
    asked_t = time.monotonic()
    config = request.config
    check_inputs(config)
    check_folder_name(request.folder)
    if request.resumed is None:
        check_trial_folder(request.folder, config.tracking, request.in_sweep, planned=request.member is not None)
    placement = request.beside.placement if request.beside else placement_of(config)
    if request.resumed is not None:
        check_same_number(placement, request.resumed.record.tags)
    seen = seen_so_far(config, placement)
    doubt = "" if request.in_sweep or request.resumed else check_fits(config, placement, seen)
    if config.isolation is Isolation.process:
        worker_process.prepare()  # imports torch in the background while MLflow is imported here
    store = Outbox(absolute(config.tracking))
    if request.member is None:
        look_after_earlier_runs(store)
    with Heartbeat(request.folder):
        state = begin(request, placement, seen, asked_t)
        if doubt:
            state.warn(doubt)
        return _run(state, store)


def _run(state: TrialState, store: Outbox) -> Outcome:
    """Measure a prepared trial, and record it."""
    interrupted: KeyboardInterrupt | None = None
    cluster = state.request.cluster
    if not cluster:
        state.live = store.follow(state.asked, state.sampler.samples, state.display.note)
    try:
        end = measure(state)
    except KeyboardInterrupt as error:
        interrupted = error
        reason = f"{ENDED_BY_CLUSTER} ({cluster})" if cluster else INTERRUPTED
        end = End(outcome=Outcome.killed, reason=reason)
    if end.outcome is Outcome.refused:
        if state.request.member is None and state.request.resumed is None:
            state.folder.give_up()
            raise InvalidInput(end.reason)
        end = End(outcome=Outcome.failed, reason=f"refused: {end.reason}")
    finish_trial(state, end, store)
    if interrupted:
        raise interrupted
    return end.outcome


def look_after_earlier_runs(store: Outbox) -> None:
    """Record what earlier processes left behind, on disk and in the store, and report it."""
    for line in recover(store).lines():
        print(line, flush=True)
    if store.fault:
        print(f"warning: {store.outlook('the records')}", flush=True)


def begin(request: Request, placement: Placement, seen: HostFacts, asked_t: float) -> TrialState:
    """Write down what was asked and where it runs. A job that goes on keeps its record's id, name and start."""
    config, member = request.config, request.member
    owner = this_process()
    facts = environment() | device_facts(placement) | owner_tags(owner, request.folder)
    if request.resumed is None:  # a job stays the same point also where its files are found by another path
        facts["point"] = point_digest(config)
    facts["command"] = without_secrets(request.command)
    if member is not None:
        facts |= {"point": member.point, "fingerprint": member.fingerprint, "trial": str(member.number)} | member.tags
    if request.beside is not None:
        facts["slot"] = request.beside.slot
    if request.together is not None:
        facts |= request.together.facts
    if request.cluster:
        facts["cluster"] = request.cluster
    if config.vram_limit_gib is not None:
        facts["emulated_capacity_gib"] = f"{config.vram_limit_gib:g}"
    folder, rapl = TrialFolder(request.folder), Rapl(absent="" if request.beside is None else _CPU_IS_SHARED)
    seen.no_cpu_sensor = rapl.absent
    if member is None:
        remember_outside(request.folder)
        point_latest(request.folder)
    try:
        with _claimed(request):
            if request.resumed is None:
                record = _new_record(request, facts)
            else:
                facts["attempt"] = str(folder.set_aside(request.resumed))
                before = request.resumed.record.tags
                kept = {name: text for name, text in before.items() if not name.startswith("device.")}
                record = replace(request.resumed.record, tags=kept | facts)
            asked = Manifest(owner=owner, t=asked_t, tracking=absolute(config.tracking), record=record)
            folder.begin(asked, config, facts, seen)
    except OSError as error:
        raise InvalidInput(
            f"nothing can be written to {request.folder} ({error.strerror}). Make room there, or give another folder "
            "with hydra.run.dir=FOLDER (hydra.sweep.dir=FOLDER for a sweep)."
        ) from error
    recent = RECENT if config.train.is_job else None
    sampler = Sampler(reader(placement.cards, rapl), folder.note_sample, recent=recent)
    sweep = SweepFolder(request.folder.parent) if member else None
    beside = request.beside
    name, bars = (record.name, None) if beside is None else (f"{beside.slot}: {record.name}", beside.bars)
    display = Display(name, config, sampler, sweep, bars)
    state = TrialState(request, placement, asked, folder, sampler, display, seen, sweep)
    changes = moved_from(request.resumed.record.tags, facts) if request.resumed is not None else ""
    if changes:
        state.warn(f"this attempt is at another place than the one before, and their figures are joined: {changes}")
    return state


def _new_record(request: Request, facts: dict[str, str]) -> Record:
    """Return the record of a trial that begins."""
    config, member = request.config, request.member
    record = Record(
        name=run_name(config, request.choices),
        params=params(config, request.choices),
        chosen=chosen(config, request.choices, shlex.split(request.command)[3:]),
        tags=facts,
    )
    if member is not None:
        record.name, record.parent = member.name, member.parent
        record.params["repeat"] = str(member.repeat)
    if request.together is not None:  # figures of a member are comparable with those of as many members alone
        record.params["cotrain"] = f"{request.together.members} by {', '.join(config.cotrain)}"
    return record


@contextlib.contextmanager
def _claimed(request: Request) -> Iterator[None]:
    """Hold the folder of a job that goes on, until it names this process as its owner.

    Raises: InvalidInput when another process resumes the job too, or records what was left for longer than we wait."""
    if request.resumed is None:
        yield
        return
    with claim(request.folder, _MOST_SECONDS_TO_CLAIM) as is_ours:
        if TrialFolder(request.folder).manifest() != request.resumed:
            raise InvalidInput(f"another process goes on with the job in {request.folder} now. Wait for it.")
        if not is_ours:
            raise InvalidInput(
                f"another start is delivering the record of the attempt before in {request.folder}, and has not ended "
                f"within {_MOST_SECONDS_TO_CLAIM:g} s. Type the command again in a minute."
            )
        yield


def seen_so_far(config: TrialConfig, placement: Placement, members: Sequence[TrialConfig] = ()) -> HostFacts:
    """Return what is known before any measurement.

    Args:
        config: of members that train together all of them as one.
        members: each of them; none for a trial alone."""
    measure = config.measure
    seen = HostFacts(
        no_sensor="" if placement.cards else "no NVIDIA card was used",
        card_bytes=min((card.total_bytes for card in placement.cards), default=None),
        parent_pid=os.getpid(),
        members=max(1, len(members)),
        stated=Stated(
            board_power_watts=measure.board_power_watts,
            price_per_kwh=measure.price_per_kwh,
            co2_grams_per_kwh=measure.co2_grams_per_kwh,
        ),
    )
    note_estimate(seen, settled(config, placement), members)
    return seen


def measure(state: TrialState) -> End:
    """Wait for the device, run the worker to its end, wait until the device is free again.

    Raises: KeyboardInterrupt."""
    config, placement, member = state.request.config, state.placement, state.request.member
    if member is not None and member.too_large is not None:
        return End(outcome=Outcome.predicted_out_of_memory, reason=member.too_large.reason)
    try:
        check_capable(config, placement)
        with state.display, _device(state), state.sampler:
            end = worker_process.run_workers(
                replace(settled(config, placement), resume=state.request.resumed is not None),
                worker_environment(placement),
                state.folder.path,
                state.on_event,
                placement.world_size,
                state.members,
            )
    except (Unsupported, InvalidInput, OSError) as error:
        return end_of(error)
    limit, before = config.vram_limit_gib, state.before.used_bytes
    if limit is None or not before or None in before:
        return end
    state.seen.warnings.append(f"capacity emulated: {limit:g} GiB of a larger card, with its speed and power")
    _, samples, _ = state.folder.read_lines()
    return within_capacity(end, limit, before, samples)


@contextlib.contextmanager
def _device(state: TrialState) -> Iterator[None]:
    """Hold the device for this trial: lock it, look at it, let it cool down. Afterwards wait until it is free again."""
    config, placement = state.request.config, state.placement
    asked_t = time.monotonic()
    with device_lock(placement, config.share_device, state.display.note):
        state.before = look_at(placement, config.share_device)
        if state.before.shared_with:
            state.warn(f"the card was shared with {state.before.shared_with}")
        if doubt := check_free(state.seen, state.before.used_bytes):
            state.warn(doubt)
        warm = cool_down(placement, config.cooldown_celsius, state.display.note)
        if warm:
            state.warn(warm)
        _take_idle(state)
        used_before = state.seen.used_before_bytes = _together(state.before.used_bytes)
        celsius = temperature(placement)
        state.seen.metrics["time/waiting_seconds"] = time.monotonic() - asked_t
        state.folder.note_seen(state.seen)
        yield
        used_bytes, held = see_freed(placement, state.before, config.share_device)
        if held:
            state.warn(held)
        used_after = _together(used_bytes)
        readings = {
            "card/start_celsius": celsius,
            "card/used_before_gib": None if used_before is None else used_before / GIB,
            "card/used_after_gib": None if used_after is None else used_after / GIB,
        }
        state.seen.metrics |= {name: value for name, value in readings.items() if value is not None}


def _together(used: Sequence[int | None]) -> int | None:
    """Return the bytes in use on all cards; None where one has no reading, or without cards."""
    known = [each for each in used if each is not None]
    return sum(known) if known and len(known) == len(used) else None


def _take_idle(state: TrialState) -> None:
    """Measure the cards' idle power, or take what an earlier trial of the same block of this sweep measured."""
    config, member, placement, seen = state.request.config, state.request.member, state.placement, state.seen
    seconds = config.measure.idle_seconds
    if not placement.cards or not seconds or config.share_device:
        seen.no_idle = (
            "share_device=true" if placement.cards and seconds else seen.no_sensor or "measure.idle_seconds=0"
        )
        return
    folder, owner = state.folder, this_process()
    earlier = of_block(folder.path.parent, placement, member.repeat, owner) if member else None
    found = earlier or measure_idle(placement, seconds, state.display.note)
    if isinstance(found, str):
        seen.no_idle = found
        return
    with contextlib.suppress(OSError):  # on a full disk the next trial measures it again
        folder.keep_idle(*found, seen)
        if member and not earlier:
            keep_for_block(folder.path, placement, member.repeat, owner)


def finish_trial(state: TrialState, end: End, store: Outbox) -> None:
    """Summarise, write the files, hand the record to the store, show the result. Of the trials of this process one at a
    time, so that their lines do not mix, nor what they write into the store."""
    if state.request.cluster and (state.folder.path / RECORD).exists():
        return  # the process that waits for it gave this attempt up, and another one may have run
    with _ENDING:
        _record(state, end, store)


def _record(state: TrialState, end: End, store: Outbox) -> None:
    sampler, seen, beside = state.sampler, state.seen, state.request.beside
    if beside is not None:
        state.asked.record.tags["neighbours"] = ", ".join(beside.others()) or "no other trial"
    if sampler.fault:
        seen.no_sensor = seen.no_sensor or f"the sensor failed ({sampler.fault})"
    if sampler.seconds:
        seen.metrics["sampler/cpu_share"] = sampler.cpu_seconds / sampler.seconds
        seen.metrics["sampler/readings_per_second"] = sampler.taken / sampler.seconds
    alone = seen.members == 1
    if seen.estimate is None and alone:  # by now the worker has fetched a hub model's config
        note_estimate(seen, settled(state.request.config, state.placement))
    events, samples, damaged = state.folder.read_lines()  # a job of hours is not in memory
    seen.warnings += [f"{fault}; the file is left out from there on" for fault in damaged]
    record, summary = finish(state.folder, state.asked, end, events, samples, seen)
    if end.outcome is Outcome.finished and alone:
        note_libraries(state.request.config, record.tags, summary.metrics)
    if state.request.cluster:
        return  # the process that waits for it delivers and shows it
    run_id = store.deliver_trial(state.folder, record)
    if run_id is None:
        summary.warnings.append(store.outlook("the trial's record"))
    if state.sweep is not None:
        show_line(state.sweep, record, end, summary, beside.console if beside is not None else None)
        return
    places = [*(store.where(run_id) if run_id else []), f"files {state.folder.path}"]
    if end.outcome not in (Outcome.finished, Outcome.diverged) and state.folder.can_go_on:
        places.append(f"to go on from its last checkpoint: {state.folder.resume_command}")
    stand_ins = [stand_in for event in events if isinstance(event, Ran) for stand_in in event.stand_ins]
    show_result(end, summary, stand_ins, places, state.folder.path)
