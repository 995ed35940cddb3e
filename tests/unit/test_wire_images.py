"""Chunks of text and pictures become tokens with placeholders, in the API and again in the worker."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from tests.paint import IMAGE_TOKEN, VISION, jpeg, png, raw_png
from tinsmith.errors import TooLargeError, UnsupportedError, UserError
from tinsmith.pictures import placeholders
from tinsmith.validate.picture_files import Bounds, Verified
from tinsmith.wire import wire_pb2 as pb
from tinsmith.wire.bounds import check_bounds
from tinsmith.wire.images import Chunks, Looking, Sight
from tinsmith.wire.media import WireError, encode_json
from tinsmith.wire.sampling import decode_sample
from tinsmith.wire.training import decode_training

SIGHT = Sight("see", VISION, Bounds(1 << 20, 1 << 20), 4, Verified())


def text(*tokens: int) -> dict[str, Any]:
    return {"type": "encoded_text", "tokens": list(tokens)}


def image(data: bytes, kind: str = "png", **fields: Any) -> dict[str, Any]:
    return {"type": "image", "data": base64.b64encode(data).decode(), "format": kind, **fields}


def sample_body(*chunks: dict[str, Any]) -> bytes:
    return encode_json({"prompt": {"chunks": chunks}, "sampling_params": {"max_tokens": 4}})


def training_body(*data: list[Any]) -> bytes:
    """Each datum a list of token lists and (bytes, format, expected_tokens)."""
    request = pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    for chunks in data:
        datum = request.data.add()
        for each in chunks:
            if isinstance(each, list):
                datum.model_input.add().encoded_text.tokens = np.array(each, "<i4").tobytes()
            else:
                picture = datum.model_input.add().image
                picture.data, picture.format = each[:2]
                if len(each) > 2:
                    picture.expected_tokens = each[2]
    return bytes(request.SerializeToString())


def test_text_and_pictures_interleave_in_a_prompt() -> None:
    first, second = png(32, 32), jpeg(48, 16)
    request = decode_sample(sample_body(text(1, 2), image(first), image(second, "jpeg"), text(3)), SIGHT)
    assert request.prompt.tolist() == [1, 2, *[IMAGE_TOKEN] * 4, *[IMAGE_TOKEN] * 3, 3]
    assert [(p.start, p.num_tokens, p.width, p.height) for p in request.pictures] == [(2, 4, 32, 32), (6, 3, 48, 16)]
    assert [p.data for p in request.pictures] == [first, second]


def test_text_and_pictures_interleave_in_a_datum() -> None:
    request = decode_training(training_body([[1], (png(), "png", 4), [2, 3], (jpeg(), "jpeg")], [[5]]), SIGHT)
    seen, blind = request.data
    assert seen.tokens.tolist() == [1, *[IMAGE_TOKEN] * 4, 2, 3, *[IMAGE_TOKEN] * 4]
    assert [(p.start, p.end) for p in seen.pictures] == [(1, 5), (7, 11)]
    assert blind.pictures == ()
    assert request.num_tokens == 12


TOO_MANY = r"picture 0: expected_tokens is 5, but see makes 4 tokens of 32 x 32 pixels"


def test_expected_tokens_that_are_wrong_are_told_the_true_count() -> None:
    with pytest.raises(UserError, match=TOO_MANY):
        decode_sample(sample_body(image(png(), expected_tokens=5)), SIGHT)
    with pytest.raises(UserError, match=TOO_MANY):
        decode_training(training_body([(png(), "png", 5)]), SIGHT)


def test_a_worker_decodes_what_was_admitted_to_the_same() -> None:
    body = training_body([[1], (png(), "png", 4)])
    worker = Sight("see", VISION)
    (admitted,), (replayed,) = decode_training(body, SIGHT).data, decode_training(body, worker).data
    assert admitted.pictures == replayed.pictures
    assert admitted.tokens.tolist() == replayed.tokens.tolist()


def test_a_base_without_vision_refuses_pictures_by_name() -> None:
    with pytest.raises(UnsupportedError, match="mute takes only token chunks and no pictures"):
        decode_sample(sample_body(image(png())), Sight("mute"))
    with pytest.raises(UnsupportedError, match="mute takes only token chunks and no pictures"):
        decode_training(training_body([(png(), "png")]), Sight("mute"))


def test_a_format_that_the_bytes_don_t_have_is_refused() -> None:
    with pytest.raises(UserError, match="format says 'png', but the bytes are jpeg"):
        decode_sample(sample_body(image(jpeg())), SIGHT)


def test_override_dimensions_are_taken_if_they_change_nothing() -> None:
    chunks = Chunks(Looking(SIGHT), "datum 0")
    chunks.add_picture(png(32, 16), "png", None, (32, 16))
    with pytest.raises(UnsupportedError, match=r"datum 0, picture 1: override_dimensions .* 32 x 16 pixels"):
        chunks.add_picture(png(32, 16), "png", None, (16, 16))


def test_more_pictures_than_allowed_are_refused() -> None:
    with pytest.raises(TooLargeError, match="more than 4 pictures"):
        decode_sample(sample_body(*[image(png())] * 5), SIGHT)
    with pytest.raises(TooLargeError, match="more than 2 pictures"):
        check_bounds(training_body([(png(), "png")] * 3), 1000, max_pictures=2)
    with pytest.raises(TooLargeError, match="at most 50 are taken"):
        check_bounds(training_body([(png(), "png")]), 1000, max_picture_bytes=50)


def test_the_pixels_of_a_request_are_bounded_together() -> None:
    sight = Sight("see", VISION, Bounds(1 << 20, 32 * 32), 100, Verified())
    decode_sample(sample_body(*[image(png())] * 8), sight)
    with pytest.raises(TooLargeError, match="together"):
        decode_sample(sample_body(*[image(png())] * 9), sight)


def test_a_broken_picture_is_found_where_it_is_admitted() -> None:
    broken = raw_png(32, 32, b"\0" * 10)
    with pytest.raises(UserError, match="prompt, picture 1: the picture can't be read"):
        decode_sample(sample_body(image(png()), image(broken)), SIGHT)


def test_a_stripe_that_the_model_can_t_be_shown_is_refused() -> None:
    with pytest.raises(UserError, match="see can't be shown the picture: one side of 300 x 1 pixels"):
        decode_sample(sample_body(image(png(300, 1))), SIGHT)


@pytest.mark.parametrize("chunk", [{"type": "image"}, {"type": "image", "data": "%%%"}, {"type": "image", "data": 5}])
def test_an_image_chunk_without_bytes_is_no_request(chunk: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        decode_sample(sample_body(chunk), SIGHT)


def test_audio_is_refused() -> None:
    request = pb.ForwardBackwardRequest(model_id="m", seq_id=1)
    request.data.add().model_input.add().dmel.dmel = b"x"
    with pytest.raises(UnsupportedError, match="no audio"):
        decode_training(bytes(request.SerializeToString()), SIGHT)


def test_pictures_never_show_in_what_is_printed() -> None:
    (picture,) = decode_sample(sample_body(image(png())), SIGHT).pictures
    assert "PNG" not in repr(picture)
    assert len(repr(picture)) < 200


def test_a_tile_s_placeholders_are_counted_by_the_vision() -> None:
    assert len(placeholders(VISION, 32, 32)) == 4
