"""Training requests that name pictures instead of holding them: image chunks whose data are the characters of an
address.

A prompt has a chunk of its own for that (`image_asset_pointer`), which has no form in protobuf and which the SDK
therefore refuses in training. No PNG or JPEG begins like an address.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import DecodeError

from tinsmith.validate.picture_files import ADDRESSES, is_address
from tinsmith.wire import wire_pb2 as pb
from tinsmith.wire.media import WireError


def may_name_pictures(body: bytes) -> bool:
    return any(start in body for start in ADDRESSES)


def named_pictures(body: bytes) -> list[str]:
    """The addresses in a request of checked bounds, in order, as often as they stand there; none in what is no such
    message.

    Raises:
        WireError: an address is no text.
    """
    try:
        return [image.data.decode() for image in _named(_parsed(body))]
    except DecodeError:
        return []
    except UnicodeDecodeError:
        raise WireError("an image chunk begins like an address, and is no text") from None


def with_named_pictures(body: bytes, files: Mapping[str, bytes]) -> bytes:
    """The request with the file at each address in its place."""
    request = _parsed(body)
    for image in _named(request):
        image.data = files[image.data.decode()]
    return bytes(request.SerializeToString(deterministic=True))


def _parsed(body: bytes) -> pb.ForwardBackwardRequest:
    message = pb.ForwardBackwardRequest()
    message.ParseFromString(body)
    return message


def _named(request: pb.ForwardBackwardRequest) -> list[pb.ImageChunk]:
    images = [chunk.image for datum in request.data for chunk in datum.model_input if chunk.HasField("image")]
    return [image for image in images if is_address(image.data)]
