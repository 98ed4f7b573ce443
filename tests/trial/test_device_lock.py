"""One trial at a time on a device: ours queue, strangers are seen, and what a trial held is given back."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import until

from lora_lab.config import InvalidInput
from lora_lab.placement import Placement
from lora_lab.telemetry import nvml
from lora_lab.telemetry.nvml import Card, cards
from lora_lab.trial import device_lock as module
from lora_lab.trial.device_lock import Before, cool_down, device_lock, look_at, see_freed

pytestmark = pytest.mark.timeout(60)  # what waits for a device in vain waits for ever

FAKES = Path(__file__).parents[1] / "fakes"
GIB = 2**30
NOBODY = 2**22 + 1
"""Beyond what Linux gives out as a pid."""


NO_WAITING = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: pytest.fail("it waits"))
"""In place of the module `time`."""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "State":
    """What the fake card shows; this process sees two such cards, and no lock of other tests."""
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setattr(nvml, "pynvml", importlib.import_module("pynvml"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("FAKE_NVML_CARDS", "2")
    monkeypatch.setenv("FAKE_NVML_STATE", str(tmp_path / "state.json"))
    monkeypatch.delenv("FAKE_NVML_USERS", raising=False)
    shown = State(tmp_path / "state.json")
    shown.show(used=GIB, temperature=50)
    return shown


class State:
    """The file that the fake card reads."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def show(self, **state: int) -> None:
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps(state))
        beside.replace(self._path)

    def show_later(self, seconds: float, **state: int) -> None:
        threading.Timer(seconds, self.show, kwargs=state).start()


@pytest.fixture
def card(state: State) -> Placement:
    return on(cards()[0])


def on(*chosen: Card) -> Placement:
    return Placement(cards=chosen)


CPU = Placement()


HOLDER = """
import sys
from lora_lab.placement import Placement
from lora_lab.trial.device_lock import device_lock
from lora_lab.telemetry.nvml import cards
chosen = [] if sys.argv[1] == "cpu" else [cards()[int(number)] for number in sys.argv[1].split(",")]
with device_lock(Placement(cards=tuple(chosen)), sys.argv[2] == "share", lambda text: print(text, flush=True)):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path, device: str = "0", share: str = "alone") -> Iterator[subprocess.Popen[str]]:
    """A process that holds a device as soon as it gets it, until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, device, share],
        env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(FAKES)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.usefixtures("state")
@pytest.mark.parametrize("device", ["0", "cpu"])
def test_a_second_trial_waits_for_the_first_and_says_for_whom(tmp_path: Path, device: str) -> None:
    with holder(tmp_path, device) as first:
        assert line(first) == "held"
        with holder(tmp_path, device) as second:
            said = line(second)
            assert f"process {first.pid}" in said
            assert ("Fake Card 0" if device == "0" else "the CPU") in said
            time.sleep(0.3)
            assert second.poll() is None
            first.communicate()
            assert line(second) == "held", "and nothing else was said"


@pytest.mark.usefixtures("state")
def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        assert line(first) == "held"
        with holder(tmp_path) as second:
            assert "waiting" in line(second)
            first.send_signal(signal.SIGKILL)
            assert line(second) == "held"


def test_a_holder_that_is_stopped_is_said_to_be_again_and_again(
    tmp_path: Path, card: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SAY_AGAIN_SECONDS", 0.1)
    said: list[str] = []
    with holder(tmp_path) as first:
        assert line(first) == "held"
        first.send_signal(signal.SIGSTOP)

        def waiting(text: str) -> None:
            said.append(text)
            if len(said) == 3:
                first.kill()

        with device_lock(card, False, waiting):
            assert len(said) >= 3
    assert f"process {first.pid}" in said[1]
    assert "stopped" in said[1]


def test_a_lock_that_a_killed_process_left_is_taken_at_once(tmp_path: Path, card: Placement) -> None:
    with holder(tmp_path) as first:
        assert line(first) == "held"
    said: list[str] = []
    with device_lock(card, False, said.append):
        assert said == []


@pytest.mark.usefixtures("state")
def test_each_device_has_a_queue_of_its_own(tmp_path: Path) -> None:
    said: list[str] = []
    with holder(tmp_path, "0") as process:
        assert line(process) == "held"
        with device_lock(on(cards()[1]), False, said.append), device_lock(CPU, False, said.append):
            assert said == []


@pytest.mark.usefixtures("state")
def test_two_trials_on_the_same_two_cards_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Each names the cards in another order; the locks are taken in one."""
    with holder(tmp_path, "1") as other:
        assert line(other) == "held"
        with holder(tmp_path, "0,1") as first:
            assert f"Fake Card 1, on which process {other.pid}" in line(first), "it has card 0 from here on"
            with holder(tmp_path, "1,0") as second:
                assert f"Fake Card 0, on which process {first.pid}" in line(second)
                other.communicate()
                assert "held" in first.communicate()[0]
                assert "held" in second.communicate()[0]


@pytest.mark.usefixtures("state")
def test_of_two_cards_each_is_looked_at_and_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    both = on(*reversed(cards()))
    with device_lock(both, False, lambda _: None):
        assert len(list(tmp_path.glob("lora_lab-*/*.holder"))) == 2
    before = look_at(both, share=False)
    assert len(before.used_bytes) == 2
    assert see_freed(both, before, share=False) == (before.used_bytes, "")


def test_who_shares_a_device_does_not_queue(tmp_path: Path, card: Placement) -> None:
    said: list[str] = []
    with holder(tmp_path) as process:
        assert line(process) == "held"
        with device_lock(card, True, said.append):
            assert said == []
    with device_lock(card, True, said.append), holder(tmp_path) as process:
        assert line(process) == "held", "and keeps nobody waiting"


def test_a_trial_that_fails_leaves_the_device(tmp_path: Path, card: Placement) -> None:
    with pytest.raises(KeyError), device_lock(card, False, lambda _: None):
        raise KeyError
    with holder(tmp_path) as process:
        assert line(process) == "held"


@contextmanager
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process of somebody else, as far as the card is concerned."""
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_foreign_process_is_refused_by_pid_name_and_memory(card: Placement, monkeypatch: pytest.MonkeyPatch) -> None:
    with stranger() as process:
        monkeypatch.setenv("FAKE_NVML_USERS", f"{process.pid}:{3 * GIB // 2},{NOBODY}:")
        with pytest.raises(InvalidInput) as refusal:
            look_at(card, share=False)
    said = str(refusal.value)
    for words in (f"process {process.pid} (sleep, 1.50 GiB)", f"process {NOBODY}", "gpu:0", "share_device=true"):
        assert words in said
    assert "None" not in said


def test_a_shared_card_tells_with_whom(card: Placement, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML_USERS", f"{NOBODY}:{GIB}")
    before = look_at(card, share=True)
    assert f"process {NOBODY}" in before.shared_with
    assert "1.00 GiB" in before.shared_with


@pytest.mark.parametrize("share", [False, True])
def test_a_card_of_our_own_is_as_it_was_found(card: Placement, state: State, share: bool) -> None:
    state.show(used=5 * GIB, temperature=61)
    assert look_at(card, share) == Before(used_bytes=(5 * GIB,))


def test_this_process_is_no_stranger(card: Placement, monkeypatch: pytest.MonkeyPatch) -> None:
    """With isolation=inline the second trial of a sweep finds the first one's CUDA context: its own."""
    monkeypatch.setenv("FAKE_NVML_USERS", f"{os.getpid()}:{GIB}")
    assert look_at(card, share=False).shared_with == ""


def test_the_cpu_is_not_looked_at() -> None:
    assert look_at(CPU, share=False) == Before()
    assert see_freed(CPU, Before(), share=False) == ((), "")
    assert cool_down(CPU, 40.0, lambda _: None) == ""


def test_a_card_that_does_not_answer_keeps_nobody_waiting(card: Placement, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML_CARDS", "0")  # it fell off the bus
    assert look_at(card, share=False) == Before(used_bytes=(None,))
    assert see_freed(card, Before(used_bytes=(GIB,)), share=False) == ((None,), "")
    assert "can't be read" in cool_down(card, 40.0, lambda _: None)


def test_memory_that_comes_back_is_waited_for(card: Placement, state: State) -> None:
    before = look_at(card, share=False)
    state.show(used=4 * GIB, temperature=50)
    state.show_later(0.5, used=GIB, temperature=50)
    began = time.monotonic()
    assert see_freed(card, before, share=False) == ((GIB,), "")
    assert 0.4 < time.monotonic() - began < 5


@pytest.mark.parametrize("held", [-GIB // 2, 0, 64 * 2**20])
def test_a_little_more_or_less_than_before_is_free(
    card: Placement, state: State, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    state.show(used=GIB + held, temperature=50)
    monkeypatch.setattr(module, "time", NO_WAITING)
    assert see_freed(card, Before(used_bytes=(GIB,)), share=False) == ((GIB + held,), "")


def test_memory_that_does_not_come_back_names_who_holds_it(
    card: Placement, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FREED_SECONDS", 0.3)
    state.show(used=3 * GIB, temperature=50)
    used, said = see_freed(card, Before(used_bytes=(GIB,)), share=False)
    assert used == (3 * GIB,)
    assert "2.00 GiB of Fake Card 0" in said
    assert "no process that can be seen" in said
    with stranger() as process:
        monkeypatch.setenv("FAKE_NVML_USERS", f"{process.pid}:{2 * GIB}")
        assert f"process {process.pid} (sleep, 2.00 GiB)" in see_freed(card, Before(used_bytes=(GIB,)), share=False)[1]


def test_what_others_hold_on_a_shared_card_is_not_waited_for(card: Placement, state: State) -> None:
    state.show(used=3 * GIB, temperature=50)
    before = time.monotonic()
    assert see_freed(card, Before(used_bytes=(GIB,)), share=True) == ((), "")
    assert time.monotonic() - before < module._FREED_SECONDS / 2


def test_a_warm_card_is_waited_for_and_that_is_said_once(card: Placement, state: State) -> None:
    said: list[str] = []
    state.show(used=GIB, temperature=70)
    state.show_later(1.5, used=GIB, temperature=45)
    began = time.monotonic()
    assert cool_down(card, 45.0, said.append) == ""
    assert 1.4 < time.monotonic() - began < 10
    [text] = said
    assert "from 70 to 45 degrees" in text


@pytest.mark.parametrize("limit", [50.0, 80.0, None])
def test_a_card_that_is_cool_enough_is_not_waited_for(
    card: Placement, monkeypatch: pytest.MonkeyPatch, limit: float | None
) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "pause", NO_WAITING.sleep)
    assert cool_down(card, limit, said.append) == ""
    assert said == []


def test_a_card_that_stays_warm_is_used_all_the_same_and_says_so(
    card: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_COOL_DOWN_SECONDS", 0.5)
    assert "still at 50 degrees" in cool_down(card, 40.0, lambda _: None)


def test_a_holder_that_left_no_name_is_another_process(tmp_path: Path, card: Placement) -> None:
    with holder(tmp_path) as process:
        assert line(process) == "held"
        [note] = tmp_path.glob("lora_lab-*/*.holder")
        note.write_text("")
        said: list[str] = []
        thread = threading.Thread(target=_hold, args=(card, said))
        thread.start()
        until(lambda: bool(said), "it waits", seconds=10)
        process.communicate()
        thread.join(timeout=10)
    assert "another process" in said[0]


def _hold(card: Placement, said: list[str]) -> None:
    with device_lock(card, False, said.append):
        return


@pytest.mark.parametrize("what", ["link", "file", "somebody's"])
def test_a_lock_folder_that_is_not_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Everybody may write to the folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"lora_lab-{os.getuid()}"
    if what == "link":
        (tmp_path / "target").mkdir()
        folder.symlink_to(tmp_path / "target")
    elif what == "file":
        folder.touch()
    else:
        folder.mkdir()
        if os.getuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(folder, 12345, 12345)
    with pytest.raises(InvalidInput, match="set TMPDIR"), device_lock(CPU, False, lambda _: None):
        pass


def test_the_holder_is_written_through_no_link_and_the_folder_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"lora_lab-{os.getuid()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    (tmp_path / "precious").write_text("mine")
    (folder / "cpu.holder").symlink_to(tmp_path / "precious")
    with device_lock(CPU, False, lambda _: None):
        assert (folder / "cpu.holder").read_text() == str(os.getpid())
    assert (tmp_path / "precious").read_text() == "mine"
    assert folder.stat().st_mode & 0o077 == 0
