"""Which process on the card is the worker, also where the driver counts processes otherwise than this container."""

from hypothesis import given
from hypothesis import strategies as st

from lora_lab.events import Event, Ready
from lora_lab.telemetry.gpu_processes import foreign_pids, worker_pid
from lora_lab.telemetry.sampler import Sample

WORKER, PARENT = 17, 12
ON_THE_HOST = 40_017
READY: list[Event] = [Ready(t=0.0, pid=WORKER, prepared=True)]


def listed(*readings: set[int] | None) -> list[Sample]:
    return [
        Sample(t=float(t), processes=None if pids is None else tuple((pid, 1) for pid in sorted(pids)))
        for t, pids in enumerate(readings)
    ]


STRANGERS = st.sets(st.integers(1000, 1010), max_size=3)


@given(before=STRANGERS, came=STRANGERS)
def test_where_the_worker_is_listed_by_its_own_number_all_others_are_foreign(before: set[int], came: set[int]) -> None:
    samples = listed(before, None, before | {WORKER}, before | came | {WORKER}, came)
    assert worker_pid(READY, samples, PARENT) == WORKER
    assert foreign_pids(READY, samples, PARENT) == before | came


@given(before=STRANGERS)
def test_in_a_container_the_worker_is_the_one_process_that_came(before: set[int]) -> None:
    samples = listed(before, before | {ON_THE_HOST}, {ON_THE_HOST})
    assert worker_pid(READY, samples, PARENT) == ON_THE_HOST
    assert foreign_pids(READY, samples, PARENT) == before


@given(before=STRANGERS, came=STRANGERS.filter(bool))
def test_in_a_container_where_others_came_too_nobody_is_taken_for_the_worker(before: set[int], came: set[int]) -> None:
    """Its memory is then not known, and the run is marked for the strangers all the same."""
    samples = listed(before, before | came | {ON_THE_HOST})
    if came <= before:
        return
    assert worker_pid(READY, samples, PARENT) is None
    assert foreign_pids(READY, samples, PARENT) >= came


def test_inline_the_parent_is_the_worker_and_not_foreign() -> None:
    samples = listed(set(), {PARENT})
    assert worker_pid([], samples, PARENT) == PARENT
    assert foreign_pids([], samples, PARENT) == set()


def test_nobody_on_the_card_is_nobody() -> None:
    for samples in ([], listed(None, None), listed(set(), set())):
        assert worker_pid(READY, samples, PARENT) is None
        assert foreign_pids(READY, samples, PARENT) == set()
