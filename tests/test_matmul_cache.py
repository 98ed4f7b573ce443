"""A rate is found again for the device it was measured on, and for nothing else."""

import json
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from lora_lab.events import MatmulRate
from lora_lab.matmul_cache import RateKey, load_rate, store_rate
from lora_lab.paths import cache_folder

KEY = RateKey(device="GPU-1", cuda="580.1", torch="2.13.0", dtype="bf16")
RATE = MatmulRate(t=-1.0, dtype="bfloat16", size=8192, flops_per_second=7.94e14)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


def stored() -> Path:
    store_rate(KEY, RATE)
    [file] = cache_folder().iterdir()
    return file


def test_what_was_stored_is_found_again_with_the_time_of_now() -> None:
    assert load_rate(KEY) is None
    store_rate(KEY, RATE)
    before = time.monotonic()
    found = load_rate(KEY)
    assert found is not None
    assert before <= found.t <= time.monotonic()
    assert replace(found, t=RATE.t) == RATE


@pytest.mark.parametrize("changed", [field.name for field in fields(RateKey)])
def test_another_device_driver_torch_or_dtype_has_a_rate_of_its_own(changed: str) -> None:
    store_rate(KEY, RATE)
    other = RateKey(**asdict(KEY) | {changed: "other"})
    assert load_rate(other) is None
    store_rate(other, replace(RATE, size=1024))
    first, second = load_rate(KEY), load_rate(other)
    assert first is not None
    assert second is not None
    assert (first.size, second.size) == (8192, 1024)


def test_the_parts_of_a_key_are_not_run_together() -> None:
    store_rate(RateKey(device="a", cuda="bc", torch="1", dtype="x"), RATE)
    assert load_rate(RateKey(device="ab", cuda="c", torch="1", dtype="x")) is None


def test_a_file_under_the_right_name_for_another_key_is_not_believed() -> None:
    file = stored()
    content = json.loads(file.read_text())
    content["key"]["device"] = "GPU-2"
    file.write_text(json.dumps(content))
    assert load_rate(KEY) is None


DAMAGED = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"rate"', b"{}"]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_as_none_and_is_mended_by_the_next_rate(content: bytes) -> None:
    stored().write_bytes(content)
    assert load_rate(KEY) is None
    stored()
    assert load_rate(KEY) is not None


def test_a_file_cut_anywhere_is_as_none() -> None:
    file = stored()
    whole = file.read_bytes().rstrip()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert load_rate(KEY) is None


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf"), "fast", None, [1.0]])
def test_a_rate_that_is_none_is_not_believed(rate: object) -> None:
    file = stored()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"flops_per_second": rate}))
    assert load_rate(KEY) is None


def test_a_cache_that_cannot_be_written_is_done_without(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file stands where the folder should be")
    store_rate(KEY, RATE)
    assert load_rate(KEY) is None
    assert cache.read_text() == "a file stands where the folder should be"


def test_a_folder_in_the_files_place_harms_nothing() -> None:
    file = stored()
    file.unlink()
    file.mkdir()
    store_rate(KEY, RATE)
    assert load_rate(KEY) is None
    assert [path.name for path in cache_folder().iterdir()] == [file.name], "a temporary file was left behind"


def test_a_write_that_fails_half_way_leaves_the_old_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    file = stored()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    store_rate(KEY, replace(RATE, size=1024))
    found = load_rate(KEY)
    assert found is not None
    assert found.size == 8192
    assert list(cache_folder().iterdir()) == [file]
