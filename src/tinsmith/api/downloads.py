"""Checkpoints as files: signed links to them, and the route that follows the links.

The archive of any checkpoint is a tar of a PEFT adapter; external checkpoints have a link for each file as well.
Answers are streamed, a piece of the stored file at a time (see files/adapter_files.py), and can be resumed: `Range`,
`If-Range`, `ETag`. A download that has begun goes on to its end though the checkpoint be deleted meanwhile, but ends
when the key is revoked that its link was made with.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any, BinaryIO, Literal

from litestar import Request, Response, get, route
from litestar.enums import HttpMethod
from litestar.params import FromPath, FromQuery
from litestar.response import Stream
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.errors import Problem
from tinsmith.api.links import PATH, follow_link, make_link, parse_query, version_of
from tinsmith.api.outgo import closing_with
from tinsmith.api.paging import iso_time
from tinsmith.api.places import CALLER
from tinsmith.api.services import Services, ServicesDep
from tinsmith.api.sharing import CHECKPOINT, hand_out
from tinsmith.errors import BusyError, NotFoundError, UserError
from tinsmith.files.adapter_files import Files, adapter_files, as_tar, external_files
from tinsmith.files.checkpoint_file import read_state_header
from tinsmith.files.virtual_file import VirtualFile
from tinsmith.importing.state import NAME as STATE_FILE
from tinsmith.store.rows import CheckpointRow
from tinsmith.types import CheckpointKind, RunId
from tinsmith.wire.media import JSON
from tinsmith.wire.paths import parse_kind

ARCHIVE = "archive.tar"
STATE_ARCHIVE = "state.tar"
RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
TYPES = {".json": JSON, ".tar": "application/x-tar"}


class ArchiveUrl(Struct):
    """expires: ISO 8601."""

    url: str
    expires: str


class ExternalWeightsUrls(Struct):
    """urls: by file name. expires: ISO 8601."""

    urls: dict[str, str]
    expires: str


@get(f"{CHECKPOINT}/archive")
async def archive(
    request: Call,
    services: ServicesDep,
    run_id: FromPath[str],
    kind: FromPath[str],
    name: FromPath[str],
    content: FromQuery[Literal["adapter", "state"]] = "adapter",
) -> Response[ArchiveUrl | None]:
    """A signed link to the checkpoint as a tar: as JSON to those who accept it by name, else as a redirect.

    `content`: `state` for the whole state of a run with its moments, which another tinsmith imports.
    """
    if content == "state" and parse_kind(kind) is CheckpointKind.EXTERNAL:
        raise UserError("an external checkpoint holds an adapter's files alone: save the run's state with save_state")
    expires = _expiry(services)
    row = await hand_out(services, request.user, (run_id, kind, name), "checkpoint_archive_link_create", expires)
    url = make_link(services, request, row, ARCHIVE if content == "adapter" else STATE_ARCHIVE, expires)
    if JSON in request.headers.get("accept", ""):
        return Response(ArchiveUrl(url=url, expires=iso_time(expires)))
    headers = {"location": url, "expires": format_datetime(datetime.fromtimestamp(expires, UTC), usegmt=True)}
    return Response(None, status_code=302, headers=headers)


@get(f"{CHECKPOINT}/external_weights_urls")
async def external_weights_urls(
    request: Call, services: ServicesDep, run_id: FromPath[str], kind: FromPath[str], name: FromPath[str]
) -> ExternalWeightsUrls:
    """A signed link for each file of an external checkpoint."""
    row = await services.work(_own, services, request, run_id, kind, name)
    if row.kind is not CheckpointKind.EXTERNAL:
        raise UserError(
            f"{row.path} is no external checkpoint: save one with save_weights_external, or ask for /archive"
        )
    expires = _expiry(services)
    await hand_out(services, request.user, (run_id, kind, name), "checkpoint_external_links_create", expires)
    names = await services.work(_file_names, services, row)
    urls = {file: make_link(services, request, row, file, expires) for file in names}
    return ExternalWeightsUrls(urls=urls, expires=iso_time(expires))


@route(
    f"{PATH}/{{run_id:str}}/{{kind:str}}/{{name:str}}/{{file:str}}",
    http_method=[HttpMethod.GET, HttpMethod.HEAD],
    status_code=200,
)
async def download(
    request: Request[Any, Any, Any],
    services: ServicesDep,
    run_id: FromPath[str],
    kind: FromPath[str],
    name: FromPath[str],
    file: FromPath[str],
) -> Response[Any]:
    """A file by its signed link, whole or from a place on. No key is needed."""
    query = parse_query(dict(request.query_params))
    services.underway.begin(query.key)
    row = await services.work(follow_link, services, run_id, kind, name, file, query)
    services.underway.begin(query.key, row.tenant_id)
    CALLER.set(row.tenant_id)
    etag = f'"{version_of(row)}-{file}"'
    place = await services.downloads_out.try_take(row.tenant_id, 0.0)
    if place is None:
        raise BusyError(
            "as many files are being downloaded as may be at one time, of this tenant or of all: ask again when others "
            "have been read to their end"
        )
    closing = closing_with(request.scope)
    closing.callback(services.downloads_out.give_back, place)
    content, source = await services.work(_open, services, row, file)
    closing.callback(source.close)
    wanted = _range(request, etag, content.size)
    if wanted is None:
        problem = Problem(
            f"the file has {content.size} bytes: ask for a range that begins within", "invalid_request", "user"
        )
        return Response(problem, status_code=416, headers={"content-range": f"bytes */{content.size}"})
    start, stop, is_part = wanted
    headers = {
        "accept-ranges": "bytes",
        "cache-control": "private, no-store",
        "content-disposition": f'attachment; filename="{name}-{file}"'
        if file in (ARCHIVE, STATE_ARCHIVE)
        else "attachment",
        "content-length": str(stop - start),
        "etag": etag,
    }
    if is_part:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{content.size}"
    return Stream(
        _stream(services, content, source, start, start if request.method == "HEAD" else stop),
        status_code=206 if is_part else 200,
        headers=headers,
        media_type=TYPES.get(file[file.rfind(".") :], "application/octet-stream"),
    )


async def _stream(
    services: Services, content: VirtualFile, source: BinaryIO, start: int, stop: int
) -> AsyncIterator[bytes]:
    parts = content.read(source, start, stop)
    while part := await services.work(next, parts, b""):
        yield part


def _own(services: Services, request: Call, run_id: str, kind: str, name: str) -> CheckpointRow:
    return services.store.checkpoints.get(request.user.tenant_id, RunId(run_id), parse_kind(kind), name)


def _open(services: Services, row: CheckpointRow, file: str) -> tuple[VirtualFile, BinaryIO]:
    """The file's pieces and the open stored file that they are of.

    Raises:
        NotFoundError: the checkpoint has no such file.
    """
    source = services.blobs.open(row.blob)
    try:
        if file == ARCHIVE and row.kind is CheckpointKind.EXTERNAL:
            return VirtualFile.whole(row.size_bytes), source
        if file == STATE_ARCHIVE and row.kind is not CheckpointKind.EXTERNAL:
            return as_tar({STATE_FILE: VirtualFile.whole(row.size_bytes)}, row.created_at), source
        files = _files(services, row, source)
        if file == ARCHIVE:
            return as_tar(files, row.created_at), source
        if file not in files:
            raise NotFoundError(f"{row.path} has no file {file[:200]!r}; it has: {', '.join(files)}")
        return files[file], source
    except BaseException:
        source.close()
        raise


def _files(services: Services, row: CheckpointRow, source: BinaryIO) -> Files:
    if row.kind is CheckpointKind.EXTERNAL:
        return external_files(source)
    return adapter_files(read_state_header(source), services.base(row.spec.base_model).info)


def _file_names(services: Services, row: CheckpointRow) -> list[str]:
    with services.blobs.open(row.blob) as source:
        return list(_files(services, row, source))


def _range(request: Request[Any, Any, Any], etag: str, size: int) -> tuple[int, int, bool] | None:
    """(first byte, byte after the last, whether it is a part) of what is asked for; None: it begins past the end.

    Several ranges at once, other units, and a range of another version are answered with the whole file.
    """
    found = RANGE.fullmatch(request.headers.get("range", "").strip())
    if found is None or found[0] == "bytes=-" or request.headers.get("if-range", etag) != etag:
        return 0, size, False
    first, last = found[1], found[2]
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < start:
            return 0, size, False
    return (start, stop, True) if start < size else None


def _expiry(services: Services) -> int:
    """Unix seconds at which a link that is made now ends."""
    return int(time.time() + services.settings.download_ttl_s)
