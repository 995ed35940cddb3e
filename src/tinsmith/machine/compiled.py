"""Small C programs of this package, compiled on the machine that runs them and kept for the next start.

A library's name holds a digest of all that it was made from: source, flags, compiler, processor family. It appears in
one move, so that processes that compile at once never see half of one. Nobody else may write where it lies, since what
lies there is run.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tinsmith.errors import UnsupportedError

COMPILER = "cc"
FLAGS = ("-std=gnu99", "-O3", "-shared", "-fPIC")
PATIENCE_S = 60.0
OTHERS_MAY_WRITE = 0o022


def load(source: Path, flags: Sequence[str], folder: Path | None) -> ctypes.CDLL:
    """The library, from `folder` if it was compiled before. Calls into it don't hold the interpreter's lock.

    Raises:
        UnsupportedError: there is no compiler, or it can't compile this, or the folder isn't one to keep it in.
    """
    if folder is None:
        raise UnsupportedError("there is no folder to keep it in: set HOME or XDG_CACHE_HOME")
    compiler = shutil.which(COMPILER)
    if compiler is None:
        raise UnsupportedError(f"there is no C compiler ({COMPILER}): install one, such as the package gcc")
    command = [compiler, *FLAGS, *flags, str(source)]
    made_from = (
        source.read_text(encoding="utf-8"),
        command[:-1],
        _printed([compiler, "--version"]),
        platform.machine(),
    )
    digest = hashlib.sha256(repr(made_from).encode()).hexdigest()[:32]
    try:
        _make_private(folder)
        path = folder / f"{source.stem}-{digest}.so"
        if not path.exists():
            _compile(command, path)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # what a crash of the machine left of it
            _compile(command, path)
            return ctypes.CDLL(str(path))
    except OSError as error:
        raise UnsupportedError(
            f"{error}: set XDG_CACHE_HOME to a folder that programs can be written to and run from"
        ) from error


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & OTHERS_MAY_WRITE:
        raise UnsupportedError(f"others can write to {folder}: make it yours alone (chmod 700), or set XDG_CACHE_HOME")


def _compile(command: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch, path.name)
        _printed([*command, "-o", str(made)])
        made.replace(path)


def _printed(command: Sequence[str]) -> str:
    """What the compiler prints.

    Raises:
        UnsupportedError: it fails, with its last word, or takes longer than `PATIENCE_S`.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnsupportedError(f"{command[0]} doesn't work ({error}): install a C compiler that does") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")
        raise UnsupportedError(f"{command[0]} doesn't compile it ({said}): install a complete C compiler, such as gcc")
    return done.stdout
