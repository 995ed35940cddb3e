"""Small C programs of this package, compiled on the machine that runs them and kept for the next start.

A library's name holds a digest of all that it was made from: source, flags, compiler, processor family. It appears in
one move, so that processes that compile at once never see half of one. Nobody else may write where it lies, or above,
since what lies there is run; and since loading a damaged one kills the process, it ends with a digest of itself.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tinsmith.errors import UnsupportedError

COMPILER = "cc"
CACHE = "XDG_CACHE_HOME"
NEEDED = "cannot open shared object file"  # of the dynamic loader, after the name of what it looked for
FLAGS = ("-std=gnu99", "-O3", "-shared", "-fPIC")
PATIENCE_S = 60.0
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def load(source: Path, flags: Sequence[str], folder: Path | None) -> ctypes.CDLL:
    """The library, from `folder` if it was compiled before. Calls into it don't hold the interpreter's lock.

    Raises:
        UnsupportedError: there is no compiler, or it can't compile this, or the folder isn't one to keep it in.
    """
    if folder is None:
        raise UnsupportedError(f"there is no folder to keep it in: set HOME or {CACHE}")
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
        path = _made_private(folder) / f"{source.stem}-{digest}.so"
        if not _is_whole(path):
            _compile(command, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        if NEEDED in str(error):  # its own file is there
            raise UnsupportedError(f"{error}: install that library") from error
        raise UnsupportedError(
            f"{error}: set {CACHE} to a folder that programs can be written to and run from"
        ) from error


def _made_private(folder: Path) -> Path:
    """Where it lies, with no link on the way, which others could turn elsewhere later."""
    for missing in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    folder = folder.resolve()
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & OTHERS_MAY_WRITE:
        raise UnsupportedError(f"others can write to {folder}: make it yours alone (chmod 700), or set {CACHE}")
    for place in folder.parents:
        if _lets_others_move(place.stat()):
            raise UnsupportedError(
                f"others can write to {place}, and so put another folder in the place of {folder}: take that from them "
                f"(chmod go-w), or set {CACHE}"
            )
    return folder


def _lets_others_move(found: os.stat_result) -> bool:
    """Whether others, beside root and this process's own group, may move what isn't theirs in this directory."""
    if found.st_uid not in (0, os.geteuid()):
        return True
    may_group = found.st_mode & stat.S_IWGRP and found.st_gid not in (0, os.getegid())
    return bool(may_group or found.st_mode & stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX


def _is_whole(path: Path) -> bool:
    """Whether it is a file of this user alone that is as it was made."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & OTHERS_MAY_WRITE:
        return False
    data = path.read_bytes()
    return _sealed(data[: -hashlib.sha256().digest_size]) == data


def _sealed(library: bytes) -> bytes:
    """With its digest behind it, which the loader doesn't look at."""
    return library + hashlib.sha256(library).digest()


def _compile(command: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch, path.name)
        _printed([*command, "-o", str(made)])
        made.write_bytes(_sealed(made.read_bytes()))
        made.chmod(0o600)
        made.replace(path)


def _printed(command: Sequence[str]) -> str:
    """What the compiler prints.

    Raises:
        UnsupportedError: it fails, with its last word, or takes longer than `PATIENCE_S`.
    """
    try:
        status, out, err = _ran(command)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnsupportedError(f"{command[0]} doesn't work ({error}): install a C compiler that does") from error
    if status:
        said = next((line for line in err.splitlines() if "error" in line), f"exit status {status}")
        raise UnsupportedError(f"{command[0]} doesn't compile it ({said}): install a complete C compiler, such as gcc")
    return out


def _ran(command: Sequence[str]) -> tuple[int, str, str]:
    """Its status and what it printed to either stream. One that is late ends with all that it has started.

    Raises:
        OSError, subprocess.TimeoutExpired
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=PATIENCE_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, out, err
