"""Models from a hub: the real client against a small hub on loopback."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import Lab, record_of, save_tiny, store_of

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves the files of one folder as the repository me/tiny; every other repository is gated."""

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
        repository, _, name = self.path.lstrip("/").partition("/resolve/")
        file = self.server.folder / name.partition("/")[2]
        if "me/tiny" not in self.path:
            self._refuse(403, "GatedRepo")
        elif repository != "me/tiny" or not file.is_file():
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
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    home = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    yield server, {**home, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}"}
    server.shutdown()
    thread.join()
    server.server_close()


def test_any_model_of_the_hub_is_fine_tuned(lab: Lab, tmp_path: Path, hub: tuple[Hub, dict[str, str]]) -> None:
    server, environment = hub
    said = lab("model=hub", "model.id=me/tiny", "measure=quick", "seq_len=128", "tracking=none", **environment)
    assert said.code == 0, said.text
    assert record_of(tmp_path)["params"]["model.id"] == "me/tiny"
    assert any("model.safetensors" in path for path in server.asked)


def test_a_gated_model_says_what_to_do(lab: Lab, tmp_path: Path, hub: tuple[Hub, dict[str, str]]) -> None:
    said = lab("model=llama3_2_1b", "measure=quick", **hub[1])
    assert said.code == 2, said.text
    for words in ("meta-llama/Llama-3.2-1B-Instruct is gated", "Accept its licence", "hf auth login", "weights=random"):
        assert words in said.err
    assert store_of(tmp_path)[1] == []
