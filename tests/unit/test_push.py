"""Exports on a hub: the real library against a small server that speaks the hub's part of it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from typer.testing import CliRunner

from tests.unit.test_export import LAYER, halves, write
from tinsmith.bases import hub
from tinsmith.cli import main as cli
from tinsmith.errors import ConfigError

SECRET = "hf_secretsecretsecret"


class Hub:
    """`status`: of answers to commits. What was made and committed."""

    def __init__(self) -> None:
        self.status = 200
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                hub.tokens.add(self.headers["Authorization"])
                status, answer = hub.answer(self.path, body)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps({"id": "org/mine", "sha": "0" * 40, "siblings": []}).encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            return 200, {"url": f"{self.url}/org/mine", "name": "org/mine"}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in path:
            if self.status != 200:
                return self.status, {"error": "you may not"}
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            oid = hashlib.sha1(body).hexdigest()
            return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/org/mine/commit/{oid}"}
        return 200, {}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    thread = threading.Thread(target=found.server.serve_forever)
    thread.start()
    monkeypatch.setattr(hub, "HfApi", partial(HfApi, endpoint=found.url, token=SECRET))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield found
    found.server.shutdown()
    thread.join()
    found.server.server_close()


def export(tmp_path: Path, *more: str) -> Any:
    adapter = write(tmp_path / "adapter", halves(LAYER))
    args = ["export", str(adapter), "--out", str(tmp_path / "out"), *more]
    return CliRunner().invoke(cli.app, args, catch_exceptions=False)


@pytest.mark.parametrize("more", [(), ("--public",)])
def test_what_is_written_is_pushed(served: Hub, tmp_path: Path, more: tuple[str, ...]) -> None:
    done = export(tmp_path, "--push-to-hub", "org/mine", *more)
    assert "pushed to" in done.stdout
    assert ("private" in str(served.made[0])) is not bool(more), served.made
    assert served.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert served.tokens == {f"Bearer {SECRET}"}
    assert SECRET not in done.output


def test_what_a_hub_refuses_stays_on_the_disk_and_tells_no_token(
    served: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served.status = 403
    with pytest.raises(ConfigError, match="did not take it") as refused:
        export(tmp_path, "--push-to-hub", "org/mine")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert SECRET not in refused.value.message + caplog.text


def test_without_a_network_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9", token=SECRET))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigError, match="check the connection") as refused:
        export(tmp_path, "--push-to-hub", "org/mine")
    assert SECRET not in refused.value.message


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--push-to-hub", "a/b/c"), "did not take it"),
        (("--public",), "--push-to-hub"),
        (("--push-to-hub", "org/mine", "--format", "state"), "tinsmith import"),
    ],
)
def test_wrong_calls(more: tuple[str, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        export(tmp_path, *more)
