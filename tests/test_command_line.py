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


def test_a_wheel_runs_from_an_empty_folder(tmp_path: Path) -> None:
    """The wheel brings conf/ and the shipped data along."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(CLONE)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "an empty folder"
    zipfile.ZipFile(wheel).extractall(site)
    empty.mkdir()
    said = lab_in(empty)("model=tiny", "measure=quick", "seq_len=128", PYTHONPATH=str(site))
    assert said.code == 0, said.text
    assert {path.name for path in empty.iterdir()} == {"mlruns", "multirun"}
    assert record_of(empty)["tags"]["commit"] == "not a git clone", "the wheel's own code ran, not the clone's"
