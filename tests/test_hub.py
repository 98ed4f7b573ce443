"""Models and rows from a hub: the real clients against a small hub on loopback."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import Lab, record_of, save_tiny, store_of

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves the files of one folder as the model me/tiny, and those of its folder rows as the data set me/rows; every
    other repository is gated."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        self.server.asked.append(self.path)
        if self.path.startswith("/api/datasets/me/rows"):
            return self._describe_rows()
        repository, _, name = self.path.lstrip("/").partition("/resolve/")
        folder = self.server.folder / ("rows" if repository == "datasets/me/rows" else "")
        file = folder / name.partition("/")[2]
        if "me/tiny" not in self.path and "me/rows" not in self.path:
            self._refuse(403, "GatedRepo")
        elif repository not in ("me/tiny", "datasets/me/rows") or not file.is_file():
            self._refuse(404, "EntryNotFound")
        else:
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    def _describe_rows(self) -> None:
        """Answer as the hub's API does: what the data set is, or which files it has."""
        files = [*(self.server.folder / "rows").iterdir()]
        described: object = {"id": "me/rows", "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
        if "/tree/" in self.path:
            described = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT} for file in files
            ]
        content = json.dumps(described).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "Access to this repo is restricted" if status == 403 else "not found")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Hub, dict[str, str]]]:
    folder = tmp_path / "repository"
    save_tiny(folder)
    (folder / "rows").mkdir()
    rows = [{"instruction": f"Which is number {number}?", "output": f"It is {number}."} for number in range(40)]
    (folder / "rows" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    home = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    yield server, {**home, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}"}
    server.shutdown()
    thread.join()
    server.server_close()


def test_any_model_of_the_hub_is_fine_tuned_on_rows_of_the_hub_and_of_a_file(
    lab: Lab, tmp_path: Path, hub: tuple[Hub, dict[str, str]]
) -> None:
    server, environment = hub
    (tmp_path / "own.jsonl").write_text('{"text": "Once."}\n{"text": "Twice."}\n' * 10)
    sources = "data.sources=[{id: me/rows, weight: 2}, {path: own.jsonl, weight: 1}]"
    model = ("model=hub", "model.id=me/tiny", "measure=quick", "seq_len=128", "tracking=none")
    said = lab(*model, "data=jsonl", sources, **environment)
    assert said.code == 0, said.text
    record = record_of(tmp_path)
    assert record["params"]["model.id"] == "me/tiny"
    assert record["metrics"]["data/rows_read"] == 60
    assert "40 of 40 rows of me/rows; 20 of 20 rows of own.jsonl are used" in record["tags"]["warnings"]
    assert any("model.safetensors" in path for path in server.asked)


@pytest.mark.nightly  # an interpreter of its own takes 20 s; by day test_models.py has the message
def test_a_gated_model_says_what_to_do(lab: Lab, tmp_path: Path, hub: tuple[Hub, dict[str, str]]) -> None:
    said = lab("model=llama3_2_1b", "measure=quick", **hub[1])
    assert said.code == 2, said.text
    for words in ("meta-llama/Llama-3.2-1B-Instruct is gated", "Accept its licence", "hf auth login", "weights=random"):
        assert words in said.err
    assert store_of(tmp_path)[1] == []
