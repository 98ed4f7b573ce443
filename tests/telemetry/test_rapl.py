"""The CPU packages' counters, as Linux shows them in files."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.telemetry.rapl import Rapl

RANGE = 262_143_328_850
"""Microjoules at which a real package's counter begins again."""


class Tree:
    """A powercap folder with packages and what else stands there."""

    def __init__(self, root: Path, microjoules: list[int]) -> None:
        self.root = root
        for number, at in enumerate(microjoules):
            self._zone(f"intel-rapl:{number}", f"package-{number}", at)
            self._zone(f"intel-rapl:{number}:0", "core", 7_000_000)
            self._zone(f"intel-rapl:{number}:1", "dram", 9_000_000)
        self._zone("intel-rapl:9", "psys", 5_000_000)
        self._zone("intel-rapl-mmio:0", "package-0", 3_000_000)

    def _zone(self, zone: str, name: str, microjoules: int) -> None:
        folder = self.root / zone
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
        (folder / "energy_uj").write_text(f"{microjoules}\n")

    def counter(self, package: int) -> Path:
        return self.root / f"intel-rapl:{package}" / "energy_uj"

    def draw(self, package: int, microjoules: int) -> None:
        now = int(self.counter(package).read_text())
        self.counter(package).write_text(f"{(now + microjoules) % RANGE}\n")


@given(
    begin=st.lists(st.integers(0, RANGE - 1), min_size=1, max_size=2),
    drawn=st.lists(st.tuples(st.integers(0, 1), st.integers(0, RANGE - 1)), max_size=10),
)
def test_the_sum_of_all_packages_goes_on_through_every_wrap_and_holds_nothing_twice(
    begin: list[int], drawn: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cores and memory are within their package; the same package seen through another interface is not another."""
    tree = Tree(tmp_path_factory.mktemp("powercap"), begin)
    rapl = Rapl(tree.root)
    assert (rapl.absent, rapl.joules()) == ("", 0.0)
    total = 0
    for package, microjoules in drawn:
        if package < len(begin):
            tree.draw(package, microjoules)
            total += microjoules
        assert rapl.joules() == pytest.approx(total / 1e6)


def test_counters_that_are_not_to_be_read_are_not_opened(tmp_path: Path) -> None:
    tree = Tree(tmp_path, [1000])
    rapl = Rapl(tree.root, absent="shared")
    assert (rapl.absent, rapl.joules()) == ("shared", None)
    assert Rapl(tree.root).joules() == 0.0


def test_a_machine_without_packages_says_so(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "none"):
        rapl = Rapl(root)
        assert rapl.joules() is None
        assert "no RAPL package" in rapl.absent


@pytest.mark.parametrize("content", [PermissionError(13, "Permission denied"), "", "not a number"])
def test_a_counter_that_may_not_or_cannot_be_read_is_absent_with_the_reason(
    content: str | Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since 2020 kernels let root alone read it."""
    tree = Tree(tmp_path, [1_000_000, 2_000_000])
    unreadable(tree.counter(1), content, monkeypatch)
    rapl = Rapl(tree.root)
    assert rapl.joules() is None
    assert "does not let this user read" in rapl.absent
    assert not isinstance(content, Exception) or "Permission denied" in rapl.absent


@pytest.mark.parametrize("content", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "gone"), ""])
def test_a_counter_that_vanishes_on_the_way_ends_the_readings_with_the_reason(
    content: str | Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One package's joules alone would look like a machine that draws half."""
    tree = Tree(tmp_path, [1_000_000, 2_000_000])
    rapl = Rapl(tree.root)
    tree.draw(0, 500_000)
    assert rapl.joules() == 0.5
    with monkeypatch.context() as gone:
        unreadable(tree.counter(1), content, gone)
        assert rapl.joules() is None
    tree.counter(1).write_text("3000000\n")
    assert rapl.joules() is None, "what was drawn meanwhile is not known"
    assert "any more" in rapl.absent


def unreadable(file: Path, content: str | Exception, patch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so an error is raised in its place."""
    if isinstance(content, str):
        file.write_text(content)
        return
    error, read = content, Path.read_text

    def refuse(path: Path, encoding: str | None = None) -> str:
        if path == file:
            raise error
        return read(path, encoding)

    patch.setattr(Path, "read_text", refuse)
