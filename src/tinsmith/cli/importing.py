"""`tinsmith import`: an adapter or a run's state as checkpoints of a server, which looks at what it is sent."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from tinsmith.cli.byte_bar import byte_bar
from tinsmith.cli.client import server_of
from tinsmith.errors import ConfigError
from tinsmith.files.adapter_files import CONFIG, WEIGHTS
from tinsmith.importing.state import NAME as STATE

PIECE_BYTES = 2**20


def import_command(
    source: Annotated[
        Path,
        typer.Argument(
            help=f"A directory with {CONFIG} and {WEIGHTS}, an uncompressed tar of them, or a run's state "
            "(tinsmith export --format state)."
        ),
    ],
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="The served base that it is for; needed where several are served."),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Of the checkpoints.")] = "imported",
    ttl: Annotated[
        int | None, typer.Option("--ttl", help="Seconds that they are kept; for good, if not given.")
    ] = None,
    project: Annotated[str | None, typer.Option("--project", help="The project that they belong to.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="The running server's data directory. TINSMITH_DATA_DIR")
    ] = None,
) -> None:
    """Make checkpoints of a PEFT adapter, or of a run's state from another server: to go on training, and to sample.

    They come to the server in TINKER_BASE_URL, for the tenant of TINKER_API_KEY, else to the one on this machine.
    """
    asked = {"base_model": base_model, "name": name, "ttl_seconds": ttl, "project_id": project}
    query = {key: str(value) for key, value in asked.items() if value is not None}
    with ExitStack() as opened:
        body, num_bytes = _body(source, opened)
        with byte_bar("sending") as progress:
            answer = server_of(data_dir).upload("/import_weights", query, _told(body, num_bytes, progress), num_bytes)
    what = "weights, moments and step" if answer["has_optimizer"] else "weights"
    like = f"of rank {answer['lora_rank']}" if answer["lora_rank"] else "of a full run"
    typer.echo(f"{answer['path']}: {what} {like} on {answer['base_model']}, to go on training from")
    typer.echo(f"{answer['sampler_path']}: to sample from")


def _body(source: Path, opened: ExitStack) -> tuple[Iterator[bytes], int]:
    """(what is sent, its size in bytes).

    Raises:
        ConfigError: it is neither a directory with an adapter nor a file.
    """
    if source.is_file():
        file = opened.enter_context(source.open("rb"))
        return iter(partial(file.read, PIECE_BYTES), b""), source.stat().st_size
    names = (STATE,) if (source / STATE).is_file() else (CONFIG, WEIGHTS)
    lacking = [name for name in names if not (source / name).is_file()]
    if lacking:
        raise ConfigError(
            f"{source} lacks {' and '.join(lacking)}: name the directory of a PEFT adapter, or a tar, or a run's state"
        )
    files = {name: opened.enter_context((source / name).open("rb")) for name in names}
    blocks = sum(1 + -(-_size(file) // tarfile.BLOCKSIZE) for file in files.values()) + 2
    return _tar(files), blocks * tarfile.BLOCKSIZE


def _tar(files: Mapping[str, BinaryIO]) -> Iterator[bytes]:
    """An uncompressed tar of the files."""
    for name, file in files.items():
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = _size(file), 0o644
        yield entry.tobuf(tarfile.GNU_FORMAT)
        file.seek(0)
        yield from iter(partial(file.read, PIECE_BYTES), b"")
        yield bytes(-entry.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _size(file: BinaryIO) -> int:
    return file.seek(0, io.SEEK_END)


def _told(body: Iterator[bytes], num_bytes: int, progress: Callable[[int, int], None]) -> Iterator[bytes]:
    done = 0
    for piece in body:
        yield piece
        done += len(piece)
        progress(done, num_bytes)
