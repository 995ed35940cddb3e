"""The command line's own client: what an answer becomes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tinsmith.cli.client import Client
from tinsmith.errors import (
    AuthError,
    CapacityError,
    ForbiddenError,
    GoneError,
    NotFoundError,
    TinsmithError,
    UserError,
)


class Refusing(BaseHTTPRequestHandler):
    """Answers a path of digits with that status."""

    def do_GET(self) -> None:
        body = json.dumps({"detail": "as the server says", "code": "x", "category": "y"}).encode()
        self.send_response(int(self.path.rpartition("/")[2]))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, UserError), (401, AuthError), (403, ForbiddenError), (404, NotFoundError), (410, GoneError),
        (429, CapacityError), (503, CapacityError),
    ],
)  # fmt: skip
def test_a_refusal_keeps_its_kind_and_its_words(url: str, status: int, kind: type[TinsmithError]) -> None:
    with pytest.raises(TinsmithError, match="as the server says") as caught:
        Client(url).call("GET", f"/{status}")
    assert type(caught.value) is kind
