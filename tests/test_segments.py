"""Which segments torch's allocator gets: the user's choice, else those that grow where they work."""

import platform

import pytest

from lora_lab.segments import allocator_variables, are_expandable
from lora_lab.trial.variables import of_server, of_worker

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_a_worker_and_its_server_get_segments_that_grow() -> None:
    assert are_expandable()
    for variables in (of_worker(""), of_server()):
        assert variables["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("value", "grows"),
    [("expandable_segments:True", True), ("max_split_size_mb:64, expandable_segments: true", True), ("", False)]
    + [(f"expandable_segments:{word}", False) for word in ("False", "Truely")],
)
def test_the_users_own_setting_wins(monkeypatch: pytest.MonkeyPatch, name: str, value: str, grows: bool) -> None:
    monkeypatch.setenv(name, value)
    assert are_expandable() is grows
    assert allocator_variables() == {}
    assert not set(NAMES) & set(of_worker(""))


def test_wsl_keeps_segments_of_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "5.15.90.1-microsoft-standard-WSL2")
    assert not are_expandable()
    assert allocator_variables() == {}
