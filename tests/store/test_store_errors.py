"""Stores that are not as expected: no trial is stopped, what to do is said, and after it the next start delivers."""

import contextlib
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import give_store, store_of
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from lora_lab.config import TrackingConfig, TrialConfig
from lora_lab.options import TrackingKind
from lora_lab.outcome import End, Outcome
from lora_lab.store.errors import TrackingFailed
from lora_lab.store.finishing import finish
from lora_lab.store.local_store import address_of, database_of
from lora_lab.store.outbox import Outbox, absolute
from lora_lab.store.process_id import this_process
from lora_lab.store.record import Record
from lora_lab.store.recovery import recover
from lora_lab.store.stored_runs import open_store
from lora_lab.store.sweep_folder import Plan, SweepFolder
from lora_lab.store.trial_folder import Manifest, TrialFolder
from lora_lab.telemetry.host_facts import HostFacts

DEAD = 2**22 + 1
"""A pid that no process can have."""


@dataclass
class Place:
    """A working folder with a store, and trials that ended there."""

    folder: Path
    tracking: TrackingConfig

    @property
    def database(self) -> Path:
        return self.folder / "mlruns" / "mlflow.db"

    def trial(self, name: str = "a trial", sweep: SweepFolder | None = None) -> TrialFolder:
        """One that is over, of a process that is gone, and not delivered."""
        parent = sweep.read().record.id if sweep else None
        record = Record(name=name, params={}, tags={"device": "none"}, parent=parent)
        asked = Manifest(owner=replace(this_process(), pid=DEAD), t=0.0, tracking=self.tracking, record=record)
        folder = TrialFolder((sweep.path if sweep else self.folder / "multirun" / "today") / name)
        folder.begin(asked, TrialConfig(), {}, HostFacts())
        finish(folder, asked, End(outcome=Outcome.finished, reason=""), [], [], HostFacts())
        return folder

    def sweep(self) -> SweepFolder:
        sweep = SweepFolder(self.folder / "multirun" / "today" / "sweep")
        record = Record(name="the sweep", params={"points": "2", "trials": "2"}, is_sweep=True)
        owner = replace(this_process(), pid=DEAD)
        sweep.write(Plan(owner=owner, tracking=self.tracking, record=record, conditions={}, trials=[]))
        return sweep

    def deliver(self, trial: TrialFolder) -> Outbox:
        """As the end of a trial does it."""
        store, record = Outbox(self.tracking), trial.record()
        assert record is not None
        store.deliver_trial(trial, record)
        return store

    def runs(self) -> dict[str, Run]:
        return {run.info.run_name: run for run in store_of(self.folder)[1]}


@pytest.fixture
def place(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    give_store(tmp_path, empty_store)
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, absolute(TrackingConfig()))


def sql(*statements: str) -> Callable[[Path], None]:
    def harm(database: Path) -> None:
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
            for statement in statements:
                connection.execute(statement)

    return harm


def in_turn(*harms: Callable[[Path], None]) -> Callable[[Path], None]:
    def harm(database: Path) -> None:
        for one in harms:
            one(database)

    return harm


def file_of(content: bytes) -> Callable[[Path], None]:
    return lambda database: void(database.write_bytes(content))


def void(_: object) -> None:
    return None


def a_folder(database: Path) -> None:
    database.unlink()
    database.mkdir()


def broken_pages(database: Path) -> None:
    """All but the first two."""
    content = bytearray(database.read_bytes())
    content[8192:] = b"\xa5" * (len(content) - 8192)
    database.write_bytes(content)


def revisions() -> list[str]:
    """MLflow's, newest first."""
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    return [one.revision for one in ScriptDirectory.from_config(_get_alembic_config("")).walk_revisions()]


def version(text: str) -> Callable[[Path], None]:
    return sql(f"UPDATE alembic_version SET version_num = '{text}'")


UPGRADE, NEWER, AWAY = (
    ["older MLflow", "mlflow db upgrade sqlite:///"],
    ["newer MLflow", "upgrade mlflow"],
    ["ove it away"],
)

HARMS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    **{f"older {revision}": (version(revision), UPGRADE) for revision in revisions()[1::22]},
    "older, and a table that came later": (
        in_turn(version(revisions()[5]), sql("DROP TABLE trace_info")),
        UPGRADE,
    ),
    "newer": (version("ffffffffffff"), NEWER),
    "no version at all": (version("none"), NEWER),
    "no row": (sql("DELETE FROM alembic_version"), AWAY),
    "two rows": (sql("INSERT INTO alembic_version VALUES ('ffffffffffff')"), AWAY),
    "no table of versions": (sql("DROP TABLE alembic_version"), AWAY),
    "a table missing": (sql("DROP TABLE latest_metrics"), ["latest_metrics", *AWAY]),
    "another program's": (in_turn(Path.unlink, sql("CREATE TABLE mine (a)")), AWAY),
    "garbage": (file_of(b"\x00\xffgarbage" * 1000), ["not a database", "Move that file away"]),
    "a short text": (file_of(b"hello\n"), ["not a database", "Move that file away"]),
    "a folder": (a_folder, AWAY),
    "broken pages": (broken_pages, ["malformed", *AWAY]),
}


@pytest.mark.parametrize("kind", HARMS)
def test_a_store_that_does_not_fit_costs_no_record_and_says_what_to_do(place: Place, kind: str) -> None:
    harm, words = HARMS[kind]
    saved = place.database.read_bytes()
    harm(place.database)
    trial = place.trial()
    store = place.deliver(trial)
    assert not trial.delivered
    said = store.outlook("the record")
    assert [word for word in words if word not in said] == [], said
    assert "the next start delivers" not in said
    found = recover(Outbox(place.tracking))
    assert (found.waiting, found.delivered) == (1, 0)

    shutil.rmtree(place.database) if place.database.is_dir() else place.database.unlink()
    place.database.write_bytes(saved)  # as an upgrade, a backup, or another MLflow would leave it
    assert recover(Outbox(place.tracking)).delivered == 1
    assert place.runs().keys() == {"a trial"}


@pytest.mark.parametrize("kind", [kind for kind, (_, words) in HARMS.items() if set(AWAY) & set(words)])
def test_a_store_that_was_moved_away_is_made_again(place: Place, kind: str) -> None:
    HARMS[kind][0](place.database)
    place.trial()
    place.database.rename(place.folder / "away")
    assert recover(Outbox(place.tracking)).delivered == 1
    assert place.runs().keys() == {"a trial"}


@pytest.mark.parametrize("content", [b"", None], ids=["an empty file", "no tables"])
def test_a_database_without_anything_in_it_becomes_a_store(place: Place, content: bytes | None) -> None:
    place.database.unlink()
    if content is None:
        sql("VACUUM")(place.database)
    else:
        place.database.write_bytes(content)
    assert place.deliver(place.trial()).fault == ""
    assert place.runs().keys() == {"a trial"}


def test_tables_of_an_older_version_stay_as_they_are(place: Place) -> None:
    """MLflow itself would bring some up to date without a backup."""
    sql("DROP TABLE trace_info", f"UPDATE alembic_version SET version_num = '{revisions()[5]}'")(place.database)
    before = place.database.read_bytes()
    place.deliver(place.trial())
    assert place.database.read_bytes() == before


def test_reading_a_store_of_another_version_is_refused_with_the_same_advice(place: Place) -> None:
    version(revisions()[3])(place.database)
    with pytest.raises(TrackingFailed, match="mlflow db upgrade"):
        open_store(None)


@pytest.mark.parametrize("words", ["attempt to write a readonly database", "database disk image is malformed"])
def test_what_sqlite_says_only_when_it_is_written_to_is_advised_on_too(
    place: Place, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MlflowException(f"(raised as a result of autoflush)\n(sqlite3.OperationalError) {words}\n[SQL: ...]")

    monkeypatch.setattr(MlflowClient, "log_batch", refuse)
    said = place.deliver(place.trial()).outlook("the record")
    assert words in said
    assert "the next start delivers" not in said


# --- what somebody deleted


def test_a_deleted_experiment_is_reported_as_that_and_restoring_it_heals_all(place: Place) -> None:
    place.deliver(place.trial("before"))
    client, _ = store_of(place.folder)
    experiment = client.get_experiment_by_name("lora_lab").experiment_id
    client.delete_experiment(experiment)
    said = place.deliver(place.trial("after")).outlook("the record")
    for words in ("was deleted", f"mlflow experiments restore -x {experiment}", "tracking.experiment="):
        assert words in said
    assert "the next start delivers" not in said
    found = recover(Outbox(place.tracking))
    assert (found.waiting, found.delivered) == (1, 0)
    client.restore_experiment(experiment)
    assert recover(Outbox(place.tracking)).delivered == 1
    assert place.runs().keys() == {"before", "after"}


def test_trials_of_a_sweep_whose_run_was_deleted_lie_under_it_all_the_same(place: Place) -> None:
    sweep = place.sweep()
    place.deliver(place.trial("0000", sweep))
    client, _ = store_of(place.folder)
    client.delete_run(place.runs()["the sweep"].info.run_id)
    place.deliver(place.trial("0001", sweep))
    runs = place.runs()
    above = runs["the sweep"].info.run_id
    assert {runs[name].data.tags["mlflow.parentRunId"] for name in ("0000", "0001")} == {above}


def test_a_deleted_run_of_a_trial_stays_deleted(place: Place) -> None:
    place.deliver(place.trial())
    client, [run] = store_of(place.folder)
    client.delete_run(run.info.run_id)
    assert recover(Outbox(place.tracking)).lines() == []
    assert place.runs() == {}


def test_records_of_a_store_that_is_gone_enter_the_new_one(place: Place) -> None:
    sweep = place.sweep()
    for name in ("0000", "0001"):
        place.deliver(place.trial(name, sweep))
    place.deliver(place.trial("alone"))
    place.database.unlink()
    assert recover(Outbox(place.tracking)).delivered >= 3
    runs = place.runs()
    assert runs.keys() == {"0000", "0001", "alone", "the sweep"}
    assert runs["0000"].data.tags["mlflow.parentRunId"] == runs["the sweep"].info.run_id
    assert recover(Outbox(place.tracking)).lines() == [], "once is enough"


def test_records_that_another_store_has_stay_there(place: Place, empty_store: Path) -> None:
    (place.folder / "other").mkdir()
    other = Place(place.folder, absolute(TrackingConfig(root="other")))
    other.deliver(other.trial())
    assert recover(Outbox(place.tracking)).lines() == []
    assert place.runs() == {}


# --- addresses


ODD = [
    "a?b",
    "a#b",
    "a%b",
    "a%3Fb",
    "a b",
    "é\u4e2d\U0001f600",
    "a&b=c",
    "a;b",
    "a'b",
    'a"b',
    "a+b",
    "a:b",
    "a@b",
    "?",
    "a\\b",
]


@pytest.mark.parametrize("name", ODD)
def test_a_folder_may_have_any_name(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    place = Place(folder, absolute(TrackingConfig()))
    shutil.copytree(empty_store.parent, folder / "mlruns")
    trial = place.trial()
    store = place.deliver(trial)
    assert (store.fault, trial.delivered) == ("", True)
    with contextlib.closing(sqlite3.connect(place.database)) as connection:
        assert connection.execute("SELECT name FROM runs").fetchall() == [("a trial",)]
    assert {path.name for path in tmp_path.iterdir()} == {name}
    assert {path.name for path in folder.iterdir()} == {"mlruns", "multirun"}
    assert [one.name for one in open_store(None).runs()[0]] == ["a trial"]
    assert list((folder / "mlruns" / "artifacts").rglob("summary.json"))


@pytest.mark.parametrize("name", ODD)
def test_a_databases_address_leads_back_to_it(tmp_path: Path, name: str) -> None:
    database = tmp_path / name / "mlflow.db"
    assert database_of(address_of(database)) == database


@contextlib.contextmanager
def answering(say: Callable[[socket.socket], None]) -> Iterator[str]:
    """Something that listens on loopback; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    there, _ = listener.accept()
                    threading.Thread(target=answer, args=(there,), daemon=True).start()

        def answer(there: socket.socket) -> None:
            with there, contextlib.suppress(OSError):
                say(there)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def at_once(text: bytes) -> Callable[[socket.socket], None]:
    def say(there: socket.socket) -> None:
        there.recv(4096)
        there.sendall(text)

    return say


def web(status: str, body: bytes, *headers: str) -> Callable[[socket.socket], None]:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers])
    return at_once(f"{head}\r\n\r\n".encode() + body)


def slowly(there: socket.socket) -> None:
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + b"X: y\r\n" * 100:
        there.sendall(bytes([byte]))
        time.sleep(0.5)


ANSWERS: dict[str, Callable[[socket.socket], None]] = {
    "SSH": at_once(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "nothing": void,
    "silence": lambda _: time.sleep(20),
    "bytes": at_once(b"\x00\xff\x16\x03" * 100),
    "TLS": at_once(b"\x15\x03\x01\x00\x02\x02\x46"),
    "a byte at a time": slowly,
    "half an answer": at_once(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nOK"),
    "a page": web("200 OK", b"<html>hello</html>"),
    "no content": web("204 No Content", b""),
    "an error": web("500 Internal Server Error", b"oops"),
    "to itself": web("302 Found", b"", "Location: /health"),
    "to nowhere": web("302 Found", b"", "Location: http://127.0.0.1:1/"),
    "to a mail": web("302 Found", b"", "Location: mailto:me"),
    "long header": at_once(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\nOK"),
    "not found": web("404 Not Found", b"no"),
    "login": web("401 Unauthorized", b"no"),
    "OK to everything": web("200 OK", b"OK"),
    **{
        f"404, then {said!r}": web("404 Not Found", said, "Content-Type: application/json")
        for said in (b"{}", b"[]", b"null", b'"x"', b'{"error_code": 5}')
    },
}


def test_whatever_answers_at_a_servers_address_costs_seconds_and_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Manifest at once, since most of it is waiting."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    faults: dict[str, str] = {}
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        uris = {kind: stack.enter_context(answering(say)) for kind, say in ANSWERS.items()}

        def ask(kind: str) -> None:
            store = Outbox(TrackingConfig(kind=TrackingKind.server, uri=uris[kind]))
            store.end_orphans()
            faults[kind] = store.fault

        asking = [threading.Thread(target=ask, args=(kind,)) for kind in uris]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join(30)
    assert faults.keys() == ANSWERS.keys(), "one raised, or hangs"
    assert [kind for kind, fault in faults.items() if not fault] == []
    assert time.monotonic() - began < 15
    for kind in ("SSH", "a page", "TLS"):
        assert uris[kind] in faults[kind]
