"""Answers to held-out prompts: greedy whatever the batch and the engine, ended or cut, by the base and the tuned
model."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import ended, tiny_config

from lora_lab.config import TrialConfig
from lora_lab.events import Answered, Event, RowLosses, Warned
from lora_lab.options import DataSource, Quantization, TrainOn
from lora_lab.worker import answers
from lora_lab.worker.answers import Question, Writer, most_tokens, questions
from lora_lab.worker.data import IGNORED, Example
from lora_lab.worker.engines.attention_masks import leave_out_masks
from lora_lab.worker.engines.chunked_loss import use_chunked_loss
from lora_lab.worker.engines.compiled import compilations, compile_layers, decoder_layers
from lora_lab.worker.engines.graph_step import GraphStep, use_graph_step
from lora_lab.worker.models import load_architecture, load_model
from lora_lab.worker.tiny_tokenizer import tiny_tokenizer
from lora_lab.worker.trial import run_trial

pytestmark = [
    # peft 0.21 still asks transformers 5.23 by the older name
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]

CPU = torch.device("cpu")
END, PAD = 257, 258
ASKED = [Question(list(range(40, 40 + length)), []) for length in (3, 17, 9)]


def model_of(config: TrialConfig) -> Any:
    torch.manual_seed(0)
    model = load_model(config, load_architecture(config.model), CPU, print)
    with torch.no_grad():  # weights this small let every token follow itself
        for name, parameter in model.named_parameters():
            if "proj.base_layer" in name and parameter.is_floating_point():
                parameter.mul_(20)
    return model


def train_a_little(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()


def writer(model: Any, config: TrialConfig, end_of_turn: str = "<|im_end|>") -> Writer:
    return Writer(model, tiny_tokenizer(), config, PAD, end_of_turn)


def write(by: Writer, asked: list[Question], tuned: bool = True, most: int = 12) -> list[answers.Answer]:
    done: list[int] = []
    found = by.write(asked, most, tuned, done.append)
    assert done[-1] == len(asked)
    return found


def greedy(model: Any, prompt: list[int], most: int) -> list[int]:
    """Token by token from the whole text, without a cache."""
    ids = list(prompt)
    model.eval()
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def become_graph(model: Any) -> None:
    """All that engine=graph changes, but for the recording: layers that are compiled would be at their first call."""
    # here and not above: torch warns while it imports its compiler
    from lora_lab.worker.engines.fused_lora_layers import use_fused_lora

    leave_out_masks(model)
    use_chunked_loss(model)
    copies = use_fused_lora(model, torch.float32)
    use_graph_step(model, GraphStep(model, contextlib.nullcontext, graphs=False, copies=copies))
    compile_layers(model)
    for layer in decoder_layers(model):
        layer.gradient_checkpointing = True


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_answers_are_greedy_whatever_the_batch(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    model = model_of(config)
    train_a_little(model)
    model.generation_config.repetition_penalty = 50.0  # some models come with one
    expected = [greedy(model, each.prompt, 12) for each in ASKED]
    assert all(END not in ids for ids in expected)
    assert all(len(set(ids)) > 3 for ids in expected)
    if engine == "graph":
        become_graph(model)
    compiled = compilations()
    state = (model.get_base_model().__dict__.get("forward"), model.config._attn_implementation)
    model.train()
    assert [each.ids for each in write(writer(model, config), ASKED)] == expected
    monkeypatch.setattr(answers, "_AT_ONCE", 1)
    monkeypatch.setattr(answers, "_TRAINED_TOKENS", 0)  # one after the other
    assert [each.ids for each in write(writer(model, config), ASKED)] == expected
    assert (model.get_base_model().__dict__.get("forward"), model.config._attn_implementation) == state
    assert model.training
    assert compilations() == compiled


@pytest.mark.parametrize(("rows", "at_once"), [(1, 8), (20, 32)])
def test_a_batch_of_answers_has_at_most_twice_the_tokens_of_a_training_step(rows: int, at_once: int) -> None:
    config = tiny_config()
    longest, most = max(len(each.prompt) for each in ASKED), 2
    config.batch_size, config.seq_len = rows, 16 * (longest + most) // 20
    done: list[int] = []
    writer(model_of(config), config).write(40 * ASKED[:1] + ASKED, most, True, done.append)
    assert done[0] == pytest.approx(at_once, abs=1 if rows > 1 else 0)
    assert done[-1] == 40 + len(ASKED)


@pytest.mark.parametrize("quantization", [Quantization.none, Quantization.nf4])
def test_the_base_model_answers_without_what_was_trained(quantization: Quantization) -> None:
    config = tiny_config(quantization=quantization)
    model = model_of(config)
    by = writer(model, config)
    untrained = write(by, ASKED)
    assert write(by, ASKED, tuned=False) == untrained
    train_a_little(model)
    tuned = write(by, ASKED)
    assert tuned != untrained
    assert write(by, ASKED, tuned=False) == untrained
    assert write(by, ASKED) == tuned, "nothing is left of the base model's turn"


def plant(model: Any, token: int, after: int = 0) -> None:
    """Let the model write `token` after `after` others."""
    calls = [0]

    def answer(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        planted = torch.zeros_like(output)
        planted[..., token if calls[0] > after else 65] = 1.0
        return planted

    model.get_output_embeddings().register_forward_hook(answer)


@pytest.mark.parametrize(
    ("token", "after", "stops", "length"), [(END, 0, True, 0), (END, 4, True, 4), (66, 0, False, 12)]
)
def test_an_answer_ends_or_is_cut(token: int, after: int, stops: bool, length: int) -> None:
    config = tiny_config()
    model = model_of(config)
    plant(model, token, after)
    found = write(writer(model, config), ASKED)
    assert {each.ended for each in found} == {stops}
    assert {len(each.ids) for each in found} == {length}


def test_a_turn_can_end_in_a_text_of_several_tokens() -> None:
    config = tiny_config()
    model, tokenizer = model_of(config), tiny_tokenizer()
    [mark] = tokenizer("#")["input_ids"]
    plant(model, mark, after=3)
    by = writer(model, config, end_of_turn="##")
    found = write(by, ASKED[:1])
    assert found[0].ended
    assert len(found[0].ids) == 5
    assert by.text(found[0].ids) == tokenizer.decode([65] * 3)


def test_the_last_answer_of_a_whole_row_is_asked_for() -> None:
    several = Example([1, 2, 3, 4, 5, 6, 7], [IGNORED, 2, 3, IGNORED, IGNORED, 6, 7])
    rows = [
        Example([1, 2, 3], [IGNORED, 2, 3]),  # a passage
        Example([1, 2, 3, 4], [IGNORED, IGNORED, 3, 4], truncated=True),
        several,
        Example([1, 2, 3, 4], [IGNORED, IGNORED, 3, IGNORED]),  # nothing is answered at its end
        Example([9, 8, 7], [IGNORED, IGNORED, 7]),
    ]
    found = questions(rows, 8)
    assert found == [Question([1, 2, 3, 4, 5], [6, 7]), Question([9, 8], [7])]
    assert questions(rows, 1) == found[:1]


def test_an_answer_is_no_longer_than_the_model_has_positions() -> None:
    architecture = load_architecture(tiny_config().model)
    positions = architecture.max_position_embeddings
    assert most_tokens(architecture, [Question([1] * 10, [])]) == min(128, positions - 10)
    assert most_tokens(architecture, [Question([1] * (positions - 7), []), Question([1], [])]) == 7


def test_a_trial_writes_what_was_asked_and_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(answers, "MOST_TOKENS", 5)
    config = tiny_config(eval_rows=2)
    config.data.source, config.data.rows, config.data.holdout, config.seq_len = DataSource.shipped, 16, 0.25, 640
    config.measure.answers, config.measure.general_rows, config.measure.steps = 3, 2, 1
    events: list[Event] = []
    run_trial(config, tmp_path, events.append)
    assert ended(events) == ("finished", "")
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    base, tuned = (event for event in events if isinstance(event, Answered))
    assert (base.tuned, tuned.tuned, base.most_tokens) == (False, True, 5)
    assert len(rows) == len(base.ended) == len(tuned.exact) == 3
    assert [row["tuned_tokens"] for row in rows] == tuned.tokens
    assert (len(base.rouge_l) == 3) != bool(base.no_rouge_l)
    assert all(row["prompt"].endswith("assistant\n") and row["gold"] for row in rows)
    assert not any("<|im_end|>" in row["gold"] for row in rows)
    texts = [(event.phase, event.text, len(event.nats)) for event in events if isinstance(event, RowLosses)]
    phases = ("evaluation_before", "evaluation_after")
    assert texts == [(phase, text, 2) for phase in phases for text in ("heldout", "general")]


def test_a_trial_without_prompts_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = tiny_config(eval_rows=0)
    config.data.source, config.data.rows, config.data.holdout, config.seq_len = DataSource.shipped, 16, 0.25, 128
    config.measure.answers, config.measure.steps = 3, 1
    events: list[Event] = []
    run_trial(config, tmp_path, events.append)
    assert ended(events) == ("finished", "")
    assert any("none is answered" in event.text for event in events if isinstance(event, Warned))
    assert not any(isinstance(event, Answered) for event in events)


def test_rows_that_are_trained_whole_ask_nothing_and_the_setting_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = tiny_config(eval_rows=0)
    config.data.source, config.data.rows, config.data.holdout, config.seq_len = DataSource.shipped, 16, 0.25, 512
    config.data.train_on, config.measure.answers = TrainOn.everything, 3
    events: list[Event] = []
    run_trial(config, tmp_path, events.append)
    assert ended(events) == ("finished", "")
    [said] = [event.text for event in events if isinstance(event, Warned) and "answered" in event.text]
    assert "data.train_on=everything" in said
    assert not any(isinstance(event, Answered) for event in events)
