"""Which trials a sweep consists of, and which of them an earlier sweep has."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.config import TrackingConfig, TrialConfig
from lora_lab.outcome import End, Outcome
from lora_lab.paths import MULTIRUN
from lora_lab.store.fingerprint import point_digest
from lora_lab.store.finishing import finish
from lora_lab.store.process_id import this_process
from lora_lab.store.record import Record
from lora_lab.store.sweep_folder import Plan, Planned, SweepFolder
from lora_lab.store.trial_folder import Manifest, TrialFolder
from lora_lab.sweep.plan import GridPoint, done_elsewhere, plan_trials, take_up, without_twins
from lora_lab.telemetry.host_facts import HostFacts

NOW = {"code": "c1", "version.torch": "2.13", "data": "d1"}


def point(config: TrialConfig, *overrides: str, conditions: dict[str, str] | None = None) -> GridPoint:
    return GridPoint(
        overrides=list(overrides), config=config, digest=point_digest(config), conditions=conditions or NOW
    )


def grid(count: int, seed: int = 0, conditions: dict[str, str] | None = None) -> list[GridPoint]:
    """So many points along batch_size, with one setting that they share."""
    configs = [TrialConfig(batch_size=size + 1, seq_len=64, seed=seed) for size in range(count)]
    return [point(c, f"batch_size={c.batch_size}", "seq_len=64", conditions=conditions) for c in configs]


COUNTS, REPEATS, SEEDS = st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**32 - 1)


@given(count=COUNTS, repeats=REPEATS, seed=SEEDS)
def test_every_block_has_every_point_once(count: int, repeats: int, seed: int) -> None:
    trials = plan_trials(grid(count), repeats, seed)
    assert len(trials) == count * repeats
    for repeat in range(repeats):
        block = trials[repeat * count : (repeat + 1) * count]
        assert {trial.repeat for trial in block} == {repeat}
        assert sorted(trial.asked_place for trial in block) == list(range(count))


@given(count=COUNTS, repeats=REPEATS, seed=SEEDS)
def test_trials_are_numbered_in_the_order_of_running(count: int, repeats: int, seed: int) -> None:
    assert [trial.number for trial in plan_trials(grid(count), repeats, seed)] == list(range(count * repeats))


@given(count=COUNTS, repeats=REPEATS, seed=SEEDS, own=SEEDS)
def test_a_trial_is_its_point_with_a_seed_of_its_own(count: int, repeats: int, seed: int, own: int) -> None:
    points = grid(count, own)
    for trial in plan_trials(points, repeats, seed):
        asked = points[trial.asked_place]
        assert trial.overrides == [*asked.overrides, f"seed={own + trial.repeat}"]
        assert trial.point == asked.digest


def test_a_points_own_seed_is_where_its_repeats_begin() -> None:
    points = [point(TrialConfig(seed=seed), f"seed={seed}") for seed in (5, 40)]
    trials = plan_trials(points, 3, 0)
    seeds = {(trial.asked_place, trial.repeat): trial.overrides for trial in trials}
    assert seeds == {(place, r): [f"seed={seed + r}"] for place, seed in enumerate((5, 40)) for r in range(3)}


@given(count=COUNTS, repeats=REPEATS, seed=SEEDS)
def test_the_same_seed_gives_the_same_order(count: int, repeats: int, seed: int) -> None:
    assert plan_trials(grid(count), repeats, seed) == plan_trials(grid(count), repeats, seed)


def test_the_order_is_another_in_each_block_and_with_each_seed() -> None:
    def orders(seed: int) -> list[tuple[int, ...]]:
        places = [trial.asked_place for trial in plan_trials(grid(8), 4, seed)]
        return [tuple(places[block : block + 8]) for block in range(0, 32, 8)]

    seen = [order for seed in range(5) for order in orders(seed)]
    assert len(set(seen)) == len(seen) == 20, "of 40320 orders none came twice"
    firsts = {order[0] for seed in range(60) for order in orders(seed)}
    assert firsts == set(range(8)), "no point is always late"


@given(count=COUNTS, more=COUNTS, repeats=REPEATS, seed=SEEDS)
def test_all_trials_of_all_plans_with_the_same_points_have_the_same_fingerprints(
    count: int, more: int, repeats: int, seed: int
) -> None:
    """A larger grid, more repeats, another order: a trial that is in both is the same one."""
    small = {(t.point, t.repeat): t.fingerprint for t in plan_trials(grid(count), repeats, seed)}
    large = {(t.point, t.repeat): t.fingerprint for t in plan_trials(grid(count + more)[::-1], repeats + 1, seed + 1)}
    assert small.items() <= large.items()
    assert len(set(large.values())) == len(large) == (count + more) * (repeats + 1)


@pytest.mark.parametrize("changed", sorted(NOW))
def test_other_conditions_make_other_trials(changed: str) -> None:
    then = {t.fingerprint for t in plan_trials(grid(3), 2, 0)}
    now = {t.fingerprint for t in plan_trials(grid(3, conditions={**NOW, changed: "other"}), 2, 0)}
    assert then & now == set()


KEYS = st.sampled_from(["batch_size", "seq_len", "optimizer", "+method.x", "learning_rate"])
OVERRIDES = st.dictionaries(KEYS, st.sampled_from(["1", "2", "a=b", "[q,v]", ""]), max_size=5)


@given(asked=st.lists(OVERRIDES, min_size=1, max_size=8, unique_by=lambda settings: frozenset(settings.items())))
def test_a_label_tells_a_point_from_every_other(asked: list[dict[str, str]]) -> None:
    """Also where the points of a preset do not all set the same keys."""
    points = [
        point(TrialConfig(batch_size=place + 1), *(f"{key}={value}" for key, value in settings.items()))
        for place, settings in enumerate(asked)
    ]
    labels = {trial.asked_place: trial.label for trial in plan_trials(points, 1, 0)}
    assert len(set(labels.values())) == len(points)
    assert all(labels.values())


@given(count=st.integers(2, 12), repeats=REPEATS)
def test_a_label_leaves_out_what_all_points_share_and_a_name_adds_the_repeat(count: int, repeats: int) -> None:
    trials = plan_trials(grid(count), repeats, 0)
    assert {trial.label for trial in trials} == {f"{size + 1}x64" for size in range(count)}
    assert len({trial.name for trial in trials}) == len(trials)


def test_what_is_said_last_of_a_key_is_what_the_label_says() -> None:
    """The command line comes after a preset's point, and beats it."""
    points = [
        point(TrialConfig(batch_size=4, seq_len=s), "batch_size=1", f"seq_len={s}", "batch_size=4") for s in (8, 9)
    ]
    assert {trial.label for trial in plan_trials(points, 1, 0)} == {"4x8", "4x9"}


def test_a_single_point_is_labelled_by_all_that_was_asked_for() -> None:
    [trial] = plan_trials(grid(1), 1, 0)
    assert trial.label == "1x64"
    [trial] = plan_trials([point(TrialConfig())], 1, 0)
    assert trial.label == "the only point"


@given(sizes=st.lists(st.integers(1, 5), max_size=12))
def test_points_that_are_the_same_are_run_once_where_they_were_asked_for_first(sizes: list[int]) -> None:
    points = [point(TrialConfig(batch_size=s), f"batch_size={s}", f"place={n}") for n, s in enumerate(sizes)]
    first = [place for place, size in enumerate(sizes) if size not in sizes[:place]]
    assert without_twins(points) == [points[place] for place in first]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in: earlier sweeps are looked for below it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


TIMES = itertools.count(10)


def planned(points: list[GridPoint], repeats: int = 1, day: str = "2026-01-01") -> SweepFolder:
    """A sweep on disk, later than every one before on that day."""
    folder = SweepFolder(MULTIRUN.absolute() / day / f"{next(TIMES)}-00-00-000000")
    plan = Plan(
        owner=this_process(),
        tracking=TrackingConfig(),
        record=Record(name="sweep", params={}),
        conditions={p.digest: p.conditions for p in points},
        trials=plan_trials(points, repeats, 0),
    )
    folder.write(plan)
    return folder


def ran(folder: SweepFolder, *trials: Planned, outcome: Outcome = Outcome.finished) -> None:
    for trial in trials:
        there = TrialFolder(folder.path / folder.next_attempt(trial))
        asked = Manifest(
            owner=this_process(),
            t=0.0,
            tracking=TrackingConfig(),
            record=Record(name=trial.name, params={}, tags={"device": "cpu"}),
        )
        there.begin(asked, TrialConfig(), {}, HostFacts())
        finish(there, asked, End(outcome=outcome, reason=""), [], [], HostFacts())


@pytest.mark.usefixtures("here")
def test_without_an_earlier_sweep_there_is_nothing_to_go_on_with() -> None:
    assert take_up(plan_trials(grid(3), 1, 0), Path("new")) is None


@pytest.mark.usefixtures("here")
def test_the_newest_sweep_that_shares_a_trial_is_gone_on_with() -> None:
    planned(grid(3))
    newest_with_these = planned(grid(3), day="2026-01-02")
    planned([point(TrialConfig(batch_size=99), "batch_size=99")], day="2026-01-03")
    found = take_up(plan_trials(grid(3), 1, 0), Path("new"))
    assert found is not None
    assert found[0].path.resolve() == newest_with_these.path.resolve()


@pytest.mark.usefixtures("here")
def test_the_folder_that_was_named_comes_before_all_others(here: Path) -> None:
    named = SweepFolder(here / "named")
    named.write(planned(grid(3)).read())
    planned(grid(3), day="2027-01-01")
    found = take_up(plan_trials(grid(3), 1, 0), named.path)
    assert found is not None
    assert found[0].path == named.path


@pytest.mark.usefixtures("here")
@given(before=COUNTS, repeats=REPEATS, after=COUNTS, more=REPEATS, seed=SEEDS)
def test_trials_keep_their_numbers_and_added_ones_follow_the_last(
    before: int, repeats: int, after: int, more: int, seed: int
) -> None:
    there = planned(grid(before), repeats, day="2026-02-02")
    known = {trial.fingerprint: trial.number for trial in there.read().trials}
    asked = plan_trials(grid(after)[::-1], more, seed)
    found = take_up(asked, there.path)
    assert found is not None, "at least the first point is in both"
    trials = found[1]
    assert {trial.fingerprint for trial in trials} == {trial.fingerprint for trial in asked}
    old = [trial for trial in trials if trial.fingerprint in known]
    new = [trial for trial in trials if trial.fingerprint not in known]
    assert all(trial.number == known[trial.fingerprint] for trial in old)
    assert [trial.number for trial in new] == list(range(len(known), len(known) + len(new)))
    assert [trial.number for trial in trials] == sorted(trial.number for trial in trials)
    places = {(trial.point, trial.repeat): trial.asked_place for trial in asked}
    assert all(trial.asked_place == places[trial.point, trial.repeat] for trial in trials), "as asked for now"


@pytest.mark.usefixtures("here")
def test_what_is_not_asked_for_again_is_not_run_again() -> None:
    planned(grid(6))
    found = take_up(plan_trials(grid(2), 1, 0), Path("new"))
    assert found is not None
    assert {trial.point for trial in found[1]} == {p.digest for p in grid(2)}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("changed", sorted(NOW))
def test_a_sweep_under_other_conditions_is_not_gone_on_with(changed: str) -> None:
    planned(grid(3))
    now = grid(3, conditions={**NOW, changed: "other"})
    assert take_up(plan_trials(now, 1, 0), Path("new")) is None


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("written", ["", "{", "null", "[]", "{}", '{"trials": []}'])
def test_a_plan_of_another_version_is_passed_over(written: str) -> None:
    older = planned(grid(3))
    (planned(grid(3), day="2027-01-01").path / "sweep.json").write_text(written)
    found = take_up(plan_trials(grid(3), 1, 0), Path("new"))
    assert found is not None
    assert found[0].path.resolve() == older.path.resolve()
    assert done_elsewhere(grid(3)) == []


@pytest.mark.usefixtures("here")
def test_what_was_done_under_other_conditions_is_named_with_what_differs() -> None:
    then = {"code": "c0", "version.torch": "2.11", "data": "d1", "gone": "g"}
    folder = planned(grid(3, conditions=then), repeats=2)
    ran(folder, *folder.read().trials[:4])
    [line] = done_elsewhere(grid(3, conditions={**NOW, "device.uuid": "GPU-1"}))
    assert str(folder.path.name) in line
    assert line.startswith("4 trials")
    for words in ("code c0 -> c1", "version.torch 2.11 -> 2.13", "gone g -> absent", "device.uuid absent -> GPU-1"):
        assert words in line
    assert "data" not in line, "that is as it was"


@pytest.mark.usefixtures("here")
def test_what_was_only_planned_or_is_of_other_points_is_not_named() -> None:
    then = {**NOW, "code": "c0"}
    planned(grid(3, conditions=then))
    others = [point(TrialConfig(batch_size=99), "batch_size=99", conditions=then)]
    folder = planned(others)
    ran(folder, *folder.read().trials)
    assert done_elsewhere(grid(3)) == []
