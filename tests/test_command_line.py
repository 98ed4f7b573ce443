"""What a newcomer types first."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import Lab, lab_in, record_of

from lora_lab.composition.compose import CONF

CLONE = CONF.parent


def test_help_is_written_for_a_person(lab: Lab) -> None:
    said = lab("--help")
    assert said.code == 0
    for group in {path.parent.name for path in CONF.glob("*/*.yaml")}:
        options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        assert f"{group}: {', '.join(options)}" in said.out
    assert said.out.count("python -m lora_lab") >= 6, "how to call it, and five commands to try"
    assert "Exit codes" in said.out


@pytest.mark.parametrize("flags", [("--cfg", "job"), ("--info", "defaults-tree"), ("--version",), ("--hydra-help",)])
def test_hydras_own_flags_work(lab: Lab, flags: tuple[str, ...], tmp_path: Path) -> None:
    said = lab(*flags)
    assert said.code == 0, said.text
    assert said.text.strip()
    assert not list(tmp_path.iterdir()), "looking must leave nothing behind"


def test_the_sweep_flag_may_stand_anywhere(lab: Lab) -> None:
    said = lab("model=tiny", "-m", "batch_size=0,1")
    assert (said.code, "batch_size=0 must be greater than 0" in said.err) == (2, True), said.text


def test_the_console_script_does_the_same_and_completes(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "lora-lab"
    shown = subprocess.run([script, "--cfg", "job"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "optim: adamw_torch_fused" in shown.stdout
    completion = subprocess.run(
        [script, "-sc", "install=bash"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "complete" in completion.stdout


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with what the wheel brings along."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(CLONE)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    return tmp_path / "site"


def files_below(folder: Path) -> set[str]:
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {str(path) for path in found if "__pycache__" not in path.parts}


def test_a_wheel_has_every_file_of_the_package_and_reads_its_own_settings(site: Path, tmp_path: Path) -> None:
    package = site / "lora_lab"
    assert files_below(package) >= files_below(CLONE / "lora_lab")
    assert files_below(package / "conf") == files_below(CONF)
    (package / "conf" / "optimizer" / "of_the_wheel.yaml").write_text("optim: adafactor\n")
    said = lab_in(tmp_path, real=True)("--cfg", "job", "optimizer=of_the_wheel", PYTHONPATH=str(site))
    assert (said.code, "optim: adafactor" in said.out) == (0, True), said.text


@pytest.mark.nightly  # an interpreter of its own takes 20 s
def test_a_wheel_runs_from_an_empty_folder(site: Path, tmp_path: Path) -> None:
    """The wheel brings conf/ and the shipped data along."""
    empty = tmp_path / "an empty folder"
    empty.mkdir()
    said = lab_in(empty)("model=tiny", "measure=quick", "seq_len=128", PYTHONPATH=str(site))
    assert said.code == 0, said.text
    assert {path.name for path in empty.iterdir()} == {"mlruns", "multirun"}
    assert record_of(empty)["tags"]["commit"] == "not a git clone", "the wheel's own code ran, not the clone's"
