"""Files and directories for their owner's eyes alone, whatever the umask of the process is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700


def opener(path: str, flags: int) -> int:
    """For `open`: a file that is made is its owner's alone."""
    return os.open(path, flags, FILE_MODE)


def make_empty(path: Path) -> None:
    """Make the file if it is missing. A place that can't be written is left for the next who opens it to name."""
    with suppress(OSError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE))


def close_to_others(paths: Iterable[Path]) -> list[Path]:
    """Take from others what they may do with files and directories that are there; those that are another user's, and
    stay open."""
    still_open = []
    for path in paths:
        with suppress(FileNotFoundError):
            mode = path.stat().st_mode & 0o777
            if mode & 0o077:
                try:
                    path.chmod(mode & 0o700)
                except PermissionError:
                    still_open.append(path)
    return still_open
