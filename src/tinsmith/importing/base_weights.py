"""A base's own head or embedding in an adapter's file, which `peft` saves beside an adapter of the head: it must be the
served base's, as nothing else could be put in its place."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from tinsmith.bases.catalog import HEAD_OF
from tinsmith.bases.weight_headers import weight_files
from tinsmith.errors import UnsupportedError, echo
from tinsmith.importing.tensor_file import TensorFile
from tinsmith.types import BaseInfo

TOLERANCE = 2**-8  # relative: of a base that was saved in bfloat16 and of one that was trained upon in float32


def require_base_weight(file: TensorFile, key: str, base: BaseInfo) -> None:
    """Raises: UnsupportedError: it is another one than the served base has."""
    is_embedding = base.is_head_tied or any(name in key for name in HEAD_OF)
    wanted = tuple(f".{name}.weight" for name in (HEAD_OF if is_embedding else HEAD_OF.values()))
    ours = file.read(key)
    with ExitStack() as opened:
        for path in weight_files(Path(base.path)):
            stored = opened.enter_context(path.open("rb"))
            tensors = TensorFile(stored, path.name, 0, path.stat().st_size)
            name = next((name for name in tensors.tensors if f".{name}".endswith(wanted)), None)
            if name is None:
                continue
            theirs = tensors.read(name)
            if theirs.shape == ours.shape and np.allclose(ours, theirs, rtol=TOLERANCE, atol=0):
                return
            break
    raise UnsupportedError(
        f"the adapter holds {echo(key)}, a whole weight that is not the served base's: an embedding or a head that was "
        "trained or resized can't be carried; train without modules_to_save, or merge it with peft itself"
    )
