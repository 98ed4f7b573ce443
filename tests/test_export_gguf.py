"""A trained model as a GGUF file: what is refused before any work, and what a real file holds."""

import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import lab_in
from gguf import GGUFReader, GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

from lora_lab import export, gguf_converter
from lora_lab import export_gguf as writing
from lora_lab.base_weights import ADAPTER
from lora_lab.config import InvalidInput, ModelConfig, TrialConfig
from lora_lab.export_gguf import gguf_file
from lora_lab.method_config import PrecisionConfig
from lora_lab.options import DType, ModelSource, Weights
from lora_lab.outcome import EXIT_REFUSED
from lora_lab.store.trained import Trained
from lora_lab.worker.gguf_file import load_gguf, metadata_faults
from lora_lab.worker.merging import GgufCheck, Losses, Merger, Written
from lora_lab.worker.models import load_architecture
from lora_lab.worker.tiny_tokenizer import tiny_tokenizer

TEMPLATE = "{% for each in messages %}{{ each['role'] + ': ' + each['content'] + eos_token }}{% endfor %}"
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

needs_converter = pytest.mark.skipif(
    not (gguf_converter.converter_folder() / "convert_hf_to_gguf.py").is_file(),
    reason="llama.cpp's converter is not installed: export --gguf q8_0 --install-converter does it",
)


def small_model(folder: Path) -> None:
    """A model with a sentencepiece vocabulary and scaled positions, as Llama 3.1 has them."""
    model = sentencepiece.ModelProto()
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = True
    kinds = sentencepiece.ModelProto.SentencePiece.Type
    for piece, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        model.pieces.add(piece=piece, type=kind)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", type=kinds.BYTE)
    letters = ["th", "▁th", "▁the", "in", "er", *"▁etaoinshrdlucmfwypvbgkqjxz"]
    for place, piece in enumerate(letters):
        model.pieces.add(piece=piece, score=-float(place), type=kinds.NORMAL)
    ids = {each.piece: place for place, each in enumerate(model.pieces)}
    splits = [(each[:at], each[at:]) for each in letters for at in range(1, len(each))]
    merges = [(left, right) for left, right in splits if left in ids and right in ids]
    LlamaTokenizer(vocab=ids, merges=merges, chat_template=TEMPLATE).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    torch.manual_seed(0)
    shapes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(ids),
        num_key_value_heads=2,
        head_dim=32,  # not the default
        initializer_range=0.12,  # so that attention looks at positions
        max_position_embeddings=512,
        rope_parameters=SCALED,
        **shapes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 250)[None]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids).logits
    return found


@needs_converter
def test_a_converted_model_computes_the_same_and_has_the_tokenizer_and_the_template(tmp_path: Path) -> None:
    small, out = tmp_path / "small", tmp_path / "out.gguf"
    small_model(small)
    gguf_converter.convert(small, out, "q8_0")
    assert {each.tensor_type.name for each in GGUFReader(out).tensors} == {"Q8_0", "F32"}

    tokenizer = AutoTokenizer.from_pretrained(small)
    assert metadata_faults(out, tokenizer) == []
    tokenizer.chat_template = "another"
    assert len(metadata_faults(out, tokenizer)) == 1

    config = TrialConfig(
        model=ModelConfig(source=ModelSource.local, path=str(small)), precision=PrecisionConfig(dtype=DType.fp32)
    )
    device = torch.device("cpu")
    whole = logits(AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32))

    def distance(architecture: Any) -> float:
        read = logits(load_gguf(out, config, architecture, device))
        return float((read - whole).square().mean().sqrt() / whole.std())

    assert 0 < distance(load_architecture(config.model)) < 0.05
    assert distance(LlamaConfig(head_dim=32)) > 0.2  # without the scaled positions, which the reader leaves out


@needs_converter
@pytest.mark.nightly
def test_a_trial_becomes_one_file_with_the_adapters_loss_and_nothing_else_is_left(tmp_path: Path) -> None:
    small, out = tmp_path / "small", tmp_path / "out.gguf"
    small_model(small)
    model = ("model=local", f"model.path={small}")
    trained = lab_in(tmp_path)(*model, "measure=quick", "precision=fp32", "data.rows=20", "seq_len=512", "method=lora")
    assert trained.code == 0, trained.text
    said = lab_in(tmp_path, "lora_lab.export")("latest", "--gguf", "q8_0", "--out", str(out))
    assert said.code == 0, said.text
    found = [float(loss) for loss in re.findall(r"│ +(\d+\.\d+) │", said.out)]
    assert len(found) == 4  # the adapter's, here and in the record, the merged model's and the file's
    assert 0 < abs(found[3] - found[0]) < 0.02
    assert f"FROM {out}" in said.out
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mlruns", "multirun", "out.gguf", "small"]

    (small / "tokenizer.model").unlink()
    said = lab_in(tmp_path, "lora_lab.export")("latest", "--gguf", "q8_0", "--out", str(tmp_path / "other.gguf"))
    assert said.code == EXIT_REFUSED
    assert "tokenizer.model" in said.err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mlruns", "multirun", "out.gguf", "small"]


def vocabulary(file: Path, scores: list[float]) -> Path:
    """A GGUF file without weights, as the converter writes it for a sentencepiece tokenizer."""
    tokenizer = tiny_tokenizer()
    writer = GGUFWriter(file, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_scores(scores)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    writer.add_tensor("unused", np.zeros(1, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_vocabulary_without_scores_is_a_fault_because_llama_cpp_would_split_texts_otherwise(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    assert metadata_faults(vocabulary(tmp_path / "a.gguf", [-float(each) for each in range(size)]), tokenizer) == []
    (fault,) = metadata_faults(vocabulary(tmp_path / "b.gguf", [-1000.0] * size), tokenizer)
    assert "tokenizer.model" in fault
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)
    (fault,) = metadata_faults(tmp_path / "a.gguf", tokenizer)
    assert fault.endswith("is 5")


WITH_WEIGHTS = TrialConfig(
    model=ModelConfig(source=ModelSource.hub, id="someone/Some-Model", weights=Weights.pretrained)
)


def test_the_file_is_named_after_model_and_type_and_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = gguf_file(None, "q8_0", WITH_WEIGHTS)
    assert out == tmp_path / "Some-Model-tuned-q8_0.gguf"
    out.touch()
    for named, word in ((None, "exists"), ("model", "model.gguf"), ("no/such/model.gguf", "not a folder")):
        with pytest.raises(InvalidInput, match=word):
            gguf_file(named, "q8_0", WITH_WEIGHTS)
    random = TrialConfig(model=ModelConfig(source=ModelSource.hub, weights=Weights.random))
    with pytest.raises(InvalidInput, match="random weights"):
        gguf_file(None, "f16", random)


def test_a_tokenizer_that_llama_cpp_would_misread_is_found_before_anything_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    class Stub:
        def write_shapes(self, folder: Path) -> None:
            folder.mkdir()

        def check_vocabulary(self, file: Path) -> None:
            done.append("vocabulary")
            if refuse:
                raise InvalidInput("tokenizer")

        def merge(self, out: Path, more: float) -> str:
            assert more == 9 / 8 + 2  # bytes per weight: the file, and the one in 16 bit before it
            done.append("merge")
            return "losses"

        def gguf(self, file: Path) -> str:
            return file.read_text()

    def convert(folder: Path, made: Path, name: str) -> None:
        done.append(f"{folder.name} to {name}")
        made.write_text("model")

    monkeypatch.setattr(writing, "convert_vocabulary", lambda folder: folder / "vocabulary.gguf")
    monkeypatch.setattr(writing, "convert", convert)
    stub, out = cast(Merger, Stub()), tmp_path / "out.gguf"
    refuse = True
    with pytest.raises(InvalidInput, match="tokenizer"):
        writing.export_gguf(stub, "q4_k_m", out, lambda _: None)
    assert done == ["vocabulary"]
    assert list(tmp_path.iterdir()) == []
    refuse = False
    assert writing.export_gguf(stub, "q4_k_m", out, lambda _: None) == ("losses", "model")
    assert done[1:] == ["vocabulary", "merge", "merged to q4_k_m"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_missing_program_is_named_with_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InvalidInput, match="--install-converter"):
        gguf_converter.check_programs("q8_0")
    folder = gguf_converter.converter_folder()
    assert tmp_path in folder.parents
    folder.mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text("import sys\nsys.exit('Model FooForCausalLM is not supported')\n")
    gguf_converter.check_programs("q8_0")
    monkeypatch.setattr(gguf_converter.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InvalidInput, match=r"pip install llama-cpp-python(.|\n)*f16, bf16, q8_0"):
        gguf_converter.check_programs("q4_k_m")
    with pytest.raises(InvalidInput, match=r"exit code 1(.|\n)*FooForCausalLM"):
        gguf_converter.convert(tmp_path, tmp_path / "out.gguf", "q8_0")


def test_a_file_beyond_its_types_bound_is_reported_and_one_that_is_not_read_is_said_to_be_unchecked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "find_trained", lambda *_: Trained(tmp_path, tmp_path / ADAPTER, ""))
    monkeypatch.setattr(export, "stored_config", lambda _: WITH_WEIGHTS)
    monkeypatch.setattr(export, "check_programs", lambda _: None)

    def ended(loss: float | None, unread: str = "") -> tuple[int, str, str]:
        found = Written(Losses(4.0, 4.0, None, 3, 100)), GgufCheck(loss, unread, has_template=False)
        monkeypatch.setattr(export, "_gguf", lambda *_: found)
        code = export.main(["latest", "--gguf", "q8_0", "--out", str(tmp_path / "out.gguf")])
        out, err = capsys.readouterr()
        return code, out, err

    assert [ended(loss)[0] for loss in (4.019, 3.981, 4.021, 3.979, float("nan"))] == [0, 0, 1, 1, 1]
    assert "0.02" in ended(4.5)[2]
    code, out, _ = ended(None, "GGUF model with architecture foo is not supported yet.")
    assert code == 0
    assert "Not checked" in out
    assert "foo" in out
    assert "no chat template" in out
