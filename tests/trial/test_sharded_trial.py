"""One trial by two workers on the CPU that share out the frozen weights, through the real command line."""

import json
import os
from pathlib import Path

import psutil
import pytest
import torch
from conftest import FAKES, compiles, lab_in, record_of, records_in
from test_data_parallel import LEARNS, TINY, adapter_of, events_of, write_rows
from transformers import LlamaConfig, LlamaForCausalLM

from lora_lab.worker.screening import SCREENED
from lora_lab.worker.tiny_tokenizer import tiny_tokenizer

TOGETHER = ("placement=fsdp", "placement.workers=2")
WHOLE_WAY = (
    *(each for each in TINY if each not in ("model=tiny", "measure.answers=0")),
    *(*LEARNS, "model=local", "model.path=model", "gradient_checkpointing=full"),
    *("data.min_perplexity=2", "measure.answers=2"),
)
"""It also looks at every row before training, and answers: with 35 rows of very different lengths and 5 held-out ones,
no two workers have as many of their own."""


def write_inputs(folder: Path) -> None:
    """The rows, and a model whose head is its embeddings: what a model knows is looked for in pretrained weights."""
    write_rows(folder)
    tokenizer = tiny_tokenizer()
    shapes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(**shapes, vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    write_inputs(folder)
    said = lab_in(folder)(*WHOLE_WAY, "batch_size=4")
    assert said.code == 0, said.text
    return folder


@pytest.mark.parametrize("engine", ["eager", pytest.param("compile", marks=[compiles, pytest.mark.nightly])])
def test_shared_out_weights_train_as_whole_ones_of_one_process(alone: Path, tmp_path: Path, engine: str) -> None:
    write_inputs(tmp_path)
    said = lab_in(tmp_path)(*WHOLE_WAY, *TOGETHER, "batch_size=2", f"engine={engine}")
    assert said.code == 0, said.text
    steps, expected = events_of(tmp_path, "Step"), events_of(alone, "Step")
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in expected], rel=1e-5)
    for phase, asked in zip(events_of(tmp_path, "RowLosses"), events_of(alone, "RowLosses"), strict=True):
        assert phase["nats"] == pytest.approx(asked["nats"], rel=1e-4)
    mine, theirs = adapter_of(tmp_path), adapter_of(alone)
    for name, weights in theirs.items():
        torch.testing.assert_close(mine[name], weights, rtol=1e-4, atol=1e-6)
    medians, answers = [], []
    for folder in (tmp_path, alone):
        [found] = folder.glob(f"multirun/*/*/{SCREENED}")
        medians.append(json.loads(found.read_text())["found"]["median"])
        answers.append([(event["tuned"], event["most_tokens"]) for event in events_of(folder, "Answered")])
    assert medians[0] == pytest.approx(medians[1], rel=1e-5)
    assert answers[0] == answers[1], "by the first worker alone"
    tags = record_of(tmp_path)["tags"]
    held, whole = map(int, tags["ran.base_bytes_held"].split(" of "))
    assert 0.5 <= held / whole <= 0.55
    assert (tags["ran.adapters_equal"], tags["ran.engine"], tags["world_size"]) == ("True", engine, "2")
    figures = [record_of(folder)["metrics"] for folder in (tmp_path, alone)]
    # not with attention: which steps a window leaves out as slow is the machine's matter
    assert figures[0]["flops/per_token_products"] == figures[1]["flops/per_token_products"]


FAULTS = {
    "0.001": ("kill", "killed", "rank 1: the worker was ended by SIGKILL"),
    "0.002": ("stop", "failed", "rank 1: the worker hangs"),
}
"""As with whole weights; here the others wait within a step, for a layer."""


@pytest.mark.nightly  # by day workers with whole weights go through the same
def test_what_happens_to_one_worker_ends_the_other_that_waits_for_its_weights(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    acts = {f"{rate} rank 1": [act, "after step 2"] for rate, (act, _, _) in FAULTS.items()}
    plan.write_text(json.dumps({**acts, "patience": ["1", ""]}))
    path = os.pathsep.join(filter(None, [str(FAKES / "saboteur"), os.environ.get("PYTHONPATH")]))
    trial = ("data=random_tokens", "data.rows=60", "seq_len=64", "measure.eval_rows=0", "measure.warmup_steps=1")
    said = lab_in(tmp_path)(
        *("-m", *TINY, *TOGETHER, *trial, "measure.steps=8", f"learning_rate={','.join(FAULTS)}"),
        PYTHONPATH=path,
        SABOTAGE=str(plan),
    )
    assert said.code == 1, said.text
    found = {record["params"]["learning_rate"]: record for record in records_in(tmp_path)}
    for rate, (_, outcome, words) in FAULTS.items():
        assert (rate, found[rate]["outcome"]) == (rate, outcome)
        assert words in found[rate]["tags"]["reason"]
    journals = [path.read_text() for path in tmp_path.glob("multirun/**/events.jsonl")]
    pids = [event["pid"] for text in journals for event in map(json.loads, text.splitlines()) if "pid" in event]
    assert len(pids) == 2 * len(FAULTS)
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("engine=graph", "Use engine=compile, or placement=ddp."),
        ("engine.host_layers=all", "use engine.host_layers=0"),
        ("method=dora", "method.use_dora=false"),
        ("method.raise_to_fp32=true", "method.raise_to_fp32=false"),
        ("placement.workers=1", "placement=fsdp placement.workers=1 shares a trial with nobody"),
    ],
)
def test_what_shared_out_weights_do_not_allow_is_refused_with_what_to_type(
    tmp_path: Path, override: str, words: str
) -> None:
    asked = [*TINY, "data=random_tokens", *TOGETHER]
    said = lab_in(tmp_path)(*[each for each in asked if each.split("=")[0] != override.split("=")[0]], override)
    assert (said.code, " ".join(words.split()) in " ".join(said.err.split())) == (2, True), said.text


def test_their_memory_is_not_estimated_and_the_reason_is_said(tmp_path: Path) -> None:
    said = lab_in(tmp_path, "lora_lab.fit")("placement=fsdp", "placement.gpus=2", "--vram", "8")
    assert (said.code, "placement=fsdp" in said.err) == (2, True), said.text
