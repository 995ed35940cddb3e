"""What was sent: an adapter or a run's state, in a tar or, a state, as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import BinaryIO, Protocol

from tinsmith.bases.layer_table import Layer
from tinsmith.bases.weight_table import Shapes
from tinsmith.errors import UserError
from tinsmith.importing import adapter, peft_config, state
from tinsmith.importing.archive import Stretch, files_in
from tinsmith.types import BaseInfo, RunSpec

PICKLES = ("adapter_model.bin", "adapter_model.pt")


class Foreign(Protocol):
    """What can become a checkpoint. num_bytes: of its tensors there."""

    @property
    def spec(self) -> RunSpec:
        """Of a run like it; whose and on which base is left open."""
        ...

    @property
    def has_optimizer(self) -> bool: ...
    @property
    def num_bytes(self) -> int: ...

    def pieces(self, spec: RunSpec) -> Iterator[memoryview]:
        """The file of the checkpoint, of a run with this spec. Raises: UserError: its numbers can't be taken."""
        ...


def look(
    file: BinaryIO, num_bytes: int, layers: Sequence[Layer], base: BaseInfo, full_weights: Callable[[], Shapes]
) -> Foreign:
    """Look at the headers of what was sent. full_weights: tells the weights of a full run, if it is one's state.

    Raises:
        UserError: it is neither, can't be carried, or doesn't fit the base; the message says why.
    """
    file.seek(0)
    if file.read(9)[8:] == b"{":
        return state.look_at_state(file, Stretch(0, num_bytes), layers, full_weights)
    files = _at_root(files_in(file, num_bytes))
    if state.NAME in files:
        return state.look_at_state(file, files[state.NAME], layers, full_weights)
    for name in (adapter.WEIGHTS, peft_config.NAME):
        if name not in files:
            pickle = next((f"; {pickle} is a pickle, which is not read" for pickle in PICKLES if pickle in files), "")
            raise UserError(f"the archive lacks {name}: send the files of a PEFT adapter, or {state.NAME}{pickle}")
    return adapter.look_at_adapter(file, files, layers, base)


def _at_root(files: Mapping[str, Stretch]) -> Mapping[str, Stretch]:
    """The files of the archive's only folder, if all of them are in one."""
    folders = {name.partition("/")[0] if "/" in name else "" for name in files}
    if len(folders) != 1 or "" in folders:
        return files
    (folder,) = folders
    return {name.removeprefix(f"{folder}/"): place for name, place in files.items()}
