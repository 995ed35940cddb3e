"""From the chunks of a datum or a prompt to its tokens and pictures.

A picture becomes the placeholders that the model's own processor would write, counted from its header. Where a request
is admitted, every picture in it is also decoded once, so that nothing that is acknowledged turns out to be broken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinsmith.errors import TooLargeError, UnsupportedError, UserError
from tinsmith.pictures import Picture, PictureSizeError, VisionInfo, placeholders
from tinsmith.types import TokenArray
from tinsmith.validate.picture_files import ADMITTED, Bounds, Verified, check_whole, is_address, shape_of

REQUEST_PICTURES = 8  # of the largest size, as many pixels may all pictures of a request have


@dataclass(frozen=True, slots=True)
class Sight:
    """How a base takes pictures. base: its name. vision None: it takes none.

    verified: which pictures were found whole before; None: all were, when the request was admitted.
    """

    base: str = "this base model"
    vision: VisionInfo | None = None
    bounds: Bounds = ADMITTED
    max_pictures: int = 2**31
    verified: Verified | None = None


BLIND = Sight()


class Looking:
    """The pictures of one request so far."""

    def __init__(self, sight: Sight) -> None:
        self.sight = sight
        self._num_pictures = self._num_pixels = 0

    def add(self, width: int, height: int) -> None:
        """Raises: TooLargeError: with this one they are too many."""
        self._num_pictures += 1
        self._num_pixels += width * height
        if self._num_pictures > self.sight.max_pictures:
            raise TooLargeError(
                f"the request holds more than {self.sight.max_pictures} pictures (--max-pictures): send fewer at once"
            )
        most = REQUEST_PICTURES * self.sight.bounds.max_pixels
        if self._num_pixels > most:
            raise TooLargeError(
                f"the pictures of the request have more than {most} pixels together: send fewer at once"
            )


class Chunks:
    """The chunks of one datum or prompt, in order; `where` it stands in the request."""

    def __init__(self, looking: Looking, where: str) -> None:
        self._looking, self._where = looking, where
        self._parts: list[TokenArray] = []
        self._pictures: list[Picture] = []
        self._length = 0

    def add_tokens(self, tokens: TokenArray) -> None:
        self._parts.append(tokens)
        self._length += len(tokens)

    def add_picture(
        self, data: bytes, kind: str | None, expected_tokens: int | None, override: tuple[int, int] | None = None
    ) -> None:
        """kind: the format that the client says it has; None: it says nothing. override: width and height that it is to
        be taken to have.

        Raises:
            UserError: it can't be read, is of another format, or stands for another number of tokens than expected.
            UnsupportedError: the base takes no pictures, or not of this kind.
            TooLargeError: beyond the bounds of a picture or a request.
        """
        where = f"{self._where}, picture {len(self._pictures)}"
        try:
            self._add(data, kind, expected_tokens, override)
        except UserError as error:
            raise type(error)(f"{where}: {error.message}") from None

    def _add(
        self, data: bytes, kind: str | None, expected_tokens: int | None, override: tuple[int, int] | None
    ) -> None:
        sight = self._looking.sight
        if sight.vision is None:
            raise blind(sight.base)
        if is_address(data):
            raise UnsupportedError(
                "it is an address: pictures are fetched for training, where the server names locations for it "
                "(--picture-locations); in a prompt send an image_asset_pointer, else the picture itself"
            )
        shape = shape_of(data, sight.bounds)
        if kind not in (None, shape.kind):
            raise UserError(
                f"format says {str(kind)[:20]!r}, but the bytes are {shape.kind}: send format {shape.kind!r}"
            )
        size = f"{shape.width} x {shape.height} pixels"
        if override not in (None, (shape.width, shape.height)):
            raise UnsupportedError(f"override_dimensions other than its own {size} are not offered here: resize it")
        try:
            tokens = placeholders(sight.vision, shape.width, shape.height)
        except PictureSizeError as error:
            raise UserError(f"{sight.base} can't be shown the picture: {error}") from None
        if expected_tokens is not None and expected_tokens != len(tokens):
            raise UserError(
                f"expected_tokens is {expected_tokens}, but {sight.base} makes {len(tokens)} tokens of {size}: send "
                f"{len(tokens)}, and count as many in targets and weights"
            )
        self._looking.add(shape.width, shape.height)
        picture = Picture(self._length, len(tokens), data, shape.width, shape.height)
        if sight.verified is not None and not sight.verified.knows(picture.digest):
            check_whole(data, sight.bounds)
            sight.verified.add(picture.digest)
        self._pictures.append(picture)
        self.add_tokens(tokens)

    @property
    def tokens(self) -> TokenArray:
        """int32, all chunks one after the other."""
        return np.concatenate(self._parts) if self._parts else np.zeros(0, np.int32)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(self._pictures)


def blind(base: str) -> UnsupportedError:
    return UnsupportedError(
        f"{base} takes only token chunks and no pictures: it has no vision that is known here, or its directory lacks "
        "the settings of its image processor (preprocessor_config.json)"
    )
