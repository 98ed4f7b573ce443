"""Whether a trial's process still lives, when it may be one of another host."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import until

from lora_lab.config import TrackingConfig, TrialConfig
from lora_lab.options import TrackingKind
from lora_lab.paths import MULTIRUN
from lora_lab.store import heartbeat
from lora_lab.store.heartbeat import HEARTBEAT, LIMIT_SECONDS, Heartbeat, gone
from lora_lab.store.outbox import Outbox
from lora_lab.store.process_id import this_process
from lora_lab.store.record import Record
from lora_lab.store.recovery import recover
from lora_lab.store.trial_folder import Manifest, TrialFolder
from lora_lab.telemetry.host_facts import HostFacts

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # a killed trial closes nothing

ELSEWHERE = replace(this_process(), host="elsewhere", boot_id="of another machine")
NONE = TrackingConfig(kind=TrackingKind.none)


def silent_for(folder: Path, seconds: float) -> None:
    """As a process leaves it that beat for the last time so long ago."""
    (folder / HEARTBEAT).touch()
    then = time.time() - seconds
    os.utime(folder / HEARTBEAT, (then, then))


def test_while_a_trial_runs_its_heartbeat_is_renewed_and_afterwards_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "EVERY_SECONDS", 0.05)
    with Heartbeat(tmp_path / "deep" / "trial"):
        file = tmp_path / "deep" / "trial" / HEARTBEAT
        silent_for(file.parent, 100.0)
        until(lambda: time.time() - file.stat().st_mtime < 50.0, "another beat", seconds=10)
        file.unlink()
        until(file.exists, "a beat after the file was taken away", seconds=10)
    assert not file.exists()


def test_a_folder_that_takes_no_file_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Heartbeat(tmp_path / "file"):
        pass


@pytest.mark.parametrize(("seconds", "dead"), [(0.0, False), (LIMIT_SECONDS - 60, False), (LIMIT_SECONDS + 60, True)])
def test_a_process_of_another_host_is_gone_when_its_heartbeat_has_stopped(
    tmp_path: Path, seconds: float, dead: bool
) -> None:
    silent_for(tmp_path, seconds)
    assert gone(ELSEWHERE, tmp_path) == dead
    assert [path.name for path in tmp_path.iterdir()] == [HEARTBEAT], "nothing else is left in the folder"


@pytest.mark.parametrize("ahead", [-1e6, 1e6])
def test_this_hosts_clock_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    """The disk's does, which both hosts share."""
    silent_for(tmp_path, 0.0)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    assert not gone(ELSEWHERE, tmp_path)


@pytest.mark.parametrize("folder", [".", "missing", os.devnull])
def test_of_another_hosts_process_without_a_heartbeat_nothing_is_known(tmp_path: Path, folder: str) -> None:
    """Older versions wrote none."""
    assert not gone(ELSEWHERE, tmp_path / folder)


def test_of_this_hosts_processes_the_process_decides(tmp_path: Path) -> None:
    """A machine that sleeps lets its heartbeats stop."""
    me = this_process()
    silent_for(tmp_path, 10 * LIMIT_SECONDS)
    assert not gone(me, tmp_path)
    silent_for(tmp_path, 0.0)
    assert gone(replace(me, started=me.started + 1), tmp_path), "at once"


@pytest.mark.parametrize("seconds", [0.0, 2 * LIMIT_SECONDS])
def test_a_trial_of_another_host_is_recorded_as_killed_only_when_it_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = TrialFolder(MULTIRUN / "2026-01-01" / "12-00-00")
    folder.begin(
        Manifest(owner=ELSEWHERE, t=8.0, tracking=NONE, record=Record(name="r", params={})),
        TrialConfig(),
        {},
        HostFacts(),
    )
    silent_for(folder.path, seconds)
    assert recover(Outbox(NONE)).killed == (seconds > LIMIT_SECONDS)
    record = folder.record()
    assert (None if record is None else record.outcome) == ("killed" if seconds else None)


def test_a_killed_process_leaves_its_last_heartbeat(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from lora_lab.store.heartbeat import Heartbeat\n"
        "with Heartbeat(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert (tmp_path / HEARTBEAT).exists()
