"""Run a sweep: check every point of a grid before the first runs, run them in blocks, resume where a sweep stopped.

Hydra instantiates `Grid` through hydra_plugins/lora_lab_grid.py and calls `sweep`."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from lora_lab.comparison.rule import RULE_TAG, Rule
from lora_lab.composition.arguments import quoted
from lora_lab.composition.hydra_errors import COMPOSING
from lora_lab.config import AUTO, InvalidInput, TrialConfig
from lora_lab.options import ClusterKind, Isolation
from lora_lab.outcome import EXIT_INTERRUPTED, EXIT_REFUSED
from lora_lab.placement import Placement
from lora_lab.store.environment import device_facts, environment
from lora_lab.store.folder_checks import check_chdir, check_sweep_folder
from lora_lab.store.multirun import point_latest
from lora_lab.store.outbox import Outbox, absolute, owner_tags
from lora_lab.store.process_id import this_process
from lora_lab.store.record import RUNNING, Record
from lora_lab.store.recovery import remember_outside
from lora_lab.store.sweep_folder import Membership, Plan, Planned, SweepFolder
from lora_lab.sweep.alone import alone
from lora_lab.sweep.checks import check_new, check_points
from lora_lab.sweep.cluster.asking import ask_a_node, check_on_cluster
from lora_lab.sweep.cluster.choice import engine_of
from lora_lab.sweep.cluster.engine import Engine
from lora_lab.sweep.cluster.node import Node
from lora_lab.sweep.cluster.nodes import Nodes, attempt_to_run, jobs_folder, take_back
from lora_lab.sweep.contrasts import check_same, rule_of, rule_text
from lora_lab.sweep.cotraining import Joint, by_job, jobs_of
from lora_lab.sweep.display import show_forecast, show_rule
from lora_lab.sweep.ending import code_of, end_sweep
from lora_lab.sweep.fitting import Judged, judged, show_judged
from lora_lab.sweep.forecasting import forecast_line
from lora_lab.sweep.halving import Halving, HalvingConf, note_best, run_rungs
from lora_lab.sweep.largest import Search, marked, note_answers, run_searches, searches_of, with_first_values
from lora_lab.sweep.plan import GridPoint, plan_trials
from lora_lab.sweep.points import combinations, compose_points, conditions_here
from lora_lab.sweep.record import sweep_record
from lora_lab.sweep.resuming import earlier, pending_of
from lora_lab.sweep.side_by_side import Job, Runner, Threads, failures, launch_side_by_side
from lora_lab.sweep.slots import Slot, check_side_by_side, slots_of, whole
from lora_lab.trial import worker_process
from lora_lab.trial.data_parallel import placement_of
from lora_lab.trial.inputs import check_folder_name
from lora_lab.trial.session import look_after_earlier_runs
from lora_lab.work import Workload


@dataclass
class GridConf:
    """The keys below hydra.sweeper. A preset under conf/sweep/ sets them."""

    _target_: str = "hydra_plugins.lora_lab_grid.GridSweeper"
    params: dict[str, str] = field(default_factory=dict)
    """A grid: the values of each key, separated by commas."""
    points: list[str] | None = None
    """Points that do not form a grid: a line of overrides for each. Together with params, each point gets that grid."""
    assumptions: list[str] | None = None
    """What a preset assumes; shown before the sweep and kept in its record."""
    halving: HalvingConf = field(default_factory=HalvingConf)
    """Search the best value of one setting for each point, where rungs are given: see halving.py."""
    trial: str = ""
    """The trial's Membership as JSON. The sweep sets it for each trial; it is not for users."""


ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridConf, provider="lora_lab")


class Grid(Sweeper):
    """The project's sweeper for Hydra."""

    def __init__(
        self,
        params: dict[str, str] | None = None,
        points: list[str] | None = None,
        assumptions: list[str] | None = None,
        halving: DictConfig | None = None,
        trial: str = "",
    ) -> None:
        self._params = dict(params or {})
        self._lines = list(points or [""])
        self._assumptions = list(assumptions or [])
        self._asked_halving = halving if halving is not None and halving.rungs else None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra passes before it calls `sweep`."""
        self._context = hydra_context
        self._config = config
        self._task = task_function
        self._slots: list[Slot] = []
        self._jobs: dict[str, str] = {}
        self._node: Node | None = None
        self._halving: Halving | None = None
        self._launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run every point, and exit through SystemExit with the sweep's exit code."""
        try:
            found = combinations(self._context.config_loader, self._params, self._lines, arguments)
            COMPOSING.over()
            code = self._run(found, arguments)
        except InvalidInput as refusal:
            COMPOSING.over()
            print(f"Refused, no trial was started:\n{refusal}", file=sys.stderr)
            code = EXIT_REFUSED
        sys.stdout.flush()
        raise SystemExit(code)

    def _run(self, overrides: list[list[str]], arguments: Sequence[str]) -> int:
        searches, points = self._composed(overrides)
        first = points[0].config
        self._slots = slots_of(first)
        check_side_by_side(points, self._config)
        check_on_cluster(points, self._config)
        self._jobs = jobs_of(points)
        if first.isolation is Isolation.process:
            worker_process.prepare()  # imports torch in the background
        store = Outbox(absolute(first.tracking))
        look_after_earlier_runs(store)
        new = SweepFolder(Path(self._config.hydra.sweep.dir).resolve())
        self._asked = first
        check_folder_name(new.path)
        check_chdir(self._config.hydra.job.chdir)
        check_sweep_folder(new.path, first.tracking)
        if first.cluster.kind is not ClusterKind.local:
            self._node = ask_a_node(first, new.path)
            points = [replace(point, conditions=conditions_here(point.config, self._node)) for point in points]
        if self._halving is not None:
            self._halving.take(points, searches, self._point)
        rule = rule_of(points) if first.repeats == AUTO else None
        memory = judged(points) if first.resume else Judged()
        found = earlier(points, self._first_trials(points), memory, new) if first.resume else None
        folder = found[0] if found else new
        with alone(folder):
            works: dict[str, Workload] = {}
            if found:
                trials = found[1]
            else:
                works = check_new(points, new, self._node)
                if self._halving is not None:
                    self._halving.take(points, searches, self._point)
                memory = judged(points)
                trials = memory.once(self._first_trials(points))
            show_judged(memory, trials)
            if rule is not None:
                return self._compare(folder, trials, points, arguments, rule, store)
            pending = pending_of(folder, trials, memory)
            if found and not self._node:
                take_back(folder, pending)
            if found:
                works = check_points(folder, [point for point in points if point.digest in {t.point for t in pending}])
            for assumption in self._assumptions:
                Console(file=sys.stdout).print(f"assumed: {assumption}", highlight=False, markup=False)
            to_run = [trial for trial in pending if trial.point not in memory.too_large]
            forecast = forecast_line(points, to_run, works) + _at_once(self._workers)
            show_forecast(folder.path, trials, pending, memory.too_large, forecast)
            for line in [*(search.plan_line for search in searches), *self._rung_lines]:
                print(line)
            self._write_plan(folder, trials, points, arguments, None)
            code = self._launch(folder, pending, store, memory) if pending else 0
            if searches:
                return self._search(folder, searches, points, store, code)
            if self._halving is not None:
                return self._halve(folder, self._halving, store, code)
            end_sweep(folder, trials, store, code)
            return code or code_of(folder, trials)

    def _composed(self, overrides: list[list[str]]) -> tuple[list[Search], list[GridPoint]]:
        """Return the searches for max and the first points: of a search its first value, with halving the first
        rung."""
        if self._asked_halving is not None:
            self._halving = Halving(self._asked_halving, overrides)
            overrides = [self._halving.at(each, 0) for each in overrides]
        searches = searches_of(overrides, self._point)
        composed = compose_points(self._context.config_loader, self._config, with_first_values(overrides, searches))
        return searches, marked(composed, searches)

    def _compare(
        self,
        folder: SweepFolder,
        trials: list[Planned],
        points: list[GridPoint],
        arguments: Sequence[str],
        rule: Rule,
        store: Outbox,
    ) -> int:
        """Run blocks of all points until the rule has its answers or the budget is used up."""
        from lora_lab.sweep.auto import judged, run_blocks  # scipy, which other sweeps need not wait for

        for assumption in self._assumptions:
            Console(file=sys.stdout).print(f"assumed: {assumption}", highlight=False, markup=False)
        self._write_plan(folder, trials, points, arguments, rule)
        show_rule(folder.path, rule, len(points))
        code = run_blocks(folder, points, lambda block: self._launch(folder, block, store, Judged()))
        plan = folder.read()
        end_sweep(folder, plan.trials, store, code, continues=False)  # a new block is run instead
        found = judged(folder, plan)
        print("", *found.lines, sep="\n")
        return code or (0 if found.comparable else code_of(folder, plan.trials))

    def _search(
        self, folder: SweepFolder, searches: list[Search], points: list[GridPoint], store: Outbox, code: int
    ) -> int:
        """Go on with the searches whose first trials have run, unless their exit code says otherwise."""
        if code == 0:
            code = run_searches(
                folder, searches, points, self._point, lambda block: self._launch(folder, block, store, Judged())
            )
        note_answers(folder, searches)
        trials = folder.read().trials
        end_sweep(folder, trials, store, code, continues=False)
        print("", *(search.answer_line for search in searches), sep="\n")
        return code or code_of(folder, trials)

    def _halve(self, folder: SweepFolder, halving: Halving, store: Outbox, code: int) -> int:
        """Run the rungs after the first, unless its exit code says otherwise."""

        def launch(pending: list[Planned]) -> int:
            if not self._node:
                take_back(folder, pending)
            return self._launch(folder, pending, store, Judged())

        code = code or run_rungs(folder, halving, self._point, launch, store)
        lines = note_best(folder, halving) if code == 0 else []
        trials = folder.read().trials
        end_sweep(folder, trials, store, code)
        print("", *lines, sep="\n")
        return code or code_of(folder, trials)

    @property
    def _rung_lines(self) -> list[str]:
        return [] if self._halving is None else [self._halving.plan_line]

    def _first_trials(self, points: list[GridPoint]) -> list[Planned]:
        """Plan all trials; with repeats=auto those of the first block, with halving those of the first rung."""
        if self._halving is not None:
            return self._halving.plan(self._halving.trying(self._halving.candidates), 0)
        config = points[0].config
        return plan_trials(points, config.repeats if isinstance(config.repeats, int) else 1, config.seed)

    def _point(self, overrides: list[str]) -> GridPoint:
        [point] = compose_points(self._context.config_loader, self._config, [overrides])
        return point

    def _write_plan(
        self,
        folder: SweepFolder,
        trials: list[Planned],
        points: list[GridPoint],
        arguments: Sequence[str],
        rule: Rule | None,
    ) -> None:
        """Write the plan before the first trial; on resume, update the existing plan."""
        owner = this_process()
        facts = owner_tags(owner, folder.path)
        now = {point.digest: point.conditions for point in points}
        try:
            first = points[0].config
            if folder.exists:
                plan = folder.read()
                asked = {trial.number: trial for trial in trials}
                plan.trials = [asked.pop(trial.number, trial) for trial in plan.trials] + list(asked.values())
                plan.owner, plan.conditions, plan.tracking = owner, plan.conditions | now, absolute(first.tracking)
                plan.record.tags |= facts
                if rule is not None:
                    check_same(plan.rule, rule)
                    plan.rule = rule
            else:
                plan = Plan(
                    owner=owner,
                    tracking=absolute(first.tracking),
                    record=self._record(points, arguments, facts),
                    conditions=now,
                    trials=trials,
                    rule=rule,
                )
            if rule is not None:
                plan.record.tags[RULE_TAG] = rule_text(rule)
            folder.write(plan)
        except OSError as error:
            raise InvalidInput(
                f"nothing can be written to {folder.path} ({error.strerror}). Make room there."
            ) from error

    def _record(self, points: list[GridPoint], arguments: Sequence[str], facts: dict[str, str]) -> Record:
        preset = self._config.hydra.runtime.choices.get("sweep")
        record = sweep_record(points, arguments, preset, is_whole=self._halving is None)
        record.tags |= environment() | device_facts(self._placement(points[0].config)) | facts
        if self._slots:
            record.tags["slots"] = ", ".join(slot.name for slot in self._slots)
        if self._node:
            record.tags |= self._node.device | {"cluster": self._asked.cluster.kind.name}
        if self._assumptions:
            record.tags["assumptions"] = "; ".join(self._assumptions)
        return record

    @property
    def _workers(self) -> int:
        """Return how many trials run at a time; of those that train together the most that are one job."""
        if self._jobs:
            return max(Counter(self._jobs.values()).values())
        return self._asked.cluster.workers if self._node else len(self._slots) or 1

    def _placement(self, config: TrialConfig) -> Placement:
        if self._node:
            return self._node.placement
        return whole(self._slots) if self._slots else placement_of(config)

    def _launch(self, folder: SweepFolder, pending: list[Planned], store: Outbox, memory: Judged) -> int:
        """Run the remaining trials. Return 130 after Ctrl-C, 1 when a trial broke this process's own code, else 0."""
        remember_outside(folder.path)
        point_latest(folder.path)
        engine = self._engine(folder)
        # on other machines there is no drift in common for which blocks would be kept apart
        blocks = [(trial, 0 if engine else trial.repeat) for trial in pending]
        if self._jobs:
            blocks = by_job(pending, self._jobs)
        pending = [trial for trial, _ in blocks]
        plan = folder.read()
        plan.record.outcome = plan.record.tags["outcome"] = RUNNING
        plan.at_once = self._workers
        plan.launched = [
            attempt_to_run(folder, trial, engine) if engine else folder.next_attempt(trial) for trial in pending
        ]
        folder.hold(plan)
        with suppress(OSError):
            folder.write(plan)
        store.deliver_sweep(folder)
        jobs = [
            [*trial.overrides, *_place(folder.path, name, plan.membership(trial, memory.too_large.get(trial.point)))]
            for trial, name in zip(pending, plan.launched, strict=True)
        ]
        with open_dict(self._config):
            OmegaConf.set_readonly(self._config, False)
            OmegaConf.set_readonly(self._config.hydra, False)
            self._config.hydra.sweep.dir = str(folder.path)
        try:
            runner: Runner | None = Threads(self._slots, folder) if self._slots else None
            if self._jobs:
                runner = Joint()
            if engine and self._node:
                runner = Nodes(engine, self._asked.cluster, folder, self._node.device, store)
            if runner:
                numbered = [Job(number, words) for (_, number), words in zip(blocks, jobs, strict=True)]
                broken = launch_side_by_side(self._context, self._task, self._config, runner, numbered)
            else:
                broken = failures(self._launcher.launch(jobs, initial_job_idx=0))
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        for line in broken:
            print(f"lora_lab itself failed in a trial: {line}", file=sys.stderr)
        return 1 if broken else 0

    def _engine(self, folder: SweepFolder) -> Engine | None:
        """Return the cluster that runs the trials; None on this machine."""
        on_card = self._asked.device != "cpu"
        return engine_of(self._asked.cluster, on_card, jobs_folder(folder)) if self._node else None


def _at_once(slots: int) -> str:
    return f"; {slots} trials run at a time, which takes at best 1/{slots} of the time" if slots > 1 else ""


def _place(sweep: Path, name: str, member: Membership) -> list[str]:
    """Return the overrides that give a trial its folder and its place in the sweep, in whichever process it runs."""
    handed = json.dumps(asdict(member)).replace("$", "\\u0024")  # in which OmegaConf would look for variables
    return [
        f"hydra.sweep.dir={quoted(str(sweep))}",
        f"hydra.sweep.subdir={quoted(name)}",
        f"hydra.sweeper.trial={quoted(handed)}",
    ]
