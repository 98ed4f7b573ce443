"""Every yaml under conf/, found by looking: it composes, loads, and is what its name and the help say."""

import copy
import dataclasses
import functools
import itertools
import re
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import some_by_day
from hydra import compose, initialize_config_dir
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.training_args import OptimizerNames

from lora_lab.composition.compose import CONF, load, register_schema
from lora_lab.composition.keys import GROUPS, help_text
from lora_lab.config import InvalidInput, ModelConfig, TrialConfig
from lora_lab.options import Batching, Checkpointing, Weights
from lora_lab.settings import settings_of
from lora_lab.worker.models import load_architecture
from lora_lab.worker.training import optimizer_class

OPTIONS = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
ACROSS = {"capacity", "memory", "sweep"}
"""Groups whose options set keys of any group: no field of the schema, each file says so in its first line."""
NEEDED = {
    ("model", "hub"): ["model.id=owner/name"],
    ("model", "local"): ["model.path=folder"],
    **{("data", layout): ["data.path=rows.jsonl"] for layout in ("jsonl", "chat", "instruct", "completion", "text")},
    ("tracking", "server"): ["tracking.uri=http://127.0.0.1:5000"],
    **{("optimizer", option): ["method=full"] for option in ("galore", "galore_8bit", "apollo", "apollo_mini")},
    **{("optimizer", option): ["max_grad_norm=0"] for option in ("lomo", "adalomo")},
    ("cluster", "slurm"): ["tracking=none"],
    ("cluster", "ray"): ["tracking=none", "cluster.address=127.0.0.1:6379"],
}
"""What an option cannot know by itself."""

PARAMETERS = {
    "tiny": 1_250_560,
    "smollm2_135m": 134_515_008,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "llama3_2_1b": 1_235_814_400,
    "llama3_1_8b": 8_030_261_248,
}
"""As the published checkpoints have them, tied weights once."""


def composed(*overrides: str) -> TrialConfig:
    return copy.deepcopy(_composed(overrides))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> TrialConfig:
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load(compose("config", overrides=list(overrides)))


def path_of(group: str, option: str) -> Path:
    return CONF / group / f"{option}.yaml"


def options(group: str) -> list[str]:
    return [option for of, option in OPTIONS if of == group]


def test_the_folders_are_the_groups() -> None:
    assert {group for group, _ in OPTIONS} == {*GROUPS, *ACROSS}
    assert {folder.name for folder in CONF.iterdir() if folder.is_dir()} == {*GROUPS, *ACROSS, "hydra"}
    others = {CONF / "config.yaml", CONF / "hydra" / "help" / "lora_lab.yaml"}
    assert set(CONF.rglob("*.yaml")) == {path_of(*option) for option in OPTIONS} | others


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_only_the_groups_across_set_keys_of_others(group: str, option: str) -> None:
    assert (path_of(group, option).read_text().splitlines()[0] == "# @package _global_") == (group in ACROSS)


def test_the_defaults_load_as_they_are() -> None:
    assert isinstance(composed(), TrialConfig)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_loads_with_the_other_groups_defaults(group: str, option: str) -> None:
    config = composed(f"{group}={option}", *NEEDED.get((group, option), []))
    written = yaml.safe_load(path_of(group, option).read_text())
    assert written or option == "default", "an option that sets nothing is no option"
    if group in ACROSS:
        _assert_holds(config, {key: value for key, value in written.items() if key not in ("defaults", "hydra")})
    else:
        _assert_holds(getattr(config, group), written)


def _assert_holds(node: Any, written: Any) -> None:
    """Every value that the file states has arrived, under the type that the schema gives it."""
    for key, value in written.items():
        arrived = node[key] if isinstance(node, dict) else getattr(node, key)
        if isinstance(value, dict):
            _assert_holds(arrived, value)
        else:
            assert (arrived.name if isinstance(arrived, Enum) else arrived) == value


@pytest.mark.parametrize(("group", "option"), sorted(NEEDED))
def test_an_option_that_needs_a_value_names_it(group: str, option: str) -> None:
    key = NEEDED[group, option][0].split("=")[0]
    with pytest.raises(InvalidInput, match=re.escape(key)):
        composed(f"{group}={option}")


@pytest.mark.parametrize("option", options("precision"))
def test_a_precision_is_what_its_name_says(option: str) -> None:
    assert isinstance(getattr(torch, composed(f"precision={option}").precision.dtype.value), torch.dtype)
    assert composed(f"precision={option}").precision.dtype.name == option


@pytest.mark.parametrize("option", options("optimizer"))
def test_an_optimizer_is_known_to_transformers_and_keeps_its_names_promise(option: str) -> None:
    optimizer = composed(f"optimizer={option}", *NEEDED.get(("optimizer", option), [])).optimizer
    assert optimizer.in_backward == ("lomo" in option)
    projection = None if optimizer.projection is None else optimizer.projection.name
    assert projection == (option.removesuffix("_8bit") if option.startswith(("galore", "apollo")) else None)
    if optimizer.target is not None:
        assert issubclass(optimizer_class(optimizer.target), torch.optim.Optimizer)
        return
    optim = str(optimizer.optim)
    assert optim in {str(name.value) for name in OptimizerNames}
    assert ("paged" in option) == ("paged" in optim)
    assert ("fused" in option or (projection is not None and "8bit" not in option)) == ("fused" in optim)
    eight_bit = "8bit" in option or option == "paged_adamw"  # the study's PagedAdamW is the 8-bit one
    assert eight_bit == ("8bit" in optim)
    assert ("4bit" in option) == ("4bit" in optim)


@pytest.mark.parametrize("option", options("method"))
def test_methods_differ_from_the_default_lora_as_their_names_say(option: str) -> None:
    method = composed(f"method={option}").method
    assert (method.quantization.name != "none") == (option in ("qlora", "qlora_fp4", "loftq"))
    assert (method.quantization.name == "fp4") == ("fp4" in option)
    assert method.use_dora == (option == "dora")
    assert method.use_rslora == (option == "rslora")
    is_full = option.startswith("full")
    assert method.kind.name == ("full" if is_full else "vera" if option == "vera" else "lora")
    assert method.held_in.name == ("bf16" if option == "full_bf16" else "fp32")
    assert method.init.name == (option if option in ("pissa", "olora", "eva", "loftq") else "kaiming")
    assert method.freeze_a == (option == "lora_fa")
    assert (method.b_learning_rate_ratio is not None) == (option == "lora_plus")


@pytest.mark.parametrize("option", options("capacity"))
def test_a_capacity_limits_the_memory_as_its_name_says(option: str) -> None:
    expected = None if option == "whole" else float(re.fullmatch(r"(\d+)gib", option)[1])  # type: ignore[index]
    assert composed(f"capacity={option}") == composed(f"vram_limit_gib={expected or 'null'}")


def test_a_limit_on_the_command_line_beats_a_capacity() -> None:
    assert composed("capacity=8gib", "vram_limit_gib=3").vram_limit_gib == 3


def test_memory_is_three_steps_of_which_the_first_changes_nothing() -> None:
    default, lean, leanest = (composed(f"memory={option}") for option in ("default", "lean", "leanest"))
    assert default == composed()
    offloaded = composed("gradient_checkpointing=offloaded", "engine.host_embeddings=auto")
    assert lean == offloaded
    assert leanest == dataclasses.replace(offloaded, optimizer=composed("optimizer=adamw_8bit").optimizer)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_what_is_typed_beats_a_step_of_memory(before: bool) -> None:
    typed = ["optimizer=adamw", "gradient_checkpointing=full", "engine.host_embeddings=false", "engine=graph"]
    both = [*typed, "memory=leanest"] if before else ["memory=leanest", *typed]
    assert composed(*both) == composed(*typed)
    assert composed("memory=leanest", "optimizer.optim=adafactor").optimizer.optim == "adafactor"


def test_a_step_of_memory_beats_a_sweep() -> None:
    assert composed("sweep=engines", "memory=lean").gradient_checkpointing is Checkpointing.offloaded


SWEEPS = {"engines": (16, 5), "methods": (40, 3), "paper": (3, 5), "paper_factorial": (24, 5), "rank_lr": (9, 5)}
"""Points and repeats, as their first lines promise."""


def test_every_sweep_states_its_size_here() -> None:
    assert set(options("sweep")) == set(SWEEPS)


def points_of(option: str) -> list[tuple[str, ...]]:
    """The overrides of each point of a preset: the product of the values of its lines, each with its params."""
    sweeper = hydra_of(f"sweep={option}").sweeper
    params = [f"{key}={values}" for key, values in (sweeper.params or {}).items()]
    found = []
    for line in sweeper.points or [""]:
        words = (word.partition("=") for word in [*line.split(), *params])
        found += itertools.product(*([f"{key}={value}" for value in values.split(",")] for key, _, values in words))
    return found


@pytest.mark.parametrize("option", some_by_day(options("sweep"), by_day=["paper"]))
def test_every_point_of_a_sweep_composes_and_no_two_are_the_same(option: str) -> None:
    configs = [composed(f"sweep={option}", *point) for point in points_of(option)]
    points, repeats = SWEEPS[option]
    assert len(configs) == len({repr(config) for config in configs}) == points
    assert {config.repeats for config in configs} == {repeats}


@pytest.mark.parametrize("option", options("sweep"))
def test_a_sweep_is_one_without_a_flag_and_says_what_it_assumes(option: str) -> None:
    hydra = hydra_of(f"sweep={option}")
    assert hydra.mode.name == "MULTIRUN"
    assert all(hydra.sweeper.assumptions)
    for group, chosen in chosen_by(option).items():
        assert hydra.runtime.choices[group] == chosen


@pytest.mark.parametrize("option", options("sweep"))
def test_what_is_said_on_the_command_line_beats_a_sweep(option: str) -> None:
    config = composed(f"sweep={option}", "model=tiny", "repeats=1", "gradient_checkpointing=none")
    assert (config.model, config.repeats, config.gradient_checkpointing) == (
        composed("model=tiny").model,
        1,
        Checkpointing.none,
    )


def chosen_by(option: str) -> dict[str, str]:
    """The options of other groups that a preset names."""
    defaults = yaml.safe_load(path_of("sweep", option).read_text())["defaults"]
    return {key.removeprefix("override /"): chosen for entry in defaults for key, chosen in entry.items()}


@functools.cache
def hydra_of(*overrides: str) -> Any:
    """The part of the composed config that is Hydra's."""
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True).hydra


@pytest.mark.nightly
def test_the_papers_runs_are_among_the_points_of_the_factorial() -> None:
    factorial = [composed("sweep=paper_factorial", *point) for point in points_of("paper_factorial")]
    for point in points_of("paper"):
        run = composed("sweep=paper", *point)
        run.data.batching = Batching.seq_len
        assert run in factorial, f"{point} is not"


def test_two_methods_do_not_leave_traces_of_each_other() -> None:
    assert composed("method=lora").method.double_quantization is False


@functools.cache
def named_models() -> dict[str, ModelConfig]:
    named = {}
    for option in options("model"):
        model = composed(f"model={option}", *NEEDED.get(("model", option), [])).model
        if model.architecture is not None:
            model.weights = Weights.random  # its shapes from the yaml, not from the hub
            named[option] = model
    return named


def test_every_named_model_states_its_size_here() -> None:
    assert set(named_models()) == set(PARAMETERS)


@pytest.mark.parametrize("option", sorted(PARAMETERS))
def test_a_models_shapes_give_its_parameter_count(option: str) -> None:
    model = named_models()[option]
    architecture = load_architecture(model)
    plain = AutoConfig.for_model(architecture.model_type)
    for field, value in (model.architecture or {}).items():
        assert hasattr(plain, field), f"transformers knows no {field} in a {plain.model_type}"
        assert getattr(architecture, field) == value, f"transformers reads {field} another way"
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(architecture)
    assert sum(parameter.numel() for parameter in built.parameters()) == PARAMETERS[option]
    assert architecture.max_position_embeddings == model.max_seq_len


HELP = yaml.safe_load((CONF / "hydra/help/lora_lab.yaml").read_text())["template"]


def test_every_setting_is_described() -> None:
    assert [each.key for each in settings_of(TrialConfig) if not each.help and each.group is None] == []
    assert "${settings:}" in HELP


@pytest.mark.parametrize("group", ["", *GROUPS])
def test_the_help_gives_each_settings_true_default_and_choices(group: str) -> None:
    described = dict(re.findall(r"^    (\w+)\s+(.+)$", help_text(group), re.MULTILINE))
    schema = TrialConfig() if not group else getattr(TrialConfig(), group)
    for field in dataclasses.fields(schema):
        true = getattr(schema, field.name)
        if dataclasses.is_dataclass(true) or field.name == "package":
            continue
        words = re.sub(r"\s+", " ", described[field.name])
        for choice in type(true) if isinstance(true, Enum) and not group else ():
            assert choice.name in words, f"the help leaves out {field.name}={choice.name}"
    if not group:
        for key, default in re.findall(r"^    (\w+) .*?\((\S+)\)$", help_text(), re.MULTILINE):
            assert composed(f"{key}={default}") == composed(), f"the help says {key}={default}"


@pytest.mark.parametrize(
    "command", re.findall(r"^ +python -m lora_lab( .*?)(?:  .*)?$", HELP, re.MULTILINE), ids=str.strip
)
def test_the_helps_examples_compose(command: str) -> None:
    grid = [argument for argument in command.split() if argument != "-m"]
    composed(*(argument.split(",")[0] for argument in grid))


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("+batchsize=2", "batch_size"),
        ("+method.rnk=8", "method.rank"),
        ("+model.package.versoin=1", "model.package.version"),
        ("+data.columns.output=a", "data.map"),
    ],
)
def test_an_appended_typo_is_refused_and_the_right_key_named(override: str, near: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(near)):
        composed(override)


def test_a_package_without_all_its_parts_is_refused() -> None:
    with pytest.raises(InvalidInput, match="sha256"):
        composed("model.package.sha256=???")


def test_your_own_yaml_in_another_folder_is_one_more_option(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("quantization: none\nrank: 4\n")
    config = composed(f"hydra.searchpath=[file://{tmp_path}]", "method=mine")
    assert (config.method.rank, config.method.quantization.name) == (4, "none")
