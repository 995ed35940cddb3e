"""Files from strangers: what is a picture is read, everything else is refused by name and costs little."""

from __future__ import annotations

import contextlib
import io
import random
import resource
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from tests.paint import chunk, jpeg, painted, png, raw_png, saved
from tinsmith.errors import TinsmithError, TooLargeError, UnsupportedError, UserError
from tinsmith.validate.picture_files import Bounds, Shape, Verified, check_whole, may_hold_pictures, read_rgb, shape_of

BOUNDS = Bounds(max_bytes=1 << 20, max_pixels=1 << 20)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_pngs_of_all_plain_kinds_are_read(mode: str) -> None:
    data = png(40, 24, mode=mode)
    assert shape_of(data, BOUNDS) == Shape("png", 40, 24)
    check_whole(data, BOUNDS)
    assert same_as_transformers(data)


@pytest.mark.parametrize(("mode", "options"), [("L", {}), ("RGB", {}), ("RGB", {"progressive": True})])
def test_jpegs_are_read(mode: str, options: dict[str, bool]) -> None:
    data = jpeg(40, 24, mode=mode, **options)
    assert shape_of(data, BOUNDS) == Shape("jpeg", 40, 24)
    check_whole(data, BOUNDS)
    assert same_as_transformers(data)


def same_as_transformers(data: bytes) -> bool:
    theirs = load_image(Image.open(io.BytesIO(data)))
    return bool(np.array_equal(np.asarray(read_rgb(data, BOUNDS)), np.asarray(theirs)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_orientation_of_a_camera_is_followed(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(painted(40, 24), kind, exif=exif)
    upright = (24, 40) if orientation > 4 else (40, 24)
    shape = shape_of(data, BOUNDS)
    assert (shape.width, shape.height) == upright == read_rgb(data, BOUNDS).size
    assert same_as_transformers(data)


def test_an_orientation_after_the_pixels_is_followed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(40, 24).removesuffix(chunk(b"IEND", b"")) + chunk(b"eXIf", exif.tobytes()[6:]) + chunk(b"IEND", b"")
    shape = shape_of(data, BOUNDS)
    assert (shape.width, shape.height) == (24, 40)
    assert same_as_transformers(data)


def test_transparency_is_dropped_as_transformers_drops_it() -> None:
    palette = painted(16, 16).quantize(8)
    assert read_rgb(saved(palette, "PNG", transparency=bytes([0, 128, 255])), BOUNDS).mode == "RGB"


REFUSED = {
    "nothing": (b"", "neither a PNG nor a JPEG"),
    "a GIF": (saved(painted(), "GIF"), "neither a PNG nor a JPEG"),
    "a WebP": (b"RIFF\x24\x00\x00\x00WEBPVP8 ", "neither a PNG nor a JPEG"),
    "a TIFF": (saved(painted(), "TIFF"), "neither a PNG nor a JPEG"),
    "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "neither a PNG nor a JPEG"),
    "the beginning of a PNG": (png()[:8], "doesn't begin with its header"),
    "a PNG cut in its header": (png()[:20], "doesn't begin with its header"),
    "a PNG without pixels": (raw_png(8, 8, b""), "can't be read"),
    "a PNG cut in its pixels": (png(64, 64)[:-60], "can't be read"),
    "a PNG of no width": (raw_png(0, 8, b"\0" * 8), "no pixels"),
    "a PNG of 16 bits": (raw_png(8, 8, b"\0" * 8 * 17, depth=16, colours=0), "16 bits"),
    "a CMYK JPEG": (jpeg(mode="CMYK"), "CMYK"),
    "the beginning of a JPEG": (jpeg()[:4], "can't be read"),
    "a JPEG cut in its pixels": (jpeg(64, 64)[:-200], "can't be read"),
    "a JPEG without an end": (jpeg(64, 64)[:100], "can't be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_picture_is_refused(name: str) -> None:
    data, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        check_whole(data, BOUNDS)


def test_an_animation_is_refused() -> None:
    data = saved(painted(seed=1), "PNG", save_all=True, append_images=[painted(seed=2)])
    with pytest.raises(UnsupportedError, match="animated"):
        shape_of(data, BOUNDS)


def test_of_a_jpeg_with_several_pictures_the_first_counts() -> None:
    data = saved(painted(40, 24), "MPO", save_all=True, append_images=[painted(16, 16)])
    assert shape_of(data, BOUNDS) == Shape("jpeg", 40, 24)
    assert same_as_transformers(data)


def test_a_file_that_is_too_large_is_refused() -> None:
    with pytest.raises(TooLargeError, match="at most 100 are taken"):
        shape_of(png(), Bounds(100, 1 << 20))


@pytest.mark.parametrize(
    ("width", "height"), [(1025, 1024), (2**31 - 1, 2**31 - 1), (65_536, 1), (1, 65_536), (2**32 - 1, 1)]
)
def test_a_picture_of_too_many_pixels_is_refused_by_its_header(width: int, height: int) -> None:
    with pytest.raises(TooLargeError, match="scale it down"):
        shape_of(raw_png(width, height, b""), BOUNDS)


def test_a_jpeg_of_too_many_pixels_is_refused_by_its_header() -> None:
    data = bytearray(jpeg(64, 64))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(TooLargeError, match="65535 x 65535"):
        shape_of(bytes(data), BOUNDS)


def test_a_jpeg_of_thousands_of_scans_is_refused_undecoded() -> None:
    data = jpeg(1000, 1000, progressive=True)
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x10\x00"
    bomb = data[:-2] + scan * 50_000 + data[-2:]
    started = time.process_time()
    with pytest.raises(TooLargeError, match="scans"):
        check_whole(bomb, BOUNDS)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "bomb",
    [
        jpeg()[:2] + b"\xff\xfe\0\2" * 1_000_000 + jpeg()[2:],
        jpeg()[:2] + b"\xff" * 4_000_000 + jpeg()[2:],
        jpeg()[:2] + (b"\xff\xf0\xff\xff" + bytes(65_533)) * 60 + jpeg()[2:],
        raw_png(8, 8, b"\0" * 25 * 8, extra=chunk(b"prVt", b"") * 400_000),
    ],
    ids=["segments", "fill bytes", "what Pillow skips", "chunks"],
)
def test_a_file_of_a_million_parts_is_refused_unread(bomb: bytes) -> None:
    started = time.process_time()
    with pytest.raises(TooLargeError, match="parts"):
        shape_of(bomb, Bounds(1 << 24, 1 << 20))
    assert time.process_time() - started < 0.5


def test_what_else_a_camera_says_does_not_matter() -> None:
    """Pillow's own turn writes the EXIF data anew, which fails at a value of another type."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 1.5
    data = bytearray(saved(painted(40, 24), "JPEG", exif=exif))
    data[data.index(b"Exif") + 29] = 1
    check_whole(bytes(data), BOUNDS)
    assert shape_of(bytes(data), BOUNDS) == Shape("jpeg", 24, 40)
    assert read_rgb(bytes(data), BOUNDS).size == (24, 40)


def test_a_bomb_takes_no_memory() -> None:
    """A gigapixel of zeros, deflated to a megabyte."""
    squeezer = zlib.compressobj(9)
    body = b"".join(squeezer.compress(bytes(1 << 20)) for _ in range(100)) + squeezer.flush()
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0\0\x80\0\0\0\x80\0\x08\0\0\0\0")
    bomb = start + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TooLargeError):
        check_whole(bomb, BOUNDS)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_texts_that_inflate_beyond_measure_are_refused(kind: bytes) -> None:
    squeezed = zlib.compress(bytes(120 << 20), 1)
    prefix = {b"zTXt": b"Comment\0\0", b"iTXt": b"Comment\0\1\0\0\0", b"iCCP": b"Profile\0\0"}[kind]
    data = raw_png(8, 8, b"\0" * 25 * 8, extra=chunk(kind, prefix + squeezed))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(TinsmithError):
        shape_of(data, BOUNDS)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("whole", [png(48, 40), jpeg(48, 40), jpeg(48, 40, progressive=True), png(24, 24, mode="P")])
def test_broken_bytes_are_a_user_s_mistake_and_nothing_else(whole: bytes) -> None:
    rng = random.Random(3)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        try:
            shape = shape_of(bytes(data), BOUNDS)
            check_whole(bytes(data), BOUNDS)
            assert read_rgb(bytes(data), BOUNDS).size == (shape.width, shape.height)
        except TinsmithError:
            continue


def test_what_was_found_whole_is_known_again() -> None:
    verified = Verified()
    verified.add(b"a")
    assert verified.knows(b"a")
    assert not verified.knows(b"b")


def test_a_body_shows_whether_it_may_hold_pictures() -> None:
    assert may_hold_pictures(b"..." + png())
    assert may_hold_pictures(b"..." + jpeg())
    assert not may_hold_pictures(bytes(100))
