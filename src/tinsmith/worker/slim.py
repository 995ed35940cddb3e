"""What a worker process leaves out of its memory. For the process's own start; nothing else calls it."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import cast

from tinsmith.config import read_weights_in_turn


def leave_out_unused(device: str) -> None:
    """Without a GPU, keep torch's compiler from loading triton: 75 MB that nothing uses there.

    What loads that compiler (torchao does, for weights that are quantised here) loads triton where it is installed.
    None in `sys.modules` is Python's way to say that a module can't be imported
    (https://docs.python.org/3/reference/import.html#the-module-cache).
    """
    if device == "cpu" or (device == "auto" and not importlib.import_module("torch").cuda.is_available()):
        sys.modules.setdefault("triton", cast(ModuleType, None))
        read_weights_in_turn()
