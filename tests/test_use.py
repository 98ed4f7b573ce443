"""What a user does with a trained adapter: answers from it, and a merged model that loads anywhere."""

import json
import os
import re
import shutil
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import pytest
import torch
from conftest import Said, lab_in
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.types import DataType
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_lab import export, generate
from lora_lab.composition.compose import stored_config
from lora_lab.composition.validation import faults
from lora_lab.config import TrackingConfig, TrialConfig
from lora_lab.dataset.row import Role, Turn, as_conversations
from lora_lab.options import DataSource, Layout, TrackingKind
from lora_lab.outcome import EXIT_REFUSED
from lora_lab.quality.row_losses import HeldoutRows
from lora_lab.store.outbox import Outbox
from lora_lab.store.trained import find_trained
from lora_lab.store.trial_folder import TrialFolder
from lora_lab.worker.answers import Answerer, TimedAnswer
from lora_lab.worker.chat_template import ChatTemplate
from lora_lab.worker.check import checked_examples
from lora_lab.worker.merging import Losses, Merger, Written
from lora_lab.worker.models import load_architecture
from lora_lab.worker.prompts import prompt_text
from lora_lab.worker.tiny_tokenizer import tiny_tokenizer
from lora_lab.worker.tokenizer_files import load_tokenizer

# few rows, so that all held-out ones are evaluated by the trial itself
TINY = ("model=tiny", "measure=quick", "precision=fp32", "data.rows=20", "seq_len=256", "learning_rate=0.02")


@dataclass(frozen=True)
class Trained:
    """A trial that has finished."""

    where: Path
    method: str

    @property
    def folder(self) -> Path:
        return next((self.where / "multirun").glob("2*/*"))

    @property
    def config(self) -> TrialConfig:
        return stored_config(self.folder / "config.yaml")

    @property
    def recorded(self) -> float:
        metrics = json.loads((self.folder / "record.json").read_text())["metrics"]
        return float(metrics["loss/eval"])

    def call(self, command: str, *arguments: str) -> Said:
        return lab_in(self.where, f"lora_lab.{command}")(*arguments)


def train(where: Path, method: str, *more: str) -> Trained:
    done = lab_in(where)(*TINY, f"method={method}", *more)
    assert done.code == 0, done.text
    return Trained(where, method)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("lora"), "lora", "tracking.register=support bot")


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("qlora"), "qlora")


def losses(said: Said) -> dict[str, float]:
    """The losses that export prints, by the beginning of their names."""
    rows = re.findall(r"│ (adapter|merged, in|merged, loaded) .*?│ +([\d.]+) │", said.out)
    return {name: float(loss) for name, loss in rows}


def plain_loss(folder: Path, config: TrialConfig) -> float:
    """The loss on the run's held-out rows by transformers alone, one row after the other."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = checked_examples(config, load_architecture(config.model))[0].heldout
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row.ids]), torch.tensor(row.labels)[1:]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        kept = labels >= 0
        total += float(torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum"))
        count += int(kept.sum())
    return total / count


@pytest.mark.nightly
def test_a_merged_lora_has_the_adapters_loss_wherever_it_is_loaded(lora: Trained, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    said = lora.call("export", str(lora.folder), "--merge", str(out))
    assert said.code == 0, said.text
    found = losses(said)
    assert found["adapter"] == pytest.approx(lora.recorded, abs=2e-5)
    assert found["merged, in"] == pytest.approx(found["adapter"], abs=1e-4)
    assert plain_loss(out, lora.config) == pytest.approx(lora.recorded, abs=1e-4)
    assert "merged, loaded" not in found
    tokenizer = AutoTokenizer.from_pretrained(out)
    asked = [{"role": "user", "content": "Why?"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == prompt_text(
        ChatTemplate(load_tokenizer(lora.config.model)), [Turn(Role.user, "Why?")]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_qlora_is_merged_into_whole_weights_and_measured_in_4_bit_again(qlora: Trained, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    said = qlora.call("export", "latest", "--merge", str(out))
    assert said.code == 0, said.text
    found = losses(said)
    assert found["adapter"] == pytest.approx(qlora.recorded, abs=2e-5)
    assert plain_loss(out, qlora.config) == pytest.approx(found["merged, in"], abs=2e-5)
    assert found.keys() == {"adapter", "merged, in", "merged, loaded"}
    assert found["merged, loaded"] != found["merged, in"]
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_base_and_tuned_answer_side_by_side_with_their_speed(lora: Trained) -> None:
    said = lora.call("generate", str(lora.folder), "Hello?", "--max-new-tokens", "8", "--system", "Be brief.")
    assert said.code == 0, said.text
    assert {"base", "tuned"} <= {*re.findall(r"\w+", said.out)}
    assert len(re.findall(r"first token after [\d.]+ s", said.out)) == 2
    assert re.search(r"memory: \d+\.\d+ GiB resident", said.out)
    assert said.err == ""


def test_a_run_is_found_by_the_beginning_of_its_id_and_one_model_may_answer(lora: Trained) -> None:
    run_id = json.loads((lora.folder / "delivered.json").read_text())["run_id"]
    said = lora.call("generate", run_id[:8], "Hello?", "--max-new-tokens", "4", "--only", "tuned")
    assert said.code == 0, said.text
    assert len(re.findall(r"first token after", said.out)) == 1


def test_the_tuned_answer_is_the_merged_models(lora: Trained, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    Merger(lora.config, lora.folder / "adapter", lambda _: None).merge(out)
    answerer = Answerer(lora.config, lora.folder / "adapter", as_conversations=True)
    asked = [Turn(Role.user, "Hello?")]
    base, tuned = (answerer.answer(asked, tuned=tuned, most_tokens=12) for tuned in (False, True))
    ids = load_tokenizer(lora.config.model)(prompt_text(ChatTemplate(tiny_tokenizer()), asked), return_tensors="pt")[
        "input_ids"
    ]
    made = AutoModelForCausalLM.from_pretrained(out).generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=258)
    assert made[0, ids.shape[1] :].tolist() == tuned.ids
    assert tuned.ids != base.ids
    assert tuned.first_token_seconds > 0
    assert tuned.tokens_per_second == 11 / tuned.rest_seconds > 0


def test_each_model_goes_on_with_its_own_conversation_until_reset(
    lora: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[bool, list[str]]] = []

    def answer(_: Answerer, turns: list[Turn], tuned: bool, most_tokens: int) -> TimedAnswer:
        asked.append((tuned, [each.text for each in turns]))
        return TimedAnswer(f"{'tuned' if tuned else 'base'} answer", [1, 2, 3], True, 4, 0.1, 0.2)

    lines = iter(["one", "", "two", "/reset", "three"])

    def read(_: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(Answerer, "answer", answer)  # also of the call that warms up
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(os, "environ", {**os.environ})
    assert generate.main([str(lora.folder), "--system", "short"]) == 0
    assert [said for tuned, said in asked[1:] if tuned] == [
        ["short", "one"],
        ["short", "one", "tuned answer", "two"],
        ["short", "three"],
    ]
    assert [said for tuned, said in asked if not tuned][1] == ["short", "one", "base answer", "two"]


@pytest.mark.parametrize(
    ("layout", "kinds", "expected"),
    [
        (Layout.auto, "passages", False),
        (Layout.auto, "conversations", True),
        (Layout.auto, "conversations and passages", True),
        (Layout.completion, "conversations", True),
        (Layout.auto, "", True),
        (Layout.text, "", False),
    ],
)
def test_a_question_is_laid_out_as_the_rows_were(layout: Layout, kinds: str, expected: bool) -> None:
    assert as_conversations(layout, kinds) is expected


@pytest.mark.nightly
def test_plain_text_whose_layout_was_found_goes_on_without_the_chat_template(tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * 9}) + "\n" for n in range(20)))
    done = lab_in(tmp_path)(*TINY, "data=jsonl", "data.path=plain.jsonl")
    assert done.code == 0, done.text
    trained = Trained(tmp_path, "lora")
    assert find_trained(str(trained.folder), tmp_path).kinds == "passages"
    said = trained.call("generate", "latest", "line 3", "--max-new-tokens", "2", "--system", "Be brief.")
    assert said.code == EXIT_REFUSED
    assert "plain text" in said.err


def test_a_system_prompt_goes_into_the_question_where_the_template_has_no_place_for_it() -> None:
    tokenizer = tiny_tokenizer()
    asked = [Turn(Role.system, "Be brief."), Turn(Role.user, "Why?")]
    assert "system\nBe brief." in prompt_text(ChatTemplate(tokenizer), asked)
    for refusal in ("{{ raise_exception('no system') }}", ""):
        template = tiny_tokenizer().chat_template.replace(
            "{% for message in messages %}",
            "{% for message in messages %}{% if message['role'] == 'system' %}" + refusal + "{% else %}",
        )
        tokenizer.chat_template = template.replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
        assert "user\nBe brief.\n\nWhy?" in prompt_text(ChatTemplate(tokenizer), asked)
    assert prompt_text(None, asked[1:]) == "Why?"
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + tokenizer.chat_template
    assert prompt_text(ChatTemplate(tokenizer), asked[1:]).startswith("26")  # the day that rows are laid out with


def versions(lora: Trained, name: str) -> list[ModelVersion]:
    return MlflowClient(f"sqlite:///{lora.where}/mlruns/mlflow.db").search_model_versions(f"name = '{name}'")


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning")  # of MLflow's own modules
def test_a_registered_version_loads_by_mlflow_and_answers_as_the_tuned_model(lora: Trained) -> None:
    [version] = versions(lora, "support bot")
    # the adapter and its config, and nothing of the base model
    stored = Path(version.source.removeprefix("file://"))
    weights = [path.name for path in stored.rglob("*") if path.suffix in (".safetensors", ".bin")]
    assert weights == ["adapter_model.safetensors"]
    mlflow.set_tracking_uri(f"sqlite:///{lora.where}/mlruns/mlflow.db")
    try:
        model = mlflow.pyfunc.load_model("models:/support bot/1")
    finally:
        mlflow.set_tracking_uri(None)
    assert model.metadata.signature.inputs.input_types() == [DataType.string]
    found = model.predict(["Hello?", "Why?"], params={"max_new_tokens": 12})
    answerer = Answerer(lora.config, lora.folder / "adapter", as_conversations=True)
    assert found == [
        answerer.answer([Turn(Role.user, asked)], tuned=True, most_tokens=12).text for asked in ("Hello?", "Why?")
    ]


def test_an_adapter_that_could_not_be_registered_is_registered_once_later(
    lora: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tracking = TrialFolder(lora.folder), TrackingConfig(root=str(lora.where / "mlruns"), register="later")
    record = folder.record()
    assert record is not None
    (lora.folder / "delivered.json").unlink()

    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("this server has no registry")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "create_model_version", refuse)
        store = Outbox(tracking)
        assert store.deliver_trial(folder, record) is None
        assert "no registry" in store.fault
        assert not folder.delivered
    assert versions(lora, "later") == []
    for _ in range(2):  # the second time as after a kill before the note of the first
        assert Outbox(tracking).deliver_trial(folder, record) is not None
    assert folder.delivered
    [version] = versions(lora, "later")
    assert version.tags["record_id"] == record.id


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "..", " a", "a" * 257, "50%"])
def test_a_name_that_mlflow_does_not_take_is_refused(name: str) -> None:
    config = TrialConfig()
    config.tracking.register = name
    assert any("tracking.register" in fault for fault in faults(config))
    config.tracking.register = "support bot-2.1"
    assert not any("tracking.register" in fault for fault in faults(config))
    config.tracking.kind = TrackingKind.none
    assert any("tracking.register" in fault for fault in faults(config))


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> None:
    err = capsys.readouterr().err
    assert code == EXIT_REFUSED, err
    assert [word for word in words if word not in err] == [], err


def test_what_cannot_be_exported_is_refused_before_a_model_is_loaded(
    lora: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "_merge", None)  # calling it would raise
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused(capsys, export.main([str(lora.folder), "--merge", "full"]), "full exists")
    refused(capsys, export.main([str(lora.folder), "--merge", "no/such/out"]), "cannot be made")
    refused(capsys, export.main(["latest", "--merge", "out"]), "multirun/latest")
    refused(capsys, export.main(["0123abc", "--merge", "out"]), "0123abc")
    refused(capsys, export.main([str(tmp_path), "--merge", "out"]), "config.yaml")
    shutil.copytree(lora.folder, "bare", ignore=shutil.ignore_patterns("adapter"))
    refused(capsys, export.main(["bare", "--merge", "out"]), "bare holds no adapter")
    refused(capsys, generate.main(["bare", "Why?"]), "bare holds no adapter")
    (tmp_path / "bare/checkpoints/000005").mkdir(parents=True)
    (tmp_path / "bare/checkpoints/000005/complete.json").touch()
    refused(capsys, generate.main(["bare", "Why?"]), f"resume=true hydra.run.dir={tmp_path}/bare")
    refused(capsys, generate.main([str(lora.folder / "adapter"), "Why?"]), f"inside the trial {lora.folder}")
    refused(capsys, generate.main([str(lora.folder), " "]), "empty")


def test_a_full_disk_leaves_nothing_behind(
    lora: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")  # as shutil has it
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    refused(capsys, export.main([str(lora.folder), "--merge", str(tmp_path / "out")]), "GiB free")
    assert list(tmp_path.iterdir()) == []


def test_a_merged_model_that_differs_too_much_is_reported_and_stays(
    lora: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for merged in (4.0002, float("nan")):
        monkeypatch.setattr(export, "_merge", lambda *_, found=merged: Written(Losses(4.0, found, None, 3, 100)))
        assert export.main([str(lora.folder), "--merge", str(tmp_path / "out")]) == export.EXIT_DIFFERS
        assert "0.0001" in capsys.readouterr().err


def test_losses_are_compared_with_the_record_and_what_cannot_be_is_said(lora: Trained, tmp_path: Path) -> None:
    adapter, recorded = lora.folder / "adapter", find_trained(str(lora.folder), tmp_path).heldout
    assert recorded is not None

    def merged(config: TrialConfig, name: str, rows: HeldoutRows | None = recorded) -> Written:
        return Merger(config, adapter, lambda _: None, rows).merge(tmp_path / name)

    same = merged(lora.config, "same")
    assert same.unchecked == ()
    assert same.losses is not None
    assert same.losses.recorded == pytest.approx(same.losses.trained, abs=2e-5)

    changed = replace(lora.config, data=replace(lora.config.data, rows=30))
    other = merged(changed, "other")
    assert other.losses is not None
    assert other.losses.recorded is None
    assert "not the held-out rows" in other.unchecked[0]

    gone = replace(lora.config.data, source=DataSource.file, path=str(tmp_path / "gone.jsonl"))
    unread = merged(replace(lora.config, data=gone), "unread")
    assert unread.losses is None
    assert "gone.jsonl" in unread.unchecked[0]
    assert (tmp_path / "unread" / "model.safetensors").is_file()


def test_an_export_without_rows_says_so_and_one_that_contradicts_the_record_is_reported(
    lora: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(written: Written) -> tuple[int, str, str]:
        monkeypatch.setattr(export, "_merge", lambda *_: written)
        code = export.main([str(lora.folder), "--merge", str(tmp_path / "out")])
        return code, *capsys.readouterr()

    code, out, _ = ended(Written(None, ("Not checked: any loss.",)))
    assert code == 0
    assert "Not checked: any loss." in out
    codes = [ended(Written(Losses(4.0, 4.0, None, 3, 100, recorded)))[0] for recorded in (3.981, 4.019, 3.979, 4.021)]
    assert codes == [0, 0, export.EXIT_DIFFERS, export.EXIT_DIFFERS]
    assert "record" in ended(Written(Losses(4.0, 4.0, None, 3, 100, 5.0)))[2]
