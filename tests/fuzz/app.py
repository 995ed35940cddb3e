"""The real app in this process, for requests of every making: whatever comes in, no answer is a 5xx and none is late.

The app is that of a server: routes, guards, store and files on disk; only the worker is missing, so that requests stay
queued.
"""

from __future__ import annotations

import asyncio
import gc
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from tests.contract.conftest import House
from tests.fuzz.capture import IDS, read_captured
from tests.fuzz.line import Line
from tests.fuzz.mutate import draw
from tinsmith.api.app import build_app, with_edge
from tinsmith.api.main import make_server
from tinsmith.config import Settings

WITHIN_S = 30.0
TURN = 4000  # requests until the server is made anew
HEADER_WORDS = (b"application/json", b"application/x-protobuf", b"zstd", b"text/plain", b"\xff", b"", b"a" * 3000)


class App:
    """A server in a directory of its own; `close` removes it."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="tinsmith-fuzz-"))
        settings = Settings(
            data_dir=self._root / "data", poll_hold_s=0.01, scan_interval_s=0.05, sqlite_synchronous="NORMAL",
            answer_hold_s=0.02, jwt_auth=True, log_level="error", unknown_keys_per_minute=10**6,
        )  # fmt: skip
        self._house = House(self._root, settings)
        self._loop = asyncio.new_event_loop()
        app = build_app(self._house.services)
        self._app = with_edge(app)
        self._seeds = read_captured()
        self._stopping, is_up = asyncio.Event(), asyncio.Event()
        self._up = self._loop.create_task(self._stand(app, is_up))
        self._loop.run_until_complete(is_up.wait())
        session = self._call("POST", "/api/v1/create_session", b'{"tags": [], "sdk_version": "f"}')[1]
        self._session = session.split(b'"session_id":"')[1].split(b'"')[0].decode()
        body = f'{{"session_id": "{self._session}", "model_seq_id": 0, "base_model": "tinsmith/tiny"}}'
        self._call("POST", "/api/v1/create_model", body.encode())
        self._line = Line(make_server(self._house.services), self._loop, self._house.key, self._session)

    def send_bytes(self, number: int) -> str:
        """The same over a connection: what h11, the connection and the express lane make of broken HTTP."""
        return self._line.send(number)

    def close(self) -> None:
        self._stopping.set()
        self._loop.run_until_complete(self._up)
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._house.close()
        self._loop.close()
        shutil.rmtree(self._root, ignore_errors=True)

    async def _stand(self, app: Any, is_up: asyncio.Event) -> None:
        async with app.lifespan():
            is_up.set()
            await self._stopping.wait()

    def send(self, number: int) -> str:
        """Send request `number`; what came of it, if that is a finding."""
        rng = random.Random(f"api:{number}")
        seed = rng.choice(self._seeds)
        path = IDS.sub(lambda found: self._id(rng, found[0]), seed.path)
        body = seed.content.replace(b"s1:train:0", f"{self._session}:train:0".encode())
        if body and rng.random() < 0.85:
            body = draw("api", number, [body], HEADER_WORDS)
        headers = dict(seed.headers)
        if rng.random() < 0.15:
            headers[rng.choice(("content-type", "content-encoding", "range", "x-request-id", "accept"))] = rng.choice(
                HEADER_WORDS
            ).decode("latin-1")
        if rng.random() < 0.2:
            path = quote(draw("api path", number, [path.encode()], (b"/", b"..", b"\x00", b"%", b"?")), safe="/%:")
        status, answer = self._call(seed.method, path, body, headers, seed.query)
        if status >= 500:
            return f"{status} to {seed.method} {path} {headers} {body!r}: {answer[:500]!r}"
        return ""

    def _id(self, rng: random.Random, found: str) -> str:
        return found if rng.random() < 0.2 else self._session + found[25:] if found.startswith("s") else found

    def _call(
        self, method: str, path: str, body: bytes, headers: dict[str, str] | None = None, query: str = ""
    ) -> tuple[int, bytes]:
        return self._loop.run_until_complete(
            asyncio.wait_for(
                self._ask(method, path, body, headers or {"content-type": "application/json"}, query), WITHIN_S
            )
        )

    async def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str], query: str) -> tuple[int, bytes]:
        sent = {"host": "x", "x-api-key": self._house.key, "content-length": str(len(body)), **headers}
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in sent.items()]
        scope: dict[str, Any] = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
            "scheme": "http", "path": unquote(path), "raw_path": path.encode(), "root_path": "",
            "query_string": query.encode("latin-1"), "headers": pairs,
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "state": {},
        }  # fmt: skip
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        answered: list[dict[str, Any]] = []
        never = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await never.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            answered.append(message)

        await self._app(scope, receive, send)  # type: ignore[arg-type]
        return int(answered[0]["status"]), b"".join(message.get("body", b"") for message in answered[1:])


class Api:
    """Apps one after another, so that none grows for ever."""

    def __init__(self) -> None:
        self._app: App | None = None
        self._num_sent = 0

    def send(self, name: str, number: int) -> str:
        """name: api, for a request that is whole, or http, for bytes on a connection."""
        if self._app is None or self._num_sent >= TURN:
            self.close()
            self._app = App()
        self._num_sent += 1
        return self._app.send(number) if name == "api" else self._app.send_bytes(number)

    def close(self) -> None:
        if self._app is not None:
            self._app.close()
            self._app = None
            self._num_sent = 0
            gc.collect()
