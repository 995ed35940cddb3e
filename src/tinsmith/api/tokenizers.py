"""Tokenizer files of the served bases, at the paths where hub clients look (HF_ENDPOINT = <url>/hf). Never weights.

Open without a key, as those clients send none. A file is served only if it stands under its plain name in the base's
table of files, so no path of the request ever reaches the file system. Of names that begin alike the longest counts.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from litestar import Response, route
from litestar.enums import HttpMethod
from litestar.params import FromPath
from msgspec import Struct

from tinsmith.api.services import ServedBase, Services, ServicesDep
from tinsmith.bases.catalog import hub_names
from tinsmith.errors import NotFoundError, TinsmithError
from tinsmith.wire.media import JSON, encode_json

TYPES = {".json": JSON}


class MissingError(NotFoundError):
    """`hub_code`: what hub clients tell an absent file from an absent model by."""

    def __init__(self, message: str, hub_code: str) -> None:
        super().__init__(message)
        self.hub_code = hub_code


class HubProblem(Struct, omit_defaults=True):
    """error: the same as the detail, where hub clients look for it."""

    detail: str
    code: str
    category: str
    error: str | None = None


@route("/hf/{path:path}", http_method=[HttpMethod.GET, HttpMethod.HEAD], status_code=200)
async def hub_file(services: ServicesDep, path: FromPath[str]) -> Response[bytes]:
    """A tokenizer file (`<model>/resolve/<revision>/<file>`) or a model's list of files (`api/models/<model>`)."""
    try:
        return await services.work(_answer, services, path.strip("/"))
    except MissingError as error:
        problem = HubProblem(error.message, error.code, error.category, error=error.message)
        return Response(
            encode_json(problem), status_code=404, media_type=JSON, headers={"x-error-code": error.hub_code}
        )


def _answer(services: Services, path: str) -> Response[bytes]:
    if not services.settings.serve_tokenizers:
        raise MissingError(
            "this server does not hand out tokenizers: load yours from a local directory", "RepoNotFound"
        )
    is_api = path.startswith("api/models/")
    path = path.removeprefix("api/models/")
    known = hub_names(services.bases)
    for name in sorted(known, key=len, reverse=True):
        if path == name or path.startswith(f"{name}/"):
            base = services.bases[known[name]]
            rest = path[len(name) :].strip("/").split("/")
            return _describe(name, base, rest) if is_api else _file(name, base, rest)
    raise MissingError(f"no such model here; served: {', '.join(services.bases)}", "RepoNotFound")


def _file(name: str, base: ServedBase, rest: list[str]) -> Response[bytes]:
    if len(rest) != 3 or rest[0] != "resolve" or rest[2] not in base.tokenizer_files:
        raise MissingError(f"{name} has no such file here; only tokenizer files are served", "EntryNotFound")
    data = _read(base.tokenizer_files[rest[2]])
    media = TYPES.get(Path(rest[2]).suffix, "application/octet-stream")
    headers = {"etag": f'"{_digest(data)}"', "x-repo-commit": _commit(base), "accept-ranges": "none"}
    return Response(data, media_type=media, headers=headers)


def _describe(name: str, base: ServedBase, rest: list[str]) -> Response[bytes]:
    if rest[0] == "tree":
        if len(rest) > 2:
            raise MissingError(f"{name} has no such folder", "EntryNotFound")
        return Response(
            encode_json([_entry(file, path) for file, path in base.tokenizer_files.items()]), media_type=JSON
        )
    if rest[0] not in ("", "revision"):
        raise MissingError(f"{name} has nothing there", "EntryNotFound")
    siblings = [{"rfilename": file} for file in base.tokenizer_files]
    info: dict[str, Any] = {
        "id": name, "modelId": name, "sha": _commit(base), "private": False, "gated": False, "disabled": False,
        "tags": [], "siblings": siblings,
    }  # fmt: skip
    return Response(encode_json(info), media_type=JSON)


def _entry(file: str, path: Path) -> dict[str, Any]:
    data = _read(path)
    return {"type": "file", "path": file, "size": len(data), "oid": _digest(data)}


def _commit(base: ServedBase) -> str:
    """40 hex digits that change with any of the files, as a commit would."""
    digests = [_digest(_read(path)) for path in base.tokenizer_files.values()]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:40]


@lru_cache(maxsize=256)
def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TinsmithError(f"a tokenizer file can't be read: {error.strerror}") from error
