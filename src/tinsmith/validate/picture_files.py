"""PNG and JPEG files from strangers: how large a picture is, whether all of it can be read, and its pixels.

Everything is bounded before memory is spent: the header says how large a picture is, and one beyond the bounds is
refused before a pixel is decoded. What is a picture here, and which way up, is the same for whoever counts its tokens
and for whoever shows it to a model: as `transformers.image_utils.load_image`, the orientation in its EXIF data is
followed and transparency dropped.
"""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass

from PIL.Image import Image, Transpose
from PIL.JpegImagePlugin import MARKER, JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from tinsmith.errors import TooLargeError, UnsupportedError, UserError

PNG, JPEG = "png", "jpeg"
PNG_START, JPEG_START = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
ADDRESSES = (b"https://", b"file:///")  # what may stand where a picture would
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
START_OF_SCAN = b"\xff\xda"
NO_MARKER = ("", "", None)
MAX_SCANS = 64  # a progressive JPEG has ten or so; each goes over the whole picture, and may be a few bytes long
MAX_PARTS = 1 << 16  # chunks of a PNG, segments of a JPEG; each is read by Python code, and may be four bytes long
MAX_SIDE = 65_535  # pixels, as in a JPEG's header
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 swap width and height
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip
ORIENTED = (b"eXIf", b"Raw profile", b"XML:com.adobe.xmp")  # in PNG chunks that may name an orientation
MAX_KNOWN = 8192

# What Pillow raises at bytes that are no picture, from its readers of headers, EXIF data and pixels.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    AssertionError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """max_bytes: of one file. max_pixels: of one picture."""

    max_bytes: int
    max_pixels: int


ADMITTED = Bounds(2**31, 2**31)  # for pictures that were held to a server's bounds before


@dataclass(frozen=True, slots=True)
class Shape:
    """Upright, in pixels. kind: PNG or JPEG."""

    kind: str
    width: int
    height: int


class Verified:
    """Which pictures were decoded once and came out whole, by their digest. Any method may be called in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def knows(self, digest: bytes) -> bool:
        with self._lock:
            return digest in self._known

    def add(self, digest: bytes) -> None:
        with self._lock:
            self._known[digest] = None
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)


def kind_of(data: bytes) -> str:
    """Of a file that was found to be a picture."""
    return PNG if data.startswith(PNG_START) else JPEG


def is_address(data: bytes) -> bool:
    """Whether it names a picture, and is none."""
    return data.startswith(ADDRESSES)


def may_hold_pictures(body: bytes) -> bool:
    """Whether a file that could be decoded stands somewhere in a body, as it is."""
    return PNG_START in body or JPEG_START in body


def shape_of(data: bytes, bounds: Bounds) -> Shape:
    """From the header alone, but for a PNG that tells its orientation, which may come after the pixels.

    Raises:
        UserError: no PNG or JPEG, or one whose header is broken.
        UnsupportedError: a kind of picture that models can't be shown as it is.
        TooLargeError: beyond the bounds.
    """
    image = _open(data, bounds)
    try:
        may_be_turned = isinstance(image, JpegImageFile) or any(mark in data for mark in ORIENTED)
        is_turned = may_be_turned and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except BROKEN as error:
        raise _broken(error) from None
    width, height = image.size
    return Shape(kind_of(data), height, width) if is_turned else Shape(kind_of(data), width, height)


def check_whole(data: bytes, bounds: Bounds) -> None:
    """Decode all of it and keep nothing. A JPEG is decoded at an eighth of its size, which reads every byte of it.

    Raises:
        UserError, UnsupportedError, TooLargeError: as `shape_of`, or the pixels can't be read.
    """
    image = _open(data, bounds)
    try:
        if isinstance(image, JpegImageFile):
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
    except BROKEN as error:
        raise _broken(error) from None


def read_rgb(data: bytes, bounds: Bounds = ADMITTED) -> Image:
    """The pixels, upright, mode RGB.

    Raises:
        UserError, UnsupportedError, TooLargeError: as `check_whole`.
    """
    image: Image = _open(data, bounds)
    try:
        image.load()
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
        upright = image if turn is None else image.transpose(turn)
        if "transparency" in upright.info and upright.mode == "P":
            upright = upright.convert("RGBA")
        return upright.convert("RGB")
    except BROKEN as error:
        raise _broken(error) from None


def _open(data: bytes, bounds: Bounds) -> PngImageFile | JpegImageFile:
    """The header alone is read. The plugins' own classes: `Image.open` would guess among formats, warn of large
    pictures by a global, and take a JPEG of several pictures for another format; here its first picture counts."""
    if len(data) > bounds.max_bytes:
        raise TooLargeError(
            f"the file has {len(data)} bytes, at most {bounds.max_bytes} are taken: send a smaller picture"
        )
    is_png = data.startswith(PNG_START)
    if not is_png and not data.startswith(JPEG_START):
        raise UserError("the bytes are neither a PNG nor a JPEG file: send one of these")
    if not is_png and data.count(START_OF_SCAN) > MAX_SCANS:
        raise TooLargeError(f"the JPEG has more than {MAX_SCANS} scans: save it as a baseline JPEG")
    if is_png:
        _check_size(*_png_size(data), bounds)
    if (_has_many_chunks if is_png else _has_many_segments)(data):
        raise TooLargeError(f"the picture's file has more than {MAX_PARTS} parts: save it anew")
    try:
        image = PngImageFile(io.BytesIO(data)) if is_png else JpegImageFile(io.BytesIO(data))
        is_animated = getattr(image, "is_animated", False)
    except BROKEN as error:
        raise _broken(error) from None
    _check_size(*image.size, bounds)
    if is_animated:
        raise UnsupportedError("the PNG is animated: send one picture, or each frame as a picture")
    if image.mode not in MODES:
        raise UnsupportedError(
            f"the picture has mode {image.mode} (CMYK, or 16 bits and more of one channel): convert it to RGB or "
            "grey of 8 bits"
        )
    return image


def _png_size(data: bytes) -> tuple[int, int]:
    """Of the IHDR chunk, which is the first (PNG specification, 11.2.1)."""
    if len(data) < 24 or data[12:16] != b"IHDR":
        raise UserError("the picture can't be read: a PNG that doesn't begin with its header")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def _has_many_chunks(data: bytes) -> bool:
    at = len(PNG_START)
    for _ in range(MAX_PARTS):
        if at + 8 > len(data) or data[at + 4 : at + 8] == b"IEND":
            return False
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return True


def _has_many_segments(data: bytes) -> bool:
    """Before the first scan, as Pillow reads them: bytes between segments are one each, and so are those of segments
    that it does nothing with."""
    at = 2
    for _ in range(MAX_PARTS):
        if at + 4 > len(data) or data[at : at + 2] == START_OF_SCAN:
            return False
        if data[at] != 0xFF or data[at + 1] == 0xFF:
            at += 1
        elif MARKER.get(0xFF00 + data[at + 1], NO_MARKER)[2] is None:
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def _check_size(width: int, height: int, bounds: Bounds) -> None:
    if width < 1 or height < 1:
        raise UserError("the picture can't be read: it has no pixels")
    if max(width, height) > MAX_SIDE or width * height > bounds.max_pixels:
        raise TooLargeError(
            f"the picture has {width} x {height} pixels, at most {bounds.max_pixels} are taken, and {MAX_SIDE} a side: "
            "scale it down"
        )


def _broken(error: BaseException) -> UserError:
    return UserError(f"the picture can't be read: {str(error)[:200] or type(error).__name__}")
