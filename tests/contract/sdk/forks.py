"""Runs the SDK's `tinker` command in processes of their own, without each of them importing the SDK anew.

A fork server imports it once (warm.py); each command is a fork of it, with arguments, environment, directory and
standard streams of its own, and ends with its own status.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

TIMEOUT_S = 120.0


def serve_forks() -> None:
    """Make ready; to be called before the first command."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["warm"])


def run(args: Sequence[str], env: Mapping[str, str], directory: Path, stdin: str) -> tuple[int, str, str]:
    """Run `tinker ARGS...`.

    Returns:
        exit status, what it wrote to standard output, and to standard error.
    """
    with TemporaryDirectory() as scratch:
        streams = [Path(scratch) / name for name in ("in", "out", "err")]
        streams[0].write_text(stdin)
        process = multiprocessing.get_context("forkserver").Process(
            target=_command, args=(list(args), dict(env), directory, streams)
        )
        process.start()
        process.join(TIMEOUT_S)
        status = process.exitcode
        process.kill()
        process.join()
        if status is None:
            raise TimeoutError(f"tinker {args} took more than {TIMEOUT_S} s")
        return status, streams[1].read_text(), streams[2].read_text()


def _command(args: list[str], env: dict[str, str], directory: Path, streams: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(directory)
    files = [stream.open(mode) for stream, mode in zip(streams, ("r", "w", "w"), strict=True)]
    for number, file in enumerate(files):
        os.dup2(file.fileno(), number)
    sys.stdin, sys.stdout, sys.stderr = files
    sys.argv = ["tinker", *args]
    importlib.import_module("tinker.cli.__main__").main()
