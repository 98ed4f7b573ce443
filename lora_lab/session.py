"""One trial from the parent's side: check, start the worker, watch the card, summarise, record."""

import contextlib
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from lora_lab import processes
from lora_lab.config import DataSource, Isolation, ModelSource, RefusedInput, TrialConfig, Weights
from lora_lab.devices import choose_card, refuse_incapable, worker_environment
from lora_lab.display import Display, show_result
from lora_lab.environment import environment
from lora_lab.events import Event, Phase, PhaseBegan, Ran, encode
from lora_lab.outcome import End, Outcome, Unsupported, end_of
from lora_lab.packages import converted_folder, locate
from lora_lab.records import Record, complete, params, plain, run_name, without_secrets
from lora_lab.rows import SHIPPED, read_jsonl, refuse_too_few
from lora_lab.telemetry.nvml import Card
from lora_lab.telemetry.sampler import Sampler
from lora_lab.telemetry.summary import summarise
from lora_lab.tracking import Tracker, TrackingFailed, open_tracker, refuse_unwritable


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for on the command line."""

    config: TrialConfig
    choices: dict[str, str]
    """The chosen option of each group."""
    overrides: list[str]
    folder: Path
    """Gets every file of the trial."""


@dataclass(slots=True)
class _Story:
    """What is known of a trial so far; every event is on disk before anything is done with it."""

    request: Request
    record: Record
    tracker: Tracker | None
    events: list[Event] = field(default_factory=list)
    run_id: str | None = None
    tracking_fault: str = ""


def run_session(request: Request) -> Outcome:
    """Run one trial and record it. Everything about it is in `request.folder` before any store is asked.

    Raises: RefusedInput before a worker starts, and when the worker finds that the input cannot be meant;
    KeyboardInterrupt on Ctrl-C, after the worker has been ended and what there is has been recorded.
    """
    config = request.config
    _refuse_unusable(config)
    card = choose_card(config.device)
    if config.isolation is Isolation.process:
        processes.prepare()  # imports torch in the background while MLflow is imported here
    request.folder.mkdir(parents=True, exist_ok=True)
    story = _begin(request, card)
    sampler = Sampler(card.sample if card else None)
    interrupted: KeyboardInterrupt | None = None
    try:
        refuse_incapable(config, card)
        with (
            sampler,
            Display(story.record.name, config.measure.warmup_steps + config.measure.steps, sampler) as display,
        ):
            if story.tracking_fault:
                display.warn(_kept_where(story))
            end = _work(story, worker_environment(card), display)
    except Unsupported as error:
        end = End(outcome=Outcome.unsupported, reason=str(error))
    except OSError as error:
        end = end_of(error)  # the disk is full, say
    except KeyboardInterrupt as error:
        interrupted = error
        end = End(outcome=Outcome.killed, reason="interrupted by Ctrl-C")
    if end.outcome is Outcome.refused:
        _discard_run(story)
        raise RefusedInput(end.reason)
    _finish(story, end, sampler, "" if card else "no NVIDIA card was used")
    if interrupted:
        raise interrupted
    return end.outcome


def _refuse_unusable(config: TrialConfig) -> None:
    """Raise RefusedInput for what can be seen from here without torch: files, folders, packages."""
    if config.data.source in (DataSource.jsonl, DataSource.shipped):
        shipped = config.data.source is DataSource.shipped
        rows = read_jsonl(SHIPPED if shipped else Path(str(config.data.path)), config.data.columns, config.data.rows)
        refuse_too_few(len(rows), config.data.holdout, config.batch_size * config.grad_accum_steps)
    if config.model.weights is Weights.pretrained:
        package = config.model.package
        if config.model.source is ModelSource.package and package and not converted_folder(package).is_dir():
            locate(package)
        if config.model.source is ModelSource.local and not (Path(str(config.model.path)) / "config.json").is_file():
            raise RefusedInput(
                f"model.path={config.model.path} holds no config.json (looked in {Path.cwd()}). "
                "Give a folder that save_pretrained made."
            )
    if config.tracking.kind.name == "local":
        refuse_unwritable(config.tracking)


def _begin(request: Request, card: Card | None) -> _Story:
    """Write what was asked and where it runs, and open the tracker."""
    facts = environment()
    if card:
        facts |= {"device": card.name, "device.uuid": card.uuid, "device.driver": card.driver}
        facts["device.memory_gib"] = f"{card.total_bytes / 2**30:.1f}"
    else:
        facts["device"] = f"cpu ({platform.machine()})"
    asked = params(request.config, request.choices)
    overrides = " ".join(without_secrets(override) for override in request.overrides)
    composed = yaml.safe_dump(plain(request.config), sort_keys=False)
    (request.folder / "config.yaml").write_text(composed, encoding="utf-8")
    facts["command"] = f"python -m lora_lab {overrides}".strip()
    _write_json(request.folder / "environment.json", facts)
    record = Record(name=run_name(request.config, request.choices), params=asked, tags=facts)
    try:
        return _Story(request, record, open_tracker(request.config.tracking))
    except TrackingFailed as fault:
        return _Story(request, record, None, tracking_fault=str(fault))


def _work(story: _Story, environ: dict[str, str], display: Display) -> End:
    """Run the worker to its end."""
    with (story.request.folder / "events.jsonl").open("w", encoding="utf-8", buffering=1) as journal:

        def on_event(event: Event) -> None:
            journal.write(encode(event) + "\n")
            story.events.append(event)
            display.show(event)
            # not sooner, so that input which the worker refuses leaves no run behind; later, the window would feel it
            if isinstance(event, PhaseBegan) and event.phase == Phase.model.value:
                _begin_run(story)

        return processes.run_worker(story.request.config, environ, story.request.folder, on_event)


def _begin_run(story: _Story) -> None:
    if story.tracker is None:
        return
    try:
        story.run_id = story.tracker.begin(story.record)
    except TrackingFailed as fault:
        story.tracking_fault = str(fault)


def _discard_run(story: _Story) -> None:
    """Some input is refused only while the model is loaded, when the run has begun already."""
    if story.tracker is None or story.run_id is None:
        return
    with contextlib.suppress(TrackingFailed):
        story.tracker.discard(story.run_id)


def _finish(story: _Story, end: End, sampler: Sampler, no_sensor: str) -> None:
    """Summarise, write the files, hand the record to the tracker, tell the user."""
    folder = story.request.folder
    if sampler.fault:
        no_sensor = no_sensor or f"the sensor failed ({sampler.fault})"
    summary = summarise(story.events, sampler.samples, no_sensor)
    complete(story.record, end, story.events, sampler.samples, summary, time.time() - time.monotonic())
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(asdict(sample)) + "\n" for sample in sampler.samples)
    if end.traceback:
        (folder / "traceback.txt").write_text(end.traceback, encoding="utf-8")
    _write_json(folder / "summary.json", asdict(summary))
    story.record.folder = folder
    _write_json(folder / "record.json", asdict(story.record) | {"folder": os.fspath(folder)})
    places = [f"files {folder}"]
    try:
        if story.tracker is not None and not story.tracking_fault:
            story.run_id = story.run_id or story.tracker.begin(story.record)
            story.tracker.finish(story.run_id, story.record)
            places = [*story.tracker.where(story.run_id), *places]
    except TrackingFailed as fault:
        story.tracking_fault = str(fault)
    if story.tracking_fault:
        summary.warnings.append(_kept_where(story))
    stand_ins = [stand_in for event in story.events if isinstance(event, Ran) for stand_in in event.stand_ins]
    show_result(end, summary, stand_ins, places)


def _kept_where(story: _Story) -> str:
    return f"{story.tracking_fault}; nothing is lost, the trial's records are in {story.request.folder}"


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
