"""A small C program beside torch: compiled when it is first asked for, tried, and done without where it can't be had.

Owns what such programs have in common: the processor that they need, their flags, and what the log says once. Their
arithmetic, their tables and the trial are their own modules'; keeping libraries is `machine.compiled`'s business.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog
import torch

from tinsmith.config import cache_dir
from tinsmith.errors import UnsupportedError
from tinsmith.machine import compiled

log = structlog.get_logger("tinsmith.worker")

FLAGS = ("-mavx2", "-mfma", "-fopenmp")  # OpenMP's library is the one that torch has loaded

Kernel = TypeVar("Kernel")


class Program(Generic[Kernel]):
    def __init__(
        self,
        source: Path,
        declare: Callable[[ctypes.CDLL], Kernel],
        agrees: Callable[[Kernel], bool],
        slower: str,
        flags: Sequence[str] = (),
    ) -> None:
        """declare: the library's functions with their arguments. agrees: whether they give torch's numbers. slower:
        what the log says where the program can't be had. flags: beside those of all programs."""
        self.source = source
        self.slower = slower
        self._declare = declare
        self._agrees = agrees
        self._flags = (*FLAGS, *flags)

    @functools.cached_property
    def kernel(self) -> Kernel | None:
        """None if it can't be had, of which the log tells once."""
        try:
            return self.load()
        except UnsupportedError as error:
            log.warning(self.slower, because=error.message)
            return None

    def load(self) -> Kernel:
        """Compiled, loaded and tried.

        Raises:
            UnsupportedError: any of that fails; the message has a cure.
        """
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            raise UnsupportedError("the program needs a processor with AVX2")
        kernel = self._declare(compiled.load(self.source, self._flags, cache_dir()))
        if not self._agrees(kernel):
            raise UnsupportedError("the compiled program gives other numbers than torch: install another C compiler")
        return kernel
