"""A run's whole state that was downloaded elsewhere: the same bits, under a run of this server's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import msgspec
import numpy as np

from tinsmith.bases.layer_table import Layer, shapes_of
from tinsmith.bases.weight_table import Shapes
from tinsmith.errors import UserError, echo
from tinsmith.files.checkpoint_file import ENTRY, FORMAT, Label, state_header
from tinsmith.importing.archive import Stretch
from tinsmith.importing.tensor_file import TensorFile
from tinsmith.types import RunSpec

NAME = "run_state.safetensors"
PARTS = ("param", "m", "v")
MAX_STEP = 2**53


@dataclass(frozen=True, slots=True)
class ForeignState:
    """See `ForeignAdapter`, whose part this plays for a state; its moments and step come along."""

    file: TensorFile
    spec: RunSpec
    step: int
    names: Mapping[str, tuple[int, ...]]
    has_optimizer: bool

    @property
    def num_bytes(self) -> int:
        return 4 * sum(math.prod(shape) for shape in self.names.values())

    def pieces(self, spec: RunSpec) -> Iterator[memoryview]:
        """Raises: UserError: a number isn't finite."""
        yield memoryview(state_header(spec, self.step, self.names))
        for name in self.names:
            yield np.ascontiguousarray(self.file.read(name)).reshape(-1).view(np.uint8).data


def look_at_state(
    file: BinaryIO, place: Stretch, layers: Sequence[Layer], full_weights: Callable[[], Shapes]
) -> ForeignState:
    """full_weights: tells the weights of a full run, if it is one.

    Raises:
        UserError: it is no run's state, or one of another base; the message names the tensor.
    """
    found = TensorFile(file, NAME, place.offset, place.size)
    try:
        label = msgspec.json.decode(found.metadata[ENTRY], type=Label)
    except (KeyError, TypeError, msgspec.MsgspecError) as error:
        raise UserError(f"{NAME} is no run's state: its label can't be read ({error})") from None
    if label.format != FORMAT:
        raise UserError(f"{NAME} has the format {echo(label.format)}, and {FORMAT!r} is read here: update the server")
    spec = label.spec
    ranks, alphas = (spec.rank, *dict(spec.options.ranks).values()), (spec.alpha, *dict(spec.options.alphas).values())
    least = 0 if spec.is_full else 1
    are_good = all(rank >= least for rank in ranks) and all(math.isfinite(alpha) and alpha > 0 for alpha in alphas)
    if not are_good or not 0 <= label.step <= MAX_STEP or not 0 <= spec.options.dropout < 1:
        raise UserError(f"{NAME}: its step, ranks, alphas and dropout are no numbers that a run can have")
    names = _names(found, full_weights() if spec.is_full else shapes_of(layers, spec))
    return ForeignState(found, label.spec, label.step, names, any(name.startswith("m/") for name in names))


def _names(file: TensorFile, wanted: Shapes) -> Shapes:
    """The tensors in the order in which they lie here, with their shapes. wanted: of one part."""
    parts = {name.partition("/")[0] for name in file.tensors}
    if not wanted or parts not in ({"param"}, set(PARTS)):
        raise UserError(
            f"{NAME} must hold weights, and both moments or none; it has {', '.join(map(echo, sorted(parts)[:6]))}"
        )
    names = {f"{part}/{name}": shape for part in PARTS if part in parts for name, shape in wanted.items()}
    for name, shape in names.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            raise UserError(f"{NAME} lacks {name}: it was made with other layers or on another base model")
        if tensor.shape != shape or tensor.dtype != "F32":
            raise UserError(
                f"{NAME}: {name} is {tensor.dtype} {list(tensor.shape)}, the served base needs F32 {list(shape)}: it "
                "was made on another base model, or with another --expert-adapters"
            )
    surplus = file.tensors.keys() - names.keys()
    if surplus:
        raise UserError(f"{NAME} holds {echo(min(surplus))}, for which the served base has no layer")
    return names
