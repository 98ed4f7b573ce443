"""Studies as yaml: the one that comes with the package, another one, and what is refused."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from planted import trial

from lora_lab.composition.compose import CONF, load, register_schema
from lora_lab.config import InvalidInput
from lora_lab.report.answers.claims.judge import CONTRADICTED, NOT_TESTABLE, SUPPORTED, Verdict, judge, load_study
from lora_lab.report.answers.claims.study import Claim, ContrastClaim, FitsClaim, Study
from lora_lab.report.answers.claims.study_file import SHIPPED
from lora_lab.report.measures import THROUGHPUT
from lora_lab.report.statistics.factors import tied
from lora_lab.store.trials import Trial, groups

PAPER = load_study(SHIPPED / "arxiv_2509_12229.yaml")


def verdict(claim: str, trials: Sequence[Trial], study: Study = PAPER) -> Verdict:
    return next(each for each in judge(study, groups(trials)) if each.claim == claim)


# The yaml that comes with the package


def test_its_runs_are_those_of_the_prepared_sweep() -> None:
    prepared = yaml.safe_load((CONF / "sweep" / "paper.yaml").read_text())
    points = [dict(part.split("=") for part in line.split()) for line in prepared["hydra"]["sweeper"]["points"]]
    assert [dict(run.settings) for run in PAPER.runs] == points
    options = {key: value for each in prepared["defaults"] for key, value in each.items()}
    assert options["override /model"] == PAPER.held["model"]
    assert options["override /method"] == PAPER.held["method"]
    assert prepared["gradient_checkpointing"] == PAPER.held["gradient_checkpointing"] == "full"


def axes_of(command: str) -> dict[str, list[str]]:
    """What a sweep command varies: the prepared sweep's axes, as the command line changes them."""
    words = command.removeprefix("python -m lora_lab ").split()
    given_axes = {key: values.split(",") for key, _, values in (word.partition("=") for word in words)}
    prepared = yaml.safe_load((CONF / "sweep" / f"{given_axes.pop('sweep')[0]}.yaml").read_text())
    asked = {key: values.split(",") for key, values in prepared["hydra"]["sweeper"]["params"].items()}
    given_axes.pop("repeats", None)
    return {key: [value.strip() for value in values] for key, values in (asked | given_axes).items()}


@pytest.mark.parametrize("claim", PAPER.claims, ids=lambda claim: claim.id)
def test_the_command_that_would_settle_it_composes_and_can_tell(claim: Claim) -> None:
    assert claim.settle.startswith("python -m lora_lab ")
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = [word.split(",")[0] for word in claim.settle.split()[3:]]
        config = load(compose("config", overrides=words))
    assert config.repeats >= 3
    axes = axes_of(claim.settle)
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if isinstance(claim, ContrastClaim):
        assert {claim.of, claim.over} <= set(axes[claim.factor])
        assert not any(claim.factor in group for group in tied(points))
    elif isinstance(claim, FitsClaim):
        assert all(set(claim.settings.items()) <= set(point.items()) for point in points)
    else:
        assert len(points) > 3


def test_its_energy_figures_are_told_to_follow_from_its_speed() -> None:
    assert "one follows from the other" in verdict("faster_is_thriftier", []).original


def test_what_changed_together_is_computed_from_its_runs() -> None:
    original = verdict("paged_adamw", []).original
    assert all(name in original for name in ("optimizer (adamw to paged_adamw)", "batch_size (1 to 2)", "seq_len"))
    assert "precision" not in original


# Another paper is another yaml

OTHER = """
id: a report on checkpointing
title: Checkpointing costs time
address: https://example.org/checkpointing
card: {name: NVIDIA A100-SXM4-40GB, memory_gib: 40, regime: GPU-bound, because: it says so}
settings: {model: qwen2_5_1_5b}
runs:
  kept: {settings: {gradient_checkpointing: none, seq_len: 1024}, figures: {throughput: 1000, vram: 20}}
  again: {settings: {gradient_checkpointing: full, seq_len: 1024}, figures: {throughput: 800, vram: [10, 11]}}
claims:
  slower:
    kind: contrast
    says: checkpointing costs a fifth of the speed
    evidence: same_card
    runs: [again, kept]
    factor: gradient_checkpointing
    of: full
    over: none
    changes: [{measure: throughput, ratio: 0.8, least_ratio: 0.9}]
    settle: python -m lora_lab -m gradient_checkpointing=none,full
  vram_costs_speed:
    kind: association
    says: more throughput, less VRAM
    evidence: same_card
    more: throughput
    less: vram
    settle: python -m lora_lab -m gradient_checkpointing=none,full
"""


def checkpointing(effect: float, device: str) -> list[Trial]:
    draw = random.Random(4)
    return [
        trial(
            {THROUGHPUT.key: 1000 * math.exp(effect * (kept == "full") + draw.gauss(0, 0.01))},
            repeat=repeat,
            device=device,
            gradient_checkpointing=kept,
            batch_size=batch,
            seq_len="1024",
        )
        for repeat in range(5)
        for kept in ("none", "full")
        for batch in ("1", "2")
    ]


@pytest.mark.parametrize(
    ("effect", "device", "word"),
    [
        (math.log(0.8), "NVIDIA A100-SXM4-40GB", SUPPORTED),
        (-0.02, "NVIDIA A100-SXM4-40GB", CONTRADICTED),
        (math.log(0.8), "NVIDIA H100 80GB HBM3", NOT_TESTABLE),  # its own runs differ in nothing else
    ],
)
def test_another_paper_is_another_yaml(effect: float, device: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(OTHER)
    study = load_study(tmp_path / "other.yaml")
    found = verdict("slower", checkpointing(effect, device), study)
    assert found.verdict == word
    assert found.original.startswith("Nothing but gradient_checkpointing (none to full) changed")
    assert verdict("vram_costs_speed", checkpointing(effect, device), study).verdict == NOT_TESTABLE


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda told: told.pop("title"), "title"),
        (lambda told: told.update(clams={}), "clams"),
        (lambda told: told.update(runs={}), "runs"),
        (lambda told: told.update(claims=[]), "claims"),
        (lambda told: told["card"].update(memory_gib="8 GB"), "card.memory_gib"),
        (lambda told: told["card"].pop("regime"), "card.regime"),
        (lambda told: told["runs"]["kept"]["figures"].update(speed=3), "runs.kept.figures.speed"),
        (lambda told: told["runs"]["kept"]["figures"].update(throughput=[2, 1]), "runs.kept.figures.throughput"),
        (lambda told: told["runs"]["kept"]["figures"].update(throughput=0), "runs.kept.figures.throughput"),
        (lambda told: told["claims"]["slower"].update(kind="proof"), "claims.slower.kind"),
        (lambda told: told["claims"]["slower"].update(evidence="hearsay"), "claims.slower.evidence"),
        (lambda told: told["claims"]["slower"].update(runs=["again", "gone"]), "claims.slower.runs"),
        (lambda told: told["claims"]["slower"].update(runs=["again"]), "claims.slower.runs"),
        (lambda told: told["claims"]["slower"].update(runs=["kept", "again"]), "claims.slower.runs"),
        (lambda told: told["claims"]["slower"].pop("settle"), "claims.slower.settle"),
        (lambda told: told["claims"]["slower"].update(changes=[]), "claims.slower.changes"),
        (lambda told: told["claims"]["slower"].update(changes=["less"]), "claims.slower.changes[0]"),
        (lambda told: told["claims"]["slower"]["changes"][0].update(measure="joy"), "claims.slower.changes[0].measure"),
        (lambda told: told["claims"]["slower"]["changes"][0].update(ratio=1), "claims.slower.changes[0].least_ratio"),
        (lambda told: told["claims"]["slower"]["changes"][0].update(least_ratio=1.1), "changes[0].least_ratio"),
        (lambda told: told["claims"]["slower"]["changes"][0].update(direction="lower"), "changes[0].ratio"),
        (lambda told: told["claims"]["vram_costs_speed"].update(less="throughput"), "claims.vram_costs_speed.less"),
        (lambda told: told["claims"]["vram_costs_speed"].update(more="loss"), "claims.vram_costs_speed.less"),
        (lambda told: told["claims"]["vram_costs_speed"].update(factor="seed"), "claims.vram_costs_speed.factor"),
    ],
)
def test_what_is_wrong_in_a_yaml_is_refused_by_file_and_key(
    change: Callable[[dict[str, Any]], None], key: str, tmp_path: Path
) -> None:
    told = yaml.safe_load(OTHER)
    change(told)
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump(told))
    with pytest.raises(InvalidInput) as refused:
        load_study(file)
    assert str(file) in str(refused.value)
    assert f"{key}:" in str(refused.value) or f"{key} has to be" in str(refused.value)


@pytest.mark.parametrize("content", ["", "- a list", "a: [", "\udc80"], ids=["empty", "list", "broken", "not text"])
def test_a_file_that_is_no_yaml_mapping_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InvalidInput, match="study"):
        load_study(file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="nowhere"):
        load_study(tmp_path / "nowhere.yaml")
