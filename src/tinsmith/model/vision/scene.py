"""Where the pictures of one sequence are, and what follows from that for its rows: rotary positions and what attention
sees. Pure arithmetic on the sequence's own tokens and pictures; nothing here knows a pass, a tensor or a model.

Shape letters: P tokens of the sequence as it was sent, N positions asked about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tinsmith.errors import UserError
from tinsmith.pictures import Picture, PictureSizeError, VisionInfo, placeholders, smart_resize
from tinsmith.types import IntArray, TokenArray

Positions = IntArray  # int64 [N], or [3, N] where time, height and width have positions of their own


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """The pictures of a sequence, in order.

    rows: of each picture, the positions in the sequence that show its features, int64, ascending.
    axes_3P: rotary positions of the sequence by time, height and width; None: a token's place is its position.
    offset: what the rotary position of a token after the first P exceeds its place by.
    sees_whole: each token of a picture sees all of its picture, those after it too.
    """

    pictures: tuple[Picture, ...]
    rows: tuple[IntArray, ...]
    axes_3P: IntArray | None
    offset: int
    sees_whole: bool

    def positions(self, start: int, end: int) -> Positions:
        """Rotary positions of places start..end-1, of which any number may lie behind the first P."""
        if self.axes_3P is None:
            return np.arange(start, end)
        num_known = self.axes_3P.shape[1]
        later = np.arange(max(start, num_known), end) + self.offset
        return np.concatenate([self.axes_3P[:, start:end], np.broadcast_to(later, (3, len(later)))], axis=1)

    def last_seen(self, start: int, end: int) -> IntArray | None:
        """Of places start..end-1, the last place that each sees; None where that is itself for all of them."""
        if not self.sees_whole:
            return None
        last = np.arange(start, end)
        for rows in self.rows:
            first, stop = max(start, int(rows[0])), min(end, int(rows[-1]) + 1)
            if first < stop:
                last[first - start : stop - start] = rows[-1]
        return last if (last != np.arange(start, end)).any() else None

    def end_of_picture(self, place: int) -> int:
        """`place`, or the end of the picture that must not be cut there."""
        inside = self._picture_around(place)
        return place if inside is None else int(inside[-1]) + 1

    def may_cut(self, place: int) -> bool:
        """Whether what lies before a place can be computed without what lies behind it."""
        return self._picture_around(place) is None

    def shown(self, start: int, end: int) -> Iterator[tuple[Picture, int, int, IntArray]]:
        """The pictures with features in places start..end-1: which of their features (first and past the last), and
        the places of these, counted from `start`."""
        for picture, rows in zip(self.pictures, self.rows, strict=True):
            first, stop = (int(at) for at in np.searchsorted(rows, (start, end)))
            if first < stop:
                yield picture, first, stop, rows[first:stop] - start

    def _picture_around(self, place: int) -> IntArray | None:
        if not self.sees_whole:
            return None
        return next((rows for rows in self.rows if rows[0] < place <= rows[-1]), None)


def make_scene(
    vision: VisionInfo, tokens: TokenArray, pictures: Sequence[Picture], *, has_axes: bool, sees_whole: bool
) -> Scene:
    """
    Raises:
        UserError: the tokens where a picture is aren't the placeholders that the model's own processor would write.
    """
    end = 0
    rows: list[IntArray] = []
    for number, picture in enumerate(pictures):
        at = f"picture {number}"
        start, end_before, end = picture.start, end, picture.start + picture.num_tokens
        if start < end_before or end > len(tokens):
            raise UserError(
                f"{at}: its placeholders, tokens {start} to {end - 1}, aren't in their order in the sequence"
            )
        try:
            expected = placeholders(vision, picture.width, picture.height)
        except PictureSizeError as error:
            raise UserError(f"{at}: {error}") from None
        if picture.num_tokens != len(expected):
            raise UserError(
                f"{at}: {picture.num_tokens} tokens were sent for it; the model makes {len(expected)} of "
                f"{picture.width} x {picture.height} pixels"
            )
        if not np.array_equal(tokens[start:end], expected):
            raise UserError(f"{at}: tokens {start} to {end - 1} aren't the placeholders of this model")
        own = start + np.flatnonzero(expected == vision.image_token)
        if sees_whole and rows and rows[-1][-1] + 1 == own[0]:
            raise UserError(
                f"{at} begins where the one before it ends, and the model would take both for one: put the tokens "
                "that end and begin an image between them"
            )
        rows.append(own)
    axes_3P = _axes(vision, len(tokens), pictures) if has_axes else None
    offset = 0 if axes_3P is None or not len(tokens) else int(axes_3P.max()) + 1 - len(tokens)
    return Scene(tuple(pictures), tuple(rows), axes_3P, offset, sees_whole)


def _axes(vision: VisionInfo, num_tokens: int, pictures: Sequence[Picture]) -> IntArray:
    """[3, P]: text goes on by one on all axes. A picture stands still in time; its rows and columns count from
    where it begins, and text goes on after the longer of them (`transformers`, Qwen3VLModel.get_rope_index)."""
    axes_3P = np.empty((3, num_tokens), np.int64)
    place = position = 0
    for picture in pictures:
        axes_3P[:, place : picture.start] = np.arange(picture.start - place) + position
        position += picture.start - place
        height, width = (side // (vision.patch_size * vision.merge_size) for side in
                         smart_resize(vision, picture.width, picture.height))  # fmt: skip
        place = picture.start + picture.num_tokens
        axes_3P[0, picture.start : place] = position
        axes_3P[1, picture.start : place] = position + np.repeat(np.arange(height), width)
        axes_3P[2, picture.start : place] = position + np.tile(np.arange(width), height)
        position += max(height, width)
    axes_3P[:, place:] = np.arange(num_tokens - place) + position
    return axes_3P


def positions_of(scene: Scene | None, start: int, end: int) -> Positions:
    return np.arange(start, end) if scene is None else scene.positions(start, end)


def joined(parts: Sequence[Positions]) -> Positions:
    """Positions of sequences side by side; those with one axis count alike on all, where others have three."""
    if all(part.ndim == 1 for part in parts):
        return np.concatenate(parts)
    return np.concatenate([np.broadcast_to(part, (3, part.shape[-1])) for part in parts], axis=1)
