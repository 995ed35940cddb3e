"""The pictures of a pack that are looked at through runs' own adapters of the vision tower: forward, and back.

Before the walk the tower looks at them without gradients; what it gives are leaves of the walk's graph. After the
walk's backward it looks again, differentiated, and takes the leaves' gradients back to the adapters: so its
activations and the walk's are never in memory at once, for one more forward of the tower. Data of many runs are looked
at together, each through its own adapter; in deterministic mode one datum after another.
Shape letters: N features of a datum's pictures, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tinsmith.errors import UserError
from tinsmith.model.vision import Eyes, Shares, Sight, UnseenError, in_looks
from tinsmith.training.context import LaneAdapters
from tinsmith.training.lanes import Lane


def look(eyes: Eyes, lanes: Sequence[Lane], *, backward: bool, deterministic: bool) -> None:
    """Set what lanes see through adapters of their own.

    Raises:
        UnseenError: a picture can't be read, or there is no memory to look at it.
    """
    own = [(number, lane) for number, lane in enumerate(lanes) if lane.scene is not None and _trains_tower(lane)]
    for part in _parts(own, deterministic=deterministic):
        for number, lane in part:
            try:
                eyes.check_room(lane.datum.pictures, differentiates=backward and lane.op.staging is not None)
            except UserError as error:
                raise UnseenError(error, number) from None
        with torch.no_grad():
            seen = _look(eyes, part, deterministic=deterministic)
        for (_, lane), found in zip(part, seen.split([_size(lane) for _, lane in part]), strict=True):
            wants_grad = backward and lane.op.staging is not None
            lane.seen = found if not wants_grad else Sight(*_leaves(found))


def look_back(eyes: Eyes, lanes: Sequence[Lane], *, deterministic: bool) -> None:
    """After backward of the walk: add the gradients of live lanes' adapters of the tower."""
    own = [(number, lane) for number, lane in enumerate(lanes) if lane.is_live and lane.seen is not None]
    for part in _parts(own, deterministic=deterministic):
        with torch.enable_grad():
            seen = _look(eyes, part, deterministic=deterministic)
        leaves = [lane.seen.parts for _, lane in part if lane.seen is not None]
        gradients = [torch.cat([_gradient(leaf) for leaf in of_part]) for of_part in zip(*leaves, strict=True)]
        torch.autograd.backward(seen.parts, gradients)
    for lane in lanes:
        lane.seen = None


def _look(eyes: Eyes, part: Sequence[tuple[int, Lane]], *, deterministic: bool) -> Sight:
    """At all pictures of these lanes, end to end."""
    pixels = []
    for number, lane in part:
        for picture in lane.datum.pictures:
            try:
                pixels.append(eyes.pixels(picture))
            except UserError as error:
                raise UnseenError(error, number) from None
    lanes = [lane for _, lane in part]
    make = partial(_adapters, lanes, eyes, deterministic=deterministic)
    return eyes.look_through(Shares([_size(lane) for lane in lanes], make), pixels)


def _adapters(
    lanes: Sequence[Lane], eyes: Eyes, bounds: Sequence[tuple[int, int]], *, deterministic: bool
) -> LaneAdapters:
    """As if the rows of a layer were tokens of the data."""
    own = [
        replace(lane, ref=replace(lane.ref, num_tokens=end - start), start=start, end=end)
        for lane, (start, end) in zip(lanes, bounds, strict=True)
    ]
    return LaneAdapters(own, eyes.lora, deterministic=deterministic)


def _parts(own: Sequence[tuple[int, Lane]], *, deterministic: bool) -> Iterator[list[tuple[int, Lane]]]:
    for indices in in_looks([_size(lane) for _, lane in own], looks_alone=deterministic):
        yield [own[index] for index in indices]


def _size(lane: Lane) -> int:
    """Features of its pictures."""
    return 0 if lane.scene is None else sum(map(len, lane.scene.rows))


def _trains_tower(lane: Lane) -> bool:
    return lane.op.slot.spec.targets.vision


def _leaves(seen: Sight) -> tuple[Tensor, tuple[Tensor, ...]]:
    features_ND, *deeper = (part.detach().requires_grad_() for part in seen.parts)
    return features_ND, tuple(deeper)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
