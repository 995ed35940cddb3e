"""`tinsmith export`: a checkpoint as others use it. Parses, fetches and prints; the work is done in `export`."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tinsmith.bases.catalog import text_model_type, weight_shapes
from tinsmith.cli.byte_bar import byte_bar
from tinsmith.cli.client import server_of
from tinsmith.errors import ConfigError
from tinsmith.export.adapter import Adapter, read_adapter, unpack
from tinsmith.export.engines import remarks
from tinsmith.export.expert_weights import plain_shapes
from tinsmith.export.peft_files import BaseShapes, write_peft
from tinsmith.wire.paths import SCHEME, TinkerPath, parse_path


class Format(StrEnum):
    PEFT = "peft"
    HF = "hf"
    STATE = "state"


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def export_command(
    source: Annotated[
        str,
        typer.Argument(help="A checkpoint (tinker://RUN/weights/NAME), or a directory or tar that was downloaded."),
    ],
    out: Annotated[Path, typer.Option("--out", help="A new directory; of --format state a new file.")],
    format_: Annotated[
        Format,
        typer.Option(
            "--format",
            help="peft: an adapter; hf: base and adapter merged into a whole model; state: weights, moments and step, "
            "for `tinsmith import` elsewhere.",
        ),
    ] = Format.PEFT,
    base: Annotated[
        Path | None,
        typer.Option("--base", help="The base model's directory, as it was served; for --format hf, and for experts."),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Of the merged weights; as the base has them, if not given.")
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="ORG/NAME", help="Upload what was written to the Hugging Face hub too."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A repository that is made for it is open to all.")] = False,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="The running server's data directory. TINSMITH_DATA_DIR")
    ] = None,
) -> None:
    """Write a checkpoint as an adapter for peft, vLLM and SGLang, or merged into a model that needs none.

    What vLLM and SGLang don't read of an adapter is told when it is written.

    A checkpoint is fetched from the server in TINKER_BASE_URL with TINKER_API_KEY, else from the one on this machine.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: name a new directory")
    if format_ is Format.HF and base is None:
        raise ConfigError("--format hf merges into a base model: name its directory with --base")
    if format_ is not Format.HF and dtype is not None:
        raise ConfigError("--dtype belongs to --format hf; an adapter is float32")
    if public and push_to_hub is None:
        raise ConfigError("--public belongs to --push-to-hub")
    if format_ is Format.STATE and push_to_hub is not None:
        raise ConfigError("a run's state is for `tinsmith import` elsewhere: push --format peft or hf")
    if format_ is Format.STATE:
        _fetch_state(source, out, data_dir)
        return
    with tempfile.TemporaryDirectory(prefix="tinsmith-export-") as scratch:
        path = _fetch(source, Path(scratch), data_dir)
        if format_ is Format.HF and base is not None:
            typer.echo(_write_whole(path, out, base, None if dtype is None else dtype.value, Path(scratch)))
        else:
            adapter = _adapter_in(path, Path(scratch))
            told = _write_peft(adapter, out, base)
            typer.echo("\n".join([f"{out}: an adapter of {len(adapter.names)} layers", *told]))
    if push_to_hub is not None:
        push = importlib.import_module("tinsmith.bases.hub").push
        typer.echo(f"pushed to {push(out, push_to_hub, is_public=public)}")


def _write_whole(path: Path, out: Path, base: Path, dtype: str | None, scratch: Path) -> str:
    """A model that needs no adapter; what to say of it. torch is loaded here."""
    full = importlib.import_module("tinsmith.export.full")
    weights = full.find_full(path, scratch)
    if weights is not None:
        return f"{out}: a model of {full.write_full(base, weights, out, dtype=dtype)} weights, all of them trained"
    adapter = _adapter_in(path, scratch)
    with byte_bar("merging") as progress:
        merge = importlib.import_module("tinsmith.export.merge").merge
        changed = merge(base, adapter, out, dtype=dtype, progress=progress)
    return f"{out}: a model with {len(changed)} changed weights"


def _write_peft(adapter: Adapter, out: Path, base: Path | None) -> list[str]:
    """Returns what serving engines don't read of it."""
    shapes = None if base is None else BaseShapes(plain_shapes(weight_shapes(base)), text_model_type(base))
    out.mkdir(parents=True)
    try:
        write_peft(adapter, out, shapes)
        return [str(remark) for remark in remarks(out, None if shapes is None else shapes.model_type)]
    except BaseException:
        shutil.rmtree(out)
        raise


def _fetch_state(source: str, out: Path, data_dir: Path | None) -> None:
    """The checkpoint's file in a tar. It has its name once it is whole."""
    wanted = parse_path(source)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with byte_bar("fetching") as progress, part.open("xb") as target:
            server_of(data_dir).download(f"{_route(wanted)}?content=state", target, progress)
        part.rename(out)
    finally:
        part.unlink(missing_ok=True)
    typer.echo(f"{out}: the state of {source}; `tinsmith import {out}` takes it to another server")


def _route(wanted: TinkerPath) -> str:
    return f"/training_runs/{wanted.run_id}/checkpoints/{wanted.kind.value}/{wanted.name}/archive"


def _fetch(source: str, scratch: Path, data_dir: Path | None) -> Path:
    """The checkpoint as a directory or a tar."""
    path = Path(source)
    if source.startswith(SCHEME):
        wanted = parse_path(source)
        path = scratch / "checkpoint.tar"
        with byte_bar("fetching") as progress, path.open("wb") as target:
            server_of(data_dir).download(_route(wanted), target, progress)
    if not path.is_dir() and not path.is_file():
        raise ConfigError(f"{source} is neither a checkpoint (tinker://...) nor a directory nor a file")
    return path


def _adapter_in(path: Path, scratch: Path) -> Adapter:
    if path.is_dir():
        return read_adapter(path)
    unpack(path, scratch)
    return read_adapter(scratch)
