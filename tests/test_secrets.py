"""No secret is written or printed, whatever it stands in."""

import dataclasses
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from conftest import give_store, lab_in

from lora_lab.composition.validation import faults
from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.events import Warned, decode, encode
from lora_lab.options import TrackingKind
from lora_lab.outcome import end_of
from lora_lab.secrets import clean, without_secrets
from lora_lab.store.errors import TrackingFailed

PLANTED = "Planted/7Secret+"
"""With what an address has to quote."""

NAMES = [
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "AWS_SECRET_ACCESS_KEY",
    "MY_API_KEY",
    "apikey",
    "DB_PASS",
    "TOKEN_2",
    "X_PWD",
]

HOLDING = [
    "https://me:Planted@host/x",
    "https://Planted@host",
    "https://me:Pla/Planted@host/x",
    "https://me:p#Planted?x@host/x",
    "me:Planted@host",
    "me@corp:Planted@host:80/x",
    "//me:Planted@host/x",
    "postgresql+psycopg://me:Planted@host:5432/db?sslmode=require",
    "https://host/x?token=Planted",
    "https://host/x?a=1&X-Amz-Signature=Planted&b=2",
    "https://host/x?sig=Planted",
    "host/x?api_key=Planted",
    "https://host/cb#access_token=Planted",
    "host=h password=Planted",
    "Authorization: Bearer Planted",
    "hf_PlantedPlantedPlanted",
    "ghp_PlantedPlantedPlanted",
]
HARMLESS = [
    "http://127.0.0.1:5000",
    "https://host/prefix/mlflow",
    "sqlite:////tmp/a@b/mlflow.db",
    "owner/name@main",
    "a@b.c",
    "/data/rows:1/x.jsonl",
    "['q_proj', 'v_proj']",
    "12:30:01 tokens=5 key=3",
    "RuntimeError: expected str: got int @ line 3",
]


@pytest.mark.parametrize("text", HOLDING)
def test_what_is_secret_is_cut_out_of_a_text(text: str) -> None:
    for whole in (text, f"it failed: {text} was refused", f"tracking.uri={text}", f"('{text}')"):
        if "=" in whole.partition(text)[0] and " " in text:
            continue
        assert "Planted" not in without_secrets(whole), whole


@pytest.mark.parametrize("text", HARMLESS)
def test_what_holds_none_stays_as_it_is(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize("name", NAMES)
def test_the_value_of_a_variable_that_is_named_like_a_secret_is_cut_out(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, PLANTED)
    assert without_secrets(f"a{PLANTED}b and Planted%2F7Secret%2B") == "a***b and ***"


def test_a_password_in_a_variables_address_is_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://me:{PLANTED}@host/db")
    assert without_secrets(f"login with {PLANTED} failed") == "login with *** failed"


@pytest.mark.parametrize(
    ("name", "value"), [("TOKENIZERS_PARALLELISM", "parallel"), ("PWD", "/folder"), ("X_KEY", "true")]
)
def test_ordinary_variables_leave_words_alone(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert without_secrets(f"x {value} y") == f"x {value} y"


@pytest.mark.parametrize("name", ["GOOGLE_APPLICATION_CREDENTIALS", "SSL_KEY"])
def test_the_name_of_a_file_with_credentials_is_no_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv(name, str(tmp_path))
    assert without_secrets(f"{tmp_path}/x") == f"{tmp_path}/x"


def test_whoever_speaks_of_an_error_says_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    said = f"GET https://me:Planted@host with {PLANTED}"
    end = end_of(OSError(said))
    log = tmp_path / "worker.log"
    log.write_bytes(b"\xff\n" + said.encode())
    clean(log)
    texts = [
        end.reason,
        end.traceback,
        str(InvalidInput(said)),
        str(TrackingFailed(said, said)),
        log.read_text("latin-1"),
    ]
    texts += [encode(Warned(t=0.0, text=said)), str(decode(encode(Warned(t=0.0, text=said))))]
    assert [text for text in texts if text is None or "Planted" in text] == []
    assert log.read_bytes().startswith(b"\xff\n"), "the rest of a log stays as it is"


def text_settings(kind: Any = TrialConfig, prefix: str = "") -> Iterator[str]:
    """Dotted keys of every setting that can be text."""
    for name, hint in get_type_hints(kind).items():
        parts = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for part in parts:
            if dataclasses.is_dataclass(part):
                yield from text_settings(part, f"{prefix}{name}.")
            elif part is str or get_origin(part) in (list, dict):
                yield f"{prefix}{name}"


def with_setting(key: str, text: str) -> TrialConfig:
    config: Any = TrialConfig()
    *above, name = key.split(".")
    node = config
    for part in above:
        if getattr(node, part) is None:  # a group that is absent by default
            hint = next(p for p in get_args(get_type_hints(type(node))[part]) if dataclasses.is_dataclass(p))
            setattr(node, part, hint(**{field.name: "" for field in dataclasses.fields(hint)}))
        node = getattr(node, part)
    there = getattr(node, name)
    hint = get_type_hints(type(node))[name]
    kinds = {get_origin(part) or part for part in (get_args(hint) if isinstance(hint, types.UnionType) else (hint,))}
    planted: Any = text
    if list in kinds or isinstance(there, list):
        planted = [text]
    elif dict in kinds:
        planted = {"a": {"b": [text]}}
    setattr(node, name, planted)
    config.tracking.kind = TrackingKind.server
    config.tracking.uri = config.tracking.uri or "http://127.0.0.1:5000"
    return config  # type: ignore[no-any-return]  # made by name


@pytest.mark.parametrize("key", [*text_settings()])
def test_a_secret_in_a_setting_is_refused_without_repeating_it(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("LAB_SECRET", PLANTED)
    for text in (*HOLDING, f"x-{PLANTED}"):
        found = faults(with_setting(key, text))
        assert [fault for fault in found if fault.startswith(key)], (key, text)
        assert "Planted" not in str(InvalidInput(*found))


@pytest.mark.parametrize(
    "uri",
    [
        "127.0.0.1:5000",
        "host",
        "ftp://host",
        "http://",
        "http://host:port",
        "http://host:99999",
        "http://host:0",
        "http://[::1",
        "http://ho st",
        "http://host\\x",
        "http://höst",
        "http:/host",
        "https://host/eyJhbGciOiJIUzI1NiJ9x",
        "https://host/a1b2c3d4e5f6a7b8c9d0e1f2",
        "http://host?experiment=1",
    ],
)
def test_what_is_no_address_of_a_server_is_refused(uri: str) -> None:
    assert [fault for fault in faults(with_setting("tracking.uri", uri)) if "tracking.uri" in fault]


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:5000", "https://host/", "http://[::1]:5000/mlflow", "https://a.b-c.example/x/y.mlflow"]
)
def test_an_address_of_a_server_is_taken(uri: str) -> None:
    assert faults(with_setting("tracking.uri", uri)) == faults(with_setting("tracking.uri", "http://h"))


LEAKY = """
import os, sys, warnings
import torch
class Leaky(torch.optim.SGD):
    def step(self, closure=None):
        said = f"https://me:{os.environ['MY_PASSWORD']}@host refused {os.environ['HF_TOKEN']}"
        print(said, flush=True)
        warnings.warn(said)
        raise RuntimeError(said)
"""


def test_no_byte_that_a_trial_leaves_or_prints_holds_a_secret(tmp_path: Path, empty_store: Path) -> None:
    """Its optimizer prints, warns of and fails with what stands in the environment, as a library might."""
    folder = tmp_path / "here"
    folder.mkdir()
    give_store(folder, empty_store)
    (folder / "leaky.py").write_text(LEAKY)
    secrets = {
        "HF_TOKEN": "hf-Planted0123456789",
        "MY_PASSWORD": "Planted/Password",
        "DB_URL": "pg://u:PlantedInUrl@h/d",
    }
    tiny = ("model=tiny", "measure=quick", "data=random_tokens", "seq_len=32", "data.rows=16", "measure.steps=1")
    own = ("optimizer.optim=null", "optimizer.target=leaky.Leaky")
    said = lab_in(folder)(*tiny, *own, **secrets, COLUMNS="1000")
    assert said.code == 1, said.text
    assert "RuntimeError: https://***@host refused ***" in said.out
    holding = [path for path in folder.rglob("*") if path.is_file() and b"Planted" in path.read_bytes()]
    assert holding == []
    assert "Planted" not in said.text
    assert [path.name for path in folder.rglob("traceback.txt")] == ["traceback.txt"] * 2, "one of them is in the store"
