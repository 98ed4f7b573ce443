"""Optimizers x precisions x methods run, and what ran is what was asked for."""

from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import lab_in, records_in

OPTIMIZERS = {  # class, bits, paged, fused
    "adafactor": ("transformers.Adafactor", "32", "False", "False"),
    "adamw": ("torch.AdamW", "32", "False", "False"),
    "adamw_8bit": ("bitsandbytes.AdamW", "8", "False", "False"),
    "adamw_8bit_compiled": ("lora_lab.AdamW8bit", "8", "False", "False"),
    "adamw_fused": ("torch.AdamW", "32", "False", "True"),
    "lion_8bit": ("bitsandbytes.Lion", "8", "False", "False"),
    "paged_adamw": ("bitsandbytes.AdamW", "8", "True", "False"),
    "paged_adamw_32bit": ("bitsandbytes.AdamW", "32", "True", "False"),
    "galore": ("torch.AdamW", "32", "False", "True"),
    "galore_8bit": ("bitsandbytes.AdamW", "8", "False", "False"),
    "apollo": ("torch.AdamW", "32", "False", "True"),
    "apollo_mini": ("torch.AdamW", "32", "False", "True"),
    "lomo": ("torch.SGD", "32", "False", "False"),
    "adalomo": ("transformers.Adafactor", "32", "False", "False"),
}
PROJECTED = ("galore", "galore_8bit", "apollo", "apollo_mini")  # for method=full alone
IN_BACKWARD = ("lomo", "adalomo")
PRECISIONS = {"fp32": ("float32", "no"), "fp16": ("float32", "no"), "bf16": ("bfloat16", "bf16")}  # on a CPU
METHODS = {
    **{"lora": "none", "rslora": "none", "dora": "none", "qlora": "nf4", "qlora_fp4": "fp4"},
    **dict.fromkeys(("full", "full_bf16", "pissa", "olora", "eva", "lora_plus", "lora_fa", "vera"), "none"),
}
"""method=loftq has none of the tiny model's weights to read."""
STARTS = ("pissa", "olora", "eva")
FULL = {"full": "float32", "full_bf16": "bfloat16"}

Cell = tuple[str, str, str]


def cells(full: bool) -> list[Cell]:
    """Every combination that is possible; or as few as hold every option."""
    if full:
        return [cell for cell in product(OPTIMIZERS, PRECISIONS, METHODS) if cell == possible(cell)]
    others = [optimizer for optimizer in OPTIMIZERS if optimizer not in PROJECTED]
    short = [*((optimizer, "full") for optimizer in PROJECTED), *zip(cycle(others), METHODS)]
    return [
        possible((optimizer, precision, method)) for (optimizer, method), precision in zip(short, cycle(PRECISIONS))
    ]


def chosen(config: pytest.Config) -> list[Cell]:
    """What runs: on each push half of the short cross, by night all of it."""
    short = cells(config.getoption("--full-cross"))
    return short if config.getoption("--nightly") else short[::2]


def possible(cell: Cell) -> Cell:
    """The combination itself, or one near to it that is not refused."""
    optimizer, precision, method = cell
    if (optimizer in (*PROJECTED, *IN_BACKWARD) and precision == "fp16") or method == "full_bf16":
        precision = "bf16"
    return optimizer, precision, "full" if optimizer in PROJECTED and method not in FULL else method


def point(cell: Cell) -> str:
    optimizer, precision, method = cell
    clipping = " max_grad_norm=0" if optimizer in IN_BACKWARD else ""
    return f"optimizer={optimizer} precision={precision} method={method}{clipping}"


def test_the_short_cross_has_every_option() -> None:
    assert [set(options) for options in zip(*cells(full=False), strict=True)] == [
        set(OPTIMIZERS),
        set(PRECISIONS),
        set(METHODS),
    ]


@pytest.fixture(scope="module")
def records(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("cross")
    asked = chosen(request.config)
    short = (
        "data=random_tokens",
        "data.rows=16",
        "seq_len=32",
        "measure=quick",
        "measure.steps=1",
        "measure.eval_rows=1",
    )
    (folder / "sweep").mkdir()
    for first in range(0, len(asked), 21):  # all in one sweep take longer than a command may on a busy machine
        points = [point(cell) for cell in asked[first : first + 21]]
        preset = {"hydra": {"mode": "MULTIRUN", "sweeper": {"points": points}}}
        text = f"# @package _global_\n{yaml.safe_dump(preset)}"
        (folder / "sweep" / f"from_{first}.yaml").write_text(text, encoding="utf-8")
        said = lab_in(folder)("--config-dir", str(folder), f"sweep=from_{first}", "model=tiny", *short, "tracking=none")
        assert said.code == 0, said.text[-3000:]
    return records_in(folder)


@pytest.mark.timeout(900)
def test_all_of_them_finished(records: list[dict[str, Any]], request: pytest.FixtureRequest) -> None:
    ran = {tuple(record["params"][group] for group in ("optimizer", "precision", "method")) for record in records}
    assert ran == set(chosen(request.config))
    assert {record["outcome"] for record in records} == {"finished"}


def test_what_ran_is_what_was_asked_for(records: list[dict[str, Any]]) -> None:
    for record in records:
        asked, ran = record["params"], {k.removeprefix("ran."): v for k, v in record["tags"].items()}
        optimizer = tuple(ran[f"optimizer_{key}"] for key in ("class", "bits", "paged", "fused"))
        assert optimizer == OPTIMIZERS[asked["optimizer"]], record["name"]
        dtype, autocast = PRECISIONS[asked["precision"]]
        assert (ran["autocast"], ran["grad_scaler"]) == (autocast, "False"), record["name"]
        assert ran["quantization"] == METHODS[asked["method"]], record["name"]
        method = asked["method"]
        assert ran["adapters"] == ("none" if method in FULL else "vera" if method == "vera" else "lora"), record["name"]
        assert ran.get("adapters_start", "kaiming") == (method if method in STARTS else "kaiming"), record["name"]
        assert ran["adapters_frozen_a"] == str(method == "lora_fa"), record["name"]
        assert ran["quantized_compute_dtype"] == ("none" if ran["quantization"] == "none" else dtype)
        frozen = {"none"} if asked["method"] in FULL else {dtype}
        assert {item.split()[0] for item in ran["weight_dtypes"].split(", ")} - {"uint8"} == frozen, record["name"]
        assert {item.split()[0] for item in ran["adapter_dtypes"].split(", ")} == {
            FULL.get(asked["method"], "float32")
        }, record["name"]
        is_small = method == "vera"  # bitsandbytes keeps the state of fewer than 4,096 elements in fp32
        assert ("uint8" in ran["optimizer_state_dtypes"]) == (optimizer[1] == "8" and not is_small), record["name"]
        assert ("fp16" in ran["stand_ins"]) == (asked["precision"] == "fp16"), record["name"]
        assert ("paged" in ran["stand_ins"]) == (optimizer[2] == "True"), record["name"]
