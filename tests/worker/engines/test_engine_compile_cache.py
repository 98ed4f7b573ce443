"""What a killed worker left half compiled is gone before the next one would load it, and nothing else is."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import compiles, give_store, record_of, until

from lora_lab.worker.engines import compile_cache
from lora_lab.worker.engines.compile_cache import compiling

CHILD = """
import sys
from lora_lab.worker.engines.compile_cache import compiling
with compiling():
    print("compiling", flush=True)
    sys.stdin.read()
"""
CODE = "c" + "a2" * 25 + "b"
KERNEL = "T5" * 26


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's folder; Triton's is beside it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path / "inductor"


def write(path: Path, age: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def leave_marker(cache: Path) -> None:
    """As of a worker that was killed while it compiled: nobody has it locked."""
    write(cache / "lora_lab_compiling" / "1-1.marker")


def markers(cache: Path) -> list[Path]:
    return list(cache.rglob("*.marker"))


def test_what_a_killed_worker_wrote_is_removed_and_older_code_is_kept(cache: Path) -> None:
    old = [write(cache / "a2" / f"{CODE}.so", 60), write(cache.parent / "triton" / KERNEL / "kernel.cubin", 60)]
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"compiling\n"
        process.kill()
    assert len(markers(cache)) == 1
    new = [
        write(cache / "b3" / f"{CODE}.main.so"),
        write(cache / "b3" / f"{CODE}.main.cpp"),
        write(cache / "fxgraph" / "b3" / f"f{CODE[1:]}" / CODE[:50]),
        write(cache.parent / "triton" / (KERNEL[1:] + "A") / "kernel.cubin"),
    ]
    with compiling():
        assert not [file for file in new if file.exists()]
        assert len(markers(cache)) == 1, "this one's own"
    assert all(file.exists() for file in old)
    assert (cache / "b3").is_dir()
    assert not markers(cache)


def test_what_is_not_compiled_code_is_kept(cache: Path) -> None:
    """The folder may be one that a user has named, with other things in it, and other programs' locks."""
    leave_marker(cache)
    others = [cache / "notes.md", cache / "ab" / "library.so", cache / "locks" / f"{CODE}.lock"]
    for other in others:
        write(other)
    with compiling():
        assert all(other.exists() for other in others)


def test_after_a_good_end_everything_is_kept(cache: Path) -> None:
    with compiling():
        code = write(cache / "a2" / f"{CODE}.so")
    with compiling():
        assert code.exists()


def test_after_an_error_nothing_is_trusted(cache: Path) -> None:
    """Where memory runs out it may be the linker that is killed, and not the worker: torch then raises."""

    def fail() -> None:
        with compiling():
            write(cache / "a2" / f"{CODE}.so")
            raise RuntimeError("C++ compile error")

    with pytest.raises(RuntimeError, match=r"C\+\+ compile error"):
        fail()
    with compiling():
        assert not (cache / "a2" / f"{CODE}.so").exists()


def test_while_another_worker_compiles_nothing_is_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "_PATIENCE_SECONDS", 0.3)
    with compiling():  # what is locked here looks to the second as if it were locked elsewhere
        leave_marker(cache)
        code = write(cache / "a2" / f"{CODE}.so")
        with compiling():
            assert code.exists()
            assert len(markers(cache)) == 3
    with compiling():
        assert not code.exists()


def test_a_worker_waits_for_another_to_have_compiled(cache: Path) -> None:
    with contextlib.ExitStack() as another:
        another.enter_context(compiling())
        leave_marker(cache)
        code = write(cache / "a2" / f"{CODE}.so")
        timer = threading.Timer(0.5, another.close)
        timer.start()
        began = time.monotonic()
        with compiling():
            assert not code.exists()
        assert time.monotonic() - began > 0.4
        timer.join()


def test_where_nothing_was_left_two_workers_compile_at_once(cache: Path) -> None:
    with compiling(), compiling():
        assert len(markers(cache)) == 2
    assert not markers(cache)


def test_without_the_variables_torchs_own_folder_is_meant(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with compiling():
        [marker] = tmp_path.rglob("*.marker")
        assert marker.parent.parent.name.startswith("torchinductor_")


@pytest.mark.parametrize("broken", ["cache", "folder", "gate", "left"])
def test_a_cache_that_cannot_be_used_harms_nobody(cache: Path, broken: str) -> None:
    """Things in the way, for root may read and write everything."""
    folder = cache / "lora_lab_compiling"
    if broken == "cache":
        write(cache)
    elif broken == "folder":
        write(folder)
    elif broken == "gate":
        (folder / "gate").mkdir(parents=True)
    else:
        (folder / "1-1.marker").mkdir(parents=True)
    compiled = False
    with compiling():
        compiled = True
    assert compiled


@compiles
@pytest.mark.nightly
def test_a_trial_finishes_after_one_that_was_killed_while_it_compiled(
    cache: Path, tmp_path: Path, empty_store: Path
) -> None:
    command = [sys.executable, "-m", "lora_lab", "model=tiny", "engine=compile", "method=lora", "precision=fp32"]
    command += ["device=cpu", "share_device=true", "data=random_tokens", "data.rows=16", "seq_len=32"]
    command += ["measure=quick", "measure.steps=1", "method.target_modules=[q_proj]"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("TORCHINDUCTOR_COMPILE_THREADS", None)  # with its processes that compile, as users have it
    environment["ATEN_CPU_CAPABILITY"] = "default"  # without vectors g++ is quicker
    killed, next_ = tmp_path / "killed", tmp_path / "next"
    for folder in (killed, next_):
        folder.mkdir()
        give_store(folder, empty_store)

    with (
        (killed / "said.txt").open("w") as said,
        subprocess.Popen(command, cwd=killed, env=environment, stdout=said, stderr=said) as first,
    ):
        try:
            until(lambda: any(cache.glob("*/*.main.cpp")), "a kernel", seconds=120)
            [events] = killed.glob("multirun/**/events.jsonl")
            lines = map(json.loads, events.read_text().splitlines())
            [pid] = [event["pid"] for event in lines if event["event"] == "Ready"]
            worker = psutil.Process(pid)
            for victim in (worker, *worker.children(recursive=True)):  # g++ too, as where a group's memory runs out
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
            first.wait(60)
        finally:
            first.kill()
    assert record_of(killed)["outcome"] == "killed"
    for source in cache.glob("*/*.main.cpp"):
        write(source.with_suffix(".so"))

    done = subprocess.run(command, cwd=next_, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert record_of(next_)["outcome"] == "finished"
    assert not markers(cache)
