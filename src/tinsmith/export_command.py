"""`tinsmith export`: a checkpoint as others use it. Parses, fetches and prints; the work is done in `export`."""

from __future__ import annotations

import importlib
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tinsmith.byte_bar import byte_bar
from tinsmith.client import Client, connect
from tinsmith.config import Settings, client_address
from tinsmith.datadir import DataDir
from tinsmith.errors import ConfigError
from tinsmith.export.adapter import Adapter, read_adapter, unpack, write_peft
from tinsmith.wire.paths import SCHEME, parse_path


class Format(StrEnum):
    PEFT = "peft"
    HF = "hf"


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def export_command(
    source: Annotated[
        str,
        typer.Argument(help="A checkpoint (tinker://RUN/weights/NAME), or a directory or tar that was downloaded."),
    ],
    out: Annotated[Path, typer.Option("--out", help="A new directory.")],
    format_: Annotated[
        Format, typer.Option("--format", help="peft: an adapter; hf: base and adapter merged into a whole model.")
    ] = Format.PEFT,
    base: Annotated[
        Path | None, typer.Option("--base", help="The base model's directory, as it was served; for --format hf.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Of the merged weights; as the base has them, if not given.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="The running server's data directory. TINSMITH_DATA_DIR")
    ] = None,
) -> None:
    """Write a checkpoint as peft, vLLM and SGLang load it, or merged into a model that needs no adapter.

    A checkpoint is fetched from the server in TINKER_BASE_URL with TINKER_API_KEY, else from the one on this machine.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: name a new directory")
    if format_ is Format.HF and base is None:
        raise ConfigError("--format hf merges into a base model: name its directory with --base")
    if format_ is Format.PEFT and (base is not None or dtype is not None):
        raise ConfigError("--base and --dtype belong to --format hf; an adapter is float32, and has no base in it")
    with tempfile.TemporaryDirectory(prefix="tinsmith-export-") as scratch:
        path = _fetch(source, Path(scratch), data_dir)
        weights = importlib.import_module("tinsmith.export.full").find_full(path, Path(scratch)) if base else None
        if weights is not None:
            write = importlib.import_module("tinsmith.export.full").write_full
            number = write(base, weights, out, dtype=None if dtype is None else dtype.value)
            typer.echo(f"{out}: a model of {number} weights, all of them trained")
            return
        adapter = _adapter_in(path, Path(scratch))
        if base is None:
            out.mkdir(parents=True)
            write_peft(adapter, out)
            typer.echo(f"{out}: an adapter of {len(adapter.names)} layers")
            return
        with byte_bar("merging") as progress:
            merge = importlib.import_module("tinsmith.export.merge").merge  # torch is loaded here
            changed = merge(base, adapter, out, dtype=None if dtype is None else dtype.value, progress=progress)
    typer.echo(f"{out}: a model with {len(changed)} changed weights")


def _fetch(source: str, scratch: Path, data_dir: Path | None) -> Path:
    """The checkpoint as a directory or a tar."""
    path = Path(source)
    if source.startswith(SCHEME):
        wanted = parse_path(source)
        path = scratch / "checkpoint.tar"
        with byte_bar("fetching") as progress, path.open("wb") as target:
            route = f"/training_runs/{wanted.run_id}/checkpoints/{wanted.kind.value}/{wanted.name}/archive"
            _client(data_dir).download(route, target, progress)
    if not path.is_dir() and not path.is_file():
        raise ConfigError(f"{source} is neither a checkpoint (tinker://...) nor a directory nor a file")
    return path


def _adapter_in(path: Path, scratch: Path) -> Adapter:
    if path.is_dir():
        return read_adapter(path)
    unpack(path, scratch)
    return read_adapter(scratch)


def _client(data_dir: Path | None) -> Client:
    address = client_address()
    if address is not None and address[1]:
        return Client(*address)
    return connect(DataDir(Settings.load(data_dir=data_dir).data_dir))
