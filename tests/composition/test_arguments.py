"""Whatever is typed: understood, or refused in a sentence that says what to type. In this process, up to the trial."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_lab.__main__ import main
from lora_lab.composition.arguments import MOST_POINTS, in_order, in_shell, quoted, unreadable
from lora_lab.composition.keys import known_keys
from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.outcome import Outcome
from lora_lab.sweep.points import compose_points
from lora_lab.sweep.sweeper import Grid
from lora_lab.trial.session import Request


@dataclass
class Typed:
    """What came of a command line."""

    code: int
    said: str
    configs: list[TrialConfig]
    """Of the trial, or of every point of a sweep."""


Type = Callable[..., Typed]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Type:
    """`typed("model=tiny", ...)` is the command line, in an empty folder, up to where a trial would begin."""
    configs: list[TrialConfig] = []

    def begin(request: Request) -> Outcome:
        configs.append(request.config)
        return Outcome.finished

    def points(grid: Grid, combinations: list[list[str]], arguments: list[str]) -> int:
        found = compose_points(grid._context.config_loader, grid._config, combinations)
        configs.extend(point.config for point in found)
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_lab.trial.session.run_session", begin)
    monkeypatch.setattr("lora_lab.sweep.sweeper.Grid._run", points)
    monkeypatch.setattr("lora_lab.sweep.points.check_inputs", lambda _: None)

    def run(*arguments: str) -> Typed:
        configs.clear()
        monkeypatch.setattr(sys, "argv", ["lora_lab", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err, arguments
        assert "HYDRA_FULL_ERROR" not in os.environ, "a trial's own errors would be shown otherwise"
        return Typed(int(str(left.value.code or 0)), out + err, list(configs))

    return run


PARSER = OverridesParser.create()
SIGNS = st.text(alphabet="ab\u00fc'\"\\ $#()[]{}=,~!`.%/:&;<>|*?\n", min_size=1)


@given(st.one_of(SIGNS, st.text(st.characters(exclude_characters="\0"), min_size=1)))
def test_any_text_is_taken_as_it_is_or_with_the_quoting_that_is_advised(text: str) -> None:
    advice = in_shell(f"data.path={quoted(text)}")
    [argument] = shlex.split(advice)
    assert PARSER.parse_override(argument).value() == text
    try:
        PARSER.parse_override(f"data.path={text}")
    except HydraException:
        assert advice in unreadable(f"data.path={text}")


@pytest.mark.parametrize("text", ["ünï/数据 a#b", "it's [a", 'say "x" a(1)', "a=b $x`y`!z", "a;b a\\'b"])
def test_a_shell_gives_the_advised_text(typed: Type, text: str) -> None:
    command = unreadable(f"data.path={text}").splitlines()[1]
    said = subprocess.run(f"printf %s {command}", shell=True, check=True, capture_output=True, text=True).stdout
    assert typed("data=jsonl", said).configs[0].data.path == text


OPTIONS = [["-m"], ["--config-dir", "mine"], ["--config-name=config"], ["-c", "job"], ["--resolve"]]


@given(st.permutations([*OPTIONS, ["model=tiny"], ["optimizer=sgd"], ["batch_size=1"]]))
def test_every_option_may_stand_anywhere(words: list[list[str]]) -> None:
    found = get_args_parser().parse_args(in_order([word for group in words for word in group]))
    assert found.overrides == [word for [word, *_] in words if word[0] != "-"]
    assert (found.multirun, found.config_dir, found.config_name) == (True, "mine", "config")
    assert (found.cfg, found.resolve, found.info) == ("job", True, None)


@pytest.mark.parametrize(
    ("option", "means"),
    [("--batch_size=4", "batch_size=4"), ("--foo", "--hydra-help"), ("--multirn", "--multirun")],
)
def test_what_is_no_option_is_said_to_be_none(typed: Type, option: str, means: str) -> None:
    said = typed("model=tiny", option)
    assert (said.code, option in said.said, means in said.said) == (2, True, True), said.said


@pytest.mark.nightly
def test_several_contrasts_are_one_text_and_no_sweep(typed: Type) -> None:
    grid = ("-m", "model=tiny", "optimizer=adamw,paged_adamw", "precision=fp16,bf16", "repeats=auto")
    for written in ("contrast=optimizer,precision", "contrast='optimizer,precision'"):
        said = typed(*grid, written)
        assert len(said.configs) == 4, said.said
        assert {config.contrast for config in said.configs} == {"optimizer,precision"}
    swept = typed(*grid, "contrast=optimizer", "margin=1%,2%")
    assert swept.code == 2, "else the points of one margin would be dropped as twins"
    assert "margin=1%,2%" in swept.said


VALUES = [
    *("[a", "{a", "a=b", "ü", "'", ")", "~", "${nowhere}", "${oc.env:NOT_SET}", "${no:x}", "${oc.env:}", "${", "???"),
    *("choice()", "tag()", "range(1)", "interval(1,2)", "glob(x)", "f(1)", "null", "3,4", "[]", "{}", "[[1]]", "{a:b}"),
]
KEYS = [
    *(key for key in known_keys() if key != "isolation"),
    *("hydra.run.dir", "hydra.mode", "hydra.sweeper", "hydra.sweeper.params", "hydra.sweeper.points", "hydra/launcher"),
]


@settings(max_examples=settings().max_examples // 4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mode=st.sampled_from([[], ["-m"]]),
    sign=st.sampled_from(["", "+", "++", "~"]),
    key=st.sampled_from(KEYS),
    value=st.sampled_from(VALUES),
)
def test_nothing_that_is_typed_ends_in_a_traceback(
    typed: Type, mode: list[str], sign: str, key: str, value: str
) -> None:
    said = typed(*mode, "model=tiny", f"{sign}{key}={value}")
    assert said.code in (0, 2)
    assert (said.code == 2) == ("Refused" in said.said)


@pytest.mark.parametrize("argument", ["train=[]", "method=[lora]", "~optimizer"])
@pytest.mark.parametrize("mode", [[], ["-m"]])
def test_a_group_without_one_option_is_refused(typed: Type, mode: list[str], argument: str) -> None:
    said = typed(*mode, "model=tiny", argument)
    assert said.code == 2
    group = argument.strip("~").partition("=")[0]
    assert f"Type {group}=NAME" in said.said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rows.jsonl"], ["a file or folder, not a setting", "data=jsonl data.path=rows.jsonl"]),
        (["data=jsonl", "data.path=rows.jsonl,b.csv"], ["'data.sources=[{path: rows.jsonl}, {path: b.csv}]'"]),
        (["data=jsonl", "data.path=[rows.jsonl,b.csv]"], ["one file or folder", "data.sources=[{path:"]),
        (["data=jsonl", "data.id=org/rows"], ["data.id=org/rows", "add data.source=hub"]),
        (["train=job", "train.max_steps=5"], ["leave train=job out", "train.epochs=null"]),
        (["resume=true", "data.path=rows.jsonl"], ["settings are those in the job's folder"]),
    ],
    ids=lambda value: value[-1] if "=" in value[0] else "",
)
def test_a_plausible_mistake_is_answered_with_what_to_type(
    typed: Type, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "rows.jsonl").touch()
    said = typed("model=tiny", *arguments)
    assert (said.code, [word for word in words if word not in said.said]) == (2, []), said.said


@pytest.mark.parametrize(
    ("mode", "value", "why"),
    [
        ([], "${oc.env:NOT_SET}", "Environment variable 'NOT_SET' not found"),
        ([], "${nowhere}", "Interpolation key 'nowhere' not found"),
        ([], "${data.path}", "Recursive"),
        ([], "${no:x}", "Unsupported interpolation type no"),
        (["-m", "batch_size=1,2"], "${nowhere}", "Interpolation key 'nowhere' not found"),
    ],
)
def test_an_interpolation_that_leads_nowhere_names_its_key(typed: Type, mode: list[str], value: str, why: str) -> None:
    said = typed(*mode, "model=tiny", "data=jsonl", f"data.path={value}")
    assert (said.code, f"data.path: {why}" in said.said) == (2, True), said.said
    assert "object_type" not in said.said


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("range(1,1)", "no value"),
        ("range(5,1)", "no value"),
        ("range(1,5,0)", "steps of 0"),
        ("range(0.1,0.5,0)", "steps of 0"),
        ("range(0,inf)", "finite"),
        ("range(0,1000000000)", f"{MOST_POINTS:,} is the most"),
        ("range(0,1,1e-12)", f"{MOST_POINTS:,} is the most"),
        ("shuffle(range(0,1000000000))", f"{MOST_POINTS:,} is the most"),
        ("interval(1,2)", "Name the ones to try"),
        ("tag(a,interval(1,2))", "Name the ones to try"),
        ("glob(*)", "no value"),
        ("shuffle()", "no value"),
    ],
)
def test_values_that_make_no_grid_are_refused(typed: Type, value: str, why: str) -> None:
    said = typed("-m", "model=tiny", f"learning_rate={value}")
    assert (said.code, why in said.said) == (2, True), said.said


@pytest.mark.parametrize(
    "value", ["range(1,4)", "1,2,3", "choice(1,2,3)", "sort(3,1,2)", "shuffle(1,2,3)", "tag(a,choice(1,2,3))"]
)
def test_every_way_to_name_values_is_the_same_grid(typed: Type, value: str) -> None:
    assert sorted(config.seed for config in typed("-m", "model=tiny", f"seed={value}").configs) == [1, 2, 3]


@pytest.mark.parametrize("params", ["={batch_size: '1,2'}", ".batch_size='1,2'"])
def test_a_grid_on_the_command_line_is_a_preset_of_ones_own(typed: Type, params: str) -> None:
    said = typed("-m", "model=tiny", f"+hydra.sweeper.params{params}")
    assert [config.batch_size for config in said.configs] == [1, 2], said.said


PRESET = "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    {}\n"


FAULTS_IN_YAML = [
    ("optimizer/mine.yaml", "optim: [a\nb: c\n", "mine.yaml, line 2"),
    ("optimizer/mine.yaml", "optim:\tx\n", "mine.yaml, line 1"),
    ("optimizer/mine.yaml", "optim: a\noptim: b\n", "mine.yaml, line 2: found duplicate key optim"),
    ("optimizer/mine.yaml", "optim: !!python/object:os.system x\n", "mine.yaml, line 1"),
    ("optimizer/mine.yaml", "- a\n- b\n", "mine.yaml: Merge error: list"),
    ("optimizer/mine.yaml", "text\n", "mine.yaml, optimizer.text"),
    ("optimizer/mine.yaml", "3", "mine.yaml: not a yaml with keys"),
    ("optimizer/mine.yaml", b"optim: caf\xe9\n", "mine.yaml: not a yaml with keys and values in UTF-8"),
    ("optimizer/mine.yaml", "optim: x\nweight_decay: heavy\n", "mine.yaml, line 2: Value 'heavy'"),
    ("optimizer/mine.yaml", "optim: x\n\nweight_decai: 1\n", "mine.yaml, line 3: Key 'weight_decai'"),
    ("optimizer/mine.yaml", "optim: ${nowhere}\n", "optimizer.optim: Interpolation key 'nowhere' not found"),
    ("sweep/mine.yaml", "# @package _global_\nbatch_size: two\n", "mine.yaml, line 2: Value 'two'"),
    ("sweep/mine.yaml", PRESET.format("points: batch_size=1"), "mine.yaml, line 5"),
    ("sweep/mine.yaml", PRESET.format("params: batch_size=1"), "mine.yaml, line 5"),
    ("sweep/mine.yaml", PRESET.format("points: [a b]"), "'a' has no value"),
    ("sweep/mine.yaml", PRESET.format("points: ['seed=\"1']"), "can't be split"),
    ("sweep/mine.yaml", PRESET.format("params: {batch_size: [1, 2]}"), "batch_size=[1,2]"),
    ("sweep/mine.yaml", "# @package _global_\ndefaults: 3\n", "'sweep/mine', defaults must be a list"),
]
SWEEP = ["-m", "seed=1,2"]


@pytest.mark.parametrize(
    ("mode", "file", "content", "why"),
    [
        *(pytest.param([], *fault, id=f"trial-{fault[2]}") for fault in FAULTS_IN_YAML),
        *(pytest.param(SWEEP, *fault, id=f"sweep-{fault[2]}") for fault in FAULTS_IN_YAML[::4]),
        *(
            pytest.param(SWEEP, *f, id=f"sweep-{f[2]}", marks=pytest.mark.nightly)
            for f in FAULTS_IN_YAML
            if f not in FAULTS_IN_YAML[::4]
        ),
    ],
)
def test_a_fault_in_a_yaml_names_the_file_and_the_line(
    typed: Type, tmp_path: Path, mode: list[str], file: str, content: str | bytes, why: str
) -> None:
    path = tmp_path / "my conf" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = typed(*mode, "model=tiny", f"{path.parent.name}=mine", "--config-dir", "my conf")
    assert (said.code, why in said.said) == (2, True), said.said


def test_points_of_which_one_names_a_broken_yaml_are_refused(typed: Type, tmp_path: Path) -> None:
    path = tmp_path / "mine" / "optimizer" / "broken.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("optim: [a\nb: c\n")
    said = typed("-m", "model=tiny", "optimizer=adamw,broken", "--config-dir", "mine")
    assert (said.code, "broken.yaml, line 2" in said.said, "1 of 2 points" in said.said) == (2, True, True), said.said


@pytest.mark.parametrize(
    ("key", "form"),
    [("data.path", "{}"), ("data.path", "'{}'"), ("data.path", '"{}"'), ("model.path", "{}"), ("tracking.root", "{}")],
)
def test_a_tilde_is_the_home_folder(
    typed: Type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str, form: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    [config] = typed("model=tiny", "data=jsonl", "data.path=x", f"{key}={form.format('~/x')}").configs
    group, _, name = key.partition(".")
    assert getattr(getattr(config, group), name) == f"{tmp_path}/x"


def test_a_tilde_is_the_home_folder_in_a_grid_in_a_yaml_and_for_hydra(
    typed: Type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    said = typed("-m", "model=tiny", "data=jsonl", "data.path=~/x,~/y")
    assert [config.data.path for config in said.configs] == [f"{tmp_path}/x", f"{tmp_path}/y"]
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "own.yaml").write_text("source: jsonl\npath: ~/z\n")
    [config] = typed("model=tiny", "data=own", "--config-dir=mine", "hydra.run.dir=~/there").configs
    assert config.data.path == f"{tmp_path}/z"
    assert (tmp_path / "there").is_dir()
    assert not (tmp_path / "~").exists(), "deleting it by name would delete a home"


@pytest.mark.parametrize("form", ["batch_size=1,2", "data.path=a,b", "learning_rate=range(1,3)"])
def test_several_values_without_m_are_no_sweep(typed: Type, form: str) -> None:
    said = typed("model=tiny", form)
    assert (said.code, "Add -m" in said.said) == (2, True), said.said


def test_who_asks_hydra_for_the_traceback_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["lora_lab", "optimizer=typo"])
    with pytest.raises(HydraException, match="optimizer/typo"):
        main()
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_an_unsafe_way_to_run_again_is_refused() -> None:
    with pytest.raises(InvalidInput, match="not supported"):
        in_order(["--experimental-rerun", "config.pickle"])


def test_a_commands_own_option_is_named_where_it_is_near() -> None:
    with pytest.raises(InvalidInput, match="--table"):
        in_order(["--tabel", "context"], own=["--vram", "--table"])
