"""What resume=true takes from a job's folder, and what from the command line."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny_trials import tiny_config

from lora_lab.composition.keys import GROUPS
from lora_lab.config import InvalidInput, TrackingConfig, TrialConfig
from lora_lab.files import write_json
from lora_lab.resume import resumption
from lora_lab.store.process_id import Owner, this_process
from lora_lab.store.record import Record, params
from lora_lab.store.trial_folder import Manifest, TrialFolder
from lora_lab.telemetry.host_facts import HostFacts

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # a killed trial closes nothing

CHOICES = dict.fromkeys(GROUPS, "chosen")
GONE = replace(this_process(), boot_id="earlier")


def job() -> TrialConfig:
    config = tiny_config()
    config.train.max_steps = 30
    config.measure.price_per_kwh = 0.3
    return config


def begun(folder: Path, owner: Owner = GONE, parent: str | None = None) -> Manifest:
    config = job()
    record = Record(name="r", params=params(config, CHOICES), parent=parent, tags={"command": "as it was"})
    tracking = TrackingConfig(root="/somewhere/mlruns")
    asked = Manifest(owner=owner, t=1.0, tracking=tracking, record=record)
    TrialFolder(folder).begin(asked, config, {}, HostFacts())
    return asked


def test_a_job_goes_on_by_its_own_config_and_in_its_own_store(tmp_path: Path) -> None:
    asked = begun(tmp_path)
    request = resumption(tmp_path, TrialConfig(resume=True), CHOICES, ["resume=true"])
    assert request.config == replace(job(), tracking=asked.tracking)
    assert (request.resumed, request.choices, request.command) == (asked, CHOICES, "as it was")


def test_where_a_job_runs_and_how_it_is_recorded_may_change_and_what_is_trained_may_be_repeated(tmp_path: Path) -> None:
    begun(tmp_path)
    given = replace(job(), device="gpu:1", timeout_minutes=5.0, tracking=TrackingConfig(experiment="other"))
    given.measure = replace(given.measure, price_per_kwh=0.5)
    overrides = ["device=gpu:1", "timeout_minutes=5", "tracking.experiment=other", "measure.price_per_kwh=0.5"]
    overrides += ["train.max_steps=30", "model=chosen", "model.architecture.hidden_size=64"]
    request = resumption(tmp_path, given, CHOICES, overrides)
    kept = TrackingConfig(root="/somewhere/mlruns", experiment="other")
    assert request.config == replace(given, tracking=kept)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learning_rate=0.5", "learning_rate=0.5 was given, but the job was begun with learning_rate=0.01"),
        ("train.max_steps=60", "train.max_steps=60 was given, but the job was begun with train.max_steps=30"),
        ("data.split=test", "data.split=test was given, but the job was begun without data.split"),
        ("data.rows=null", "data.rows=null was given, but the job was begun with data.rows=4"),
        ("seed=7", "seed=7 was given, but the job was begun with seed=0"),
        ("capacity=8gib", "capacity cannot be given together with resume=true"),
        ("method=other", "method=other was given, but the job was begun with method=chosen"),
    ],
)
def test_another_training_is_refused_with_both_values(tmp_path: Path, override: str, said: str) -> None:
    begun(tmp_path)
    given = replace(job(), learning_rate=0.5, seed=7)
    given.train = replace(given.train, max_steps=60)
    given.data = replace(given.data, rows=None, split="test")
    with pytest.raises(InvalidInput) as refusal:
        resumption(tmp_path, given, CHOICES | {"method": "other"}, ["resume=true", override])
    assert said in str(refusal.value)
    assert "leave out" in str(refusal.value)


def test_without_a_job_in_the_folder_the_one_is_named_that_may_be_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("1", "2", "3", "4"):
        begun(tmp_path / "multirun" / "day" / name)
    for name in ("1", "2", "3"):  # the fourth saved no checkpoint
        checkpoint = tmp_path / "multirun" / "day" / name / "checkpoints" / "000005"
        checkpoint.mkdir(parents=True)
        (checkpoint / "complete.json").touch()
    done = Record(name="r", params={}, outcome="finished")
    write_json(tmp_path / "multirun" / "day" / "3" / "record.json", asdict(done))
    day = tmp_path / "multirun" / "day"
    for folder, meant in ((tmp_path / "new", "2"), (day / "1" / "checkpoints" / "000005", "1")):
        with pytest.raises(InvalidInput, match=f"resume=true hydra.run.dir={day / meant}$"):
            resumption(folder, job(), CHOICES, [])


def test_a_job_that_runs_or_belongs_to_a_sweep_is_refused(tmp_path: Path) -> None:
    begun(tmp_path / "runs", this_process())
    with pytest.raises(InvalidInput, match="still runs"):
        resumption(tmp_path / "runs", job(), CHOICES, [])
    begun(tmp_path / "member", parent="a sweep")
    with pytest.raises(InvalidInput, match="Resume the sweep"):
        resumption(tmp_path / "member", job(), CHOICES, [])
