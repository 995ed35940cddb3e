"""A thin client of the HTTP API, for the command line: the standard library is all it needs."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, BinaryIO

from tinsmith.config import LOOPBACK, Settings, client_address
from tinsmith.errors import (
    AuthError,
    CapacityError,
    ConfigError,
    ForbiddenError,
    GoneError,
    NotFoundError,
    TinsmithError,
    UserError,
)
from tinsmith.files.datadir import DataDir
from tinsmith.tls import trusting

TIMEOUT_S = 30.0
UPLOAD_TIMEOUT_S = 900.0  # for an answer that comes once all was looked at
READY_TIMEOUT_S = 1.5
PIECE_BYTES = 2**20
BY_STATUS: dict[int, type[TinsmithError]] = {
    401: AuthError,
    403: ForbiddenError,
    404: NotFoundError,
    410: GoneError,
    429: CapacityError,
    503: CapacityError,
}


class Client:
    """certificate: the file of the server's own one, which is then the only one that is trusted."""

    def __init__(self, url: str, key: str = "", certificate: str = "") -> None:
        self.url = url.rstrip("/")
        self._key = key
        is_local = urllib.parse.urlsplit(url).hostname in LOOPBACK
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})] if is_local else []
        if certificate:
            handlers.append(urllib.request.HTTPSHandler(context=trusting(Path(certificate))))
        self._opener = urllib.request.build_opener(*handlers)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON, None if it has no body. `path` begins after /api/v1.

        Raises:
            TinsmithError: what the server answered, or that it can't be reached.
        """
        data = None if body is None else json.dumps(body).encode()
        content = self._send(method, f"/api/v1{path}", data)
        try:
            return json.loads(content) if content else None
        except ValueError as error:
            raise ConfigError(f"{self.url} did not answer with JSON; is it a tinsmith server? ({error})") from None

    def text(self, path: str) -> str:
        """What GET of a path answers. Raises: as `call`."""
        return self._send("GET", path, None).decode(errors="replace")

    def download(self, path: str, target: BinaryIO, progress: Callable[[int, int], None]) -> None:
        """Write what GET of a path answers; `path` begins after /api/v1. Raises: as `call`."""
        with self._open("GET", f"/api/v1{path}", None, accept="application/octet-stream") as answer:
            total, done = int(answer.headers.get("Content-Length") or 0), 0
            while piece := answer.read(PIECE_BYTES):
                target.write(piece)
                done += len(piece)
                progress(done, total)
        if done < total:
            raise ConfigError(f"{self.url} ended the download after {done} of {total} bytes; try again")

    def upload(self, path: str, query: Mapping[str, str], body: Iterator[bytes], num_bytes: int) -> Any:
        """The JSON that POST of these bytes answers; `path` begins after /api/v1. Raises: as `call`."""
        path = f"{path}?{urllib.parse.urlencode(query)}"
        headers = {"Content-Length": str(num_bytes), "Content-Type": "application/x-tar"}
        with self._open("POST", f"/api/v1{path}", body, headers=headers, timeout_s=UPLOAD_TIMEOUT_S) as answer:
            return json.load(answer)

    def _send(self, method: str, path: str, data: bytes | None) -> bytes:
        with self._open(method, path, data) as answer:
            content: bytes = answer.read()
            return content

    @contextmanager
    def _open(
        self,
        method: str,
        path: str,
        data: bytes | Iterator[bytes] | None,
        accept: str = "application/json, text/plain",
        headers: Mapping[str, str] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Iterator[HTTPResponse]:
        own = {"X-API-Key": self._key, "Content-Type": "application/json", "Accept": accept, **(headers or {})}
        request = urllib.request.Request(f"{self.url}{path}", data, own, method=method)
        try:
            with self._opener.open(request, timeout=timeout_s) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            with error:
                raise BY_STATUS.get(error.code, UserError)(_detail(error)) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, BrokenPipeError | ConnectionResetError) and not isinstance(data, bytes | None):
                raise ConfigError(
                    f"{self.url} closed the connection before all was sent: it is more than the base could take, or "
                    "the server stopped"
                ) from None
            raise ConfigError(f"no server answers at {self.url} ({reason}); start one with `tinsmith serve`") from None
        except ValueError as error:  # of the URL
            raise ConfigError(f"{self.url!r} is no URL of a server: {error}") from None

    def is_ready(self) -> bool:
        """Whether every base model has been loaded; False too if nobody answers."""
        try:
            with self._opener.open(f"{self.url}/api/v1/healthz", timeout=READY_TIMEOUT_S) as answer:
                return bool(answer.status == 200)
        except (OSError, HTTPException):
            return False


def connect(data_dir: DataDir) -> Client:
    """A client of the server that serves `data_dir` on this machine, else of the one in TINKER_BASE_URL.

    Raises:
        ConfigError: there is neither, or the second comes without a key.
    """
    info, key = data_dir.info(), data_dir.admin_key()
    if info is not None and key is not None:
        return Client(info.url, key, info.certificate)
    address = client_address()
    if address is None:
        raise ConfigError(
            f"no server runs on {data_dir.path}: start `tinsmith serve`, name its directory with --data-dir, "
            f"or set TINKER_BASE_URL and TINKER_API_KEY"
        )
    if not address[1]:
        raise ConfigError("TINKER_BASE_URL is set, but TINKER_API_KEY is not: export an administrator's key")
    return Client(*address)


def server_of(data_dir: Path | None) -> Client:
    """The server in TINKER_BASE_URL if a key for it is set, else the one on this machine.

    Raises:
        ConfigError: as `connect`.
    """
    address = client_address()
    if address is not None and address[1]:
        return Client(*address)
    return connect(DataDir(Settings.load(data_dir=data_dir).data_dir))


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        found = json.loads(error.read())
        detail = found.get("detail") if isinstance(found, dict) else None
    except (OSError, ValueError):
        detail = None
    return str(detail or f"the server answered {error.code} {error.reason}")
