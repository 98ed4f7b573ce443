"""The printed command composes to the settings it was made of."""

import functools
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import some_by_day
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lora_lab.composition.command import shortest_command
from lora_lab.composition.compose import CONF, load, register_schema
from lora_lab.composition.keys import GROUPS
from lora_lab.config import TrialConfig
from lora_lab.method_config import OptimizerConfig
from lora_lab.store.fingerprint import point_digest


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield


@functools.cache
def composed(*words: str) -> tuple[str, str]:
    """The digest of the config whatever its seed, and its command. Kept: a command that is word for word what was asked
    for is the same config."""
    found = compose("config", overrides=list(words), return_hydra_config=True)
    HydraConfig.instance().set_config(found)
    choices = {group: str(found.hydra.runtime.choices[group]) for group in GROUPS}
    del found._content["hydra"]  # type: ignore[union-attr]  # as hydra.main does before it calls the job
    config = load(found)
    written = shortest_command(config, choices)
    config.seed = 0
    return point_digest(config), written


def assert_comes_back(words: list[str]) -> str:
    digest, written = composed(*words)
    again, _ = composed(*shlex.split(written)[3:])
    assert again == digest, written
    return written


OPTIONS = sorted((path.parent.name, path.stem) for group in GROUPS for path in (CONF / group).glob("*.yaml"))
NEEDED = {
    **{("data", layout): ["data.path=rows.jsonl"] for layout in ("jsonl", "chat", "instruct", "completion", "text")},
    ("model", "hub"): ["model.id=owner/name"],
    ("model", "local"): ["model.path=here"],
    ("tracking", "server"): ["tracking.uri=http://127.0.0.1:5000"],
}


FIRST = [next(option for option in OPTIONS if option[0] == group) for group in GROUPS]


@pytest.mark.parametrize(("group", "name"), some_by_day(OPTIONS, by_day=[*{*FIRST, *NEEDED}]))
def test_every_option_comes_back_by_its_name(group: str, name: str) -> None:
    asked = [f"{group}={name}", *NEEDED.get((group, name), [])]
    written = assert_comes_back(asked)
    fixed = [] if group == "tracking" else asked
    assert set(shlex.split(written)[3:]) <= set(fixed), "nothing but what was asked for"


SETTINGS = [
    st.tuples(st.just("batch_size"), st.integers(1, 64)),
    st.tuples(st.just("seq_len"), st.sampled_from([128, 512, 2048])),
    st.tuples(st.just("learning_rate"), st.sampled_from(["1e-5", "0.001", "3"])),
    st.tuples(st.just("method.rank"), st.integers(1, 64)),
    st.tuples(st.just("method.target_modules"), st.sampled_from(["[q_proj,v_proj]", "[all-linear]", "['a b']"])),
    st.tuples(st.just("optimizer"), st.sampled_from(["paged_adamw", "adafactor"])),
    st.tuples(st.just("model.revision"), st.sampled_from(["12e4", "007", "main", "'it\\'s'", "null", "'true'"])),
    st.tuples(st.just("model.architecture.rms_norm_eps"), st.sampled_from(["1e-6", "0.5"])),
    st.tuples(st.just("+model.architecture.head_dim"), st.integers(1, 64)),
    st.tuples(st.just("vram_limit_gib"), st.sampled_from(["8", "7.5", "null"])),
    st.tuples(st.just("capacity"), st.sampled_from(["8gib", "12gib"])),
    st.tuples(st.just("gradient_checkpointing"), st.sampled_from(["none", "full", "selective", "offloaded"])),
    st.tuples(st.just("memory"), st.sampled_from(["lean", "leanest"])),
    st.tuples(st.just("engine.host_embeddings"), st.sampled_from(["false", "auto"])),
    st.tuples(st.just("measure"), st.just("quick")),
    st.tuples(st.just("measure.steps"), st.integers(1, 100)),
    st.tuples(st.just("measure.price_per_kwh"), st.just(0.3)),
    st.tuples(st.just("data.map.output"), st.sampled_from(["answer", "'the answer'", "2"])),
    st.tuples(st.just("data.map"), st.just("{instruction: question, output: answer}")),
    st.tuples(st.just("seed"), st.integers(0, 9)),
    st.tuples(st.just("timeout_minutes"), st.integers(1, 9)),
    st.tuples(st.just("tracking"), st.just("none")),
]


@settings(max_examples=settings().max_examples // 6)
@given(st.lists(st.one_of(SETTINGS), max_size=8, unique_by=lambda pair: pair[0]))
def test_any_settings_come_back(asked: list[tuple[str, object]]) -> None:
    assert_comes_back([f"{key}={value}" for key, value in asked])


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer.optim=null", "optimizer.target=torch.optim.SGD", "+optimizer.args.momentum=0.9"],
        ["optimizer.optim=null", "optimizer.target=torch.optim.SGD", "+optimizer.args.betas=[0.9,0.99]"],
        ["model.weights=random", "model=llama3_2_1b", "~model.architecture.head_dim"],
        ["model.architecture.rope_parameters.rope_theta=2e4", "+model.architecture.kinds={a:1.5,b:default}"],
        ["method=lora", "method.rank_pattern={q_proj:4,layers.0.k_proj:6}", "method.alpha_pattern={k_proj:0.5}"],
        ["model.architecture=null", "model.package=null", "model=hub", "model.id=a/b"],
        ["data=jsonl", "data.path='my rows, here\\'s one.jsonl'"],
        ["data=chat", "data.sources=[{path: 'my rows, a.jsonl', weight: 0.7}, {path: '~/b', weight: 2, split: test}]"],
    ],
)
def test_dictionaries_and_odd_text_come_back(words: list[str]) -> None:
    assert_comes_back(words)


def test_a_preset_is_not_started_again() -> None:
    """The command line of a trial of a sweep names its preset, which would run the sweep."""
    _, written = composed("sweep=paper_factorial", "optimizer=adamw", "batch_size=2", "repeats=3", "data.rows=128")
    assert "sweep" not in written
    assert "repeats" not in written
    assert "method.raise_to_fp32=true" in written


def test_an_option_of_the_users_own_comes_back_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("optim: null\ntarget: torch.optim.SGD\nargs: {momentum: 0.9}\n")
    config = TrialConfig(optimizer=OptimizerConfig(target="torch.optim.SGD", args={"momentum": 0.9}))
    default = OmegaConf.select(compose("config", return_hydra_config=True), "hydra.runtime.choices")
    found = SimpleNamespace(provider="command-line", schema="file", path=str(tmp_path))
    written = shortest_command(config, {**default, "optimizer": "mine"}, [found])
    assert f"--config-dir={os.path.relpath(tmp_path)} optimizer=mine " in written
    assert "optimizer.target" not in written
    found.provider = "hydra.searchpath in command-line"
    written = shortest_command(config, {**default, "optimizer": "mine"}, [found])
    assert f"hydra.searchpath=[file://{tmp_path}]" in re.sub("[\"']", "", written)
    assert "optimizer=mine" in written
