"""What the hub can answer, by a server of the same protocol: each case ends in a path or in a sentence of advice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.checkpoint.test_layouts import FLUX

ROOT = Path(__file__).parents[2]
COMMIT, FILE = "a" * 40, "svdq-int4_r32-x.safetensors"
CHILD = """
import json, sys
from huggingface_hub.utils import _http
from engine.checkpoint.hub import resolve
from engine.errors import EngineError

_http.time.sleep = lambda _: None  # the client's patience with a silent server is not what is tested
told = {}
for name in sys.argv[1:]:
    try:
        told[name] = ["path", str(resolve(name))]
    except EngineError as error:
        told[name] = [type(error).__name__, str(error)]
print(json.dumps(told))
"""


class Hub(BaseHTTPRequestHandler):
    """Answers of the hub for repositories named after them."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def answer(self, code: int, body: bytes = b"{}", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        errors = {"gated": (403, "GatedRepo"), "gone": (404, "RepoNotFound"), "private": (401, "RepoNotFound")}
        repository = next((part for part in (*errors, "broken", "several", "one") if f"me/{part}" in self.path), "")
        if repository in errors:
            code, what = errors[repository]
            self.answer(code, X_Error_Code=what, X_Error_Message=what)
        elif repository == "broken":
            self.answer(500)
        elif self.path.startswith("/api/models"):
            self.list_files([FILE, "svdq-fp4_r32-x.safetensors"] if repository == "several" else [FILE])
        elif self.path.endswith(FILE):
            self.answer(200, FLUX.read_bytes(), X_Repo_Commit=COMMIT, ETag='"b"')
        else:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)

    def list_files(self, names: list[str]) -> None:
        if "/tree/" in self.path:
            rows = [{"type": "file", "path": name, "size": 1, "oid": "c" * 40} for name in names]
            self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
        else:
            told = {"id": "me/one", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self.answer(200, json.dumps(told).encode(), Content_Type="application/json")

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What `resolve` made of each name, asked in a process of its own: the hub's address is read at import."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_HOME": str(tmp_path_factory.mktemp("hub")), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1",
    }  # fmt: skip

    def ask(*names: str) -> dict[str, list[str]]:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *names], env=environment, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    kinds = ("gated", "gone", "private", "broken", "several", "one")
    try:
        told = ask(
            *(f"me/{kind}" for kind in kinds), *(f"me/{kind}/{FILE}" for kind in kinds), "me/one/other.safetensors"
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    silent = ask("me/one", "me/new", f"me/new/{FILE}")
    return told | {f"silent {name}": value for name, value in silent.items()}


@pytest.mark.parametrize("end", ["", f"/{FILE}"])
@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("gated", "is gated: accept its licence on its page, then log in"),
        ("gone", "is no repository of the hub, or a private one; check the name, or log in"),
        ("private", "is no repository of the hub, or a private one; check the name, or log in"),
        ("broken", "the hub does not answer"),
    ],
)
def test_refusals_say_what_to_do(answers: dict[str, list[str]], kind: str, advice: str, end: str):
    what, text = answers[f"me/{kind}{end}"]
    assert what == "ModelError"
    assert advice in text
    assert "\n" not in text


def test_a_file_comes_from_the_hub_once(answers: dict[str, list[str]]):
    assert answers["me/one"][0] == "path"
    assert answers["me/one"] == answers[f"me/one/{FILE}"] == answers["silent me/one"]
    assert Path(answers["me/one"][1]).name == FILE


def test_of_several_checkpoints_one_has_to_be_named(answers: dict[str, list[str]]):
    assert "holds several checkpoints; name one of them: me/several/svdq-fp4" in answers["me/several"][1]
    assert "has no file 'other.safetensors'" in answers["me/one/other.safetensors"][1]


@pytest.mark.parametrize("name", ["me/new", f"me/new/{FILE}"])
def test_a_silent_hub_is_named(answers: dict[str, list[str]], name: str):
    what, text = answers[f"silent {name}"]
    assert what == "ModelError"
    assert text.startswith(f"{name}: not on this machine and the hub does not answer")
