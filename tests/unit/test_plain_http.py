"""What the plain reader takes means to h11 what it means to us; what is odd in any way it leaves alone."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.api.plain_http import MAX_BYTES, read_plain

PATHS = frozenset({b"/api/v1/optim_step", b"/a"})
GOOD = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nX-API-Key: tml-1\r\n\r\n{}"

NAMES = st.sampled_from(
    [b"Host", b"host", b"Content-Length", b"content-length", b"X-API-Key", b"Transfer-Encoding", b"Connection",
     b"Expect", b"Accept", b"X-A", b"x-a", b" X-B", b"X-B ", b"", b"Content-Encoding", b"Upgrade"]
)  # fmt: skip
VALUES = st.sampled_from(
    [b"2", b"0", b"02", b"+2", b"2, 2", b"x", b"", b" 2 ", b"\t2", b"chunked", b"close", b"keep-alive", b"100-continue",
     b"a\x00b", b"a\rb", b"a\nb", b"\xe9", b"zstd", b"a: b", b"\x7f"]
)  # fmt: skip
LINES = st.lists(
    st.builds(lambda name, colon, value: name + colon + value, NAMES, st.sampled_from([b":", b": ", b""]), VALUES)
)
FIRST = st.sampled_from(
    [b"POST /a HTTP/1.1", b"POST /api/v1/optim_step HTTP/1.1", b"POST  /a HTTP/1.1", b"POST /a HTTP/1.0",
     b"POST /b HTTP/1.1", b"GET /a HTTP/1.1", b"POST /a?b HTTP/1.1", b"POST /a HTTP/1.1 ",
     b"\r\nPOST /a HTTP/1.1", b"post /a HTTP/1.1"]
)  # fmt: skip
ENDS = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n"])
BODIES = st.sampled_from([b"", b"{}", b"{}{}", b"{", b"\r\n"])


@given(FIRST, LINES, ENDS, BODIES, st.booleans())
@settings(max_examples=600, deadline=None)
def test_what_is_taken_h11_reads_alike(
    first: bytes, lines: list[bytes], end: bytes, body: bytes, is_sane: bool
) -> None:
    sane = [b"Host: x", b"Content-Length: %d" % len(body)] if is_sane else []
    data = end.join([first, *sane, *lines]) + b"\r\n\r\n" + body
    plain = read_plain(data, PATHS)
    if plain is None:
        return
    conn = h11.Connection(h11.SERVER)
    conn.receive_data(data)
    request = conn.next_event()
    assert isinstance(request, h11.Request)
    assert (request.method, request.target, request.http_version) == (b"POST", plain.path, b"1.1")
    assert dict(request.headers) == dict(plain.headers)
    assert len(request.headers) == len(plain.headers)
    come = b""
    while isinstance(event := conn.next_event(), h11.Data):
        come += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert come == plain.body
    assert conn.trailing_data == (b"", False)
    assert conn.their_state is h11.DONE


def test_a_plain_request_is_taken() -> None:
    plain = read_plain(GOOD, PATHS)
    assert plain is not None
    assert (plain.path, plain.body) == (b"/a", b"{}")
    assert plain.headers == {b"host": b"x", b"content-length": b"2", b"x-api-key": b"tml-1"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"POST /a", b"PUT /a"),
        (b"/a HTTP", b"/other HTTP"),
        (b"HTTP/1.1", b"HTTP/1.0"),
        (b"Host: x\r\n", b""),
        (b"Host: x", b"Host: x\r\nhost: y"),
        (b"Content-Length: 2", b"Content-Length: 3"),
        (b"Content-Length: 2", b"Content-Length: 1"),
        (b"Content-Length: 2", b"Content-Length: +2"),
        (b"Content-Length: 2", b"Content-Length: 2\r\nContent-Length: 2"),
        (b"Content-Length: 2", b"Transfer-Encoding: chunked"),
        (b"Content-Length: 2", b"Content-Length: 2\r\nConnection: close"),
        (b"Content-Length: 2", b"Content-Length: 2\r\nExpect: 100-continue"),
        (b"X-API-Key: tml-1", b"X-API-Key: tml-1\r\n folded"),
        (b"X-API-Key: tml-1", b"X-API-Key : tml-1"),
        (b"X-API-Key: tml-1", b"X-API-Key: tml-\x001"),
        (b"X-API-Key: tml-1", b"X-API-Key: tml-\xff"),
        (b"X-API-Key: tml-1\r\n", b"X-API-Key: tml-1\n"),
        (b"{}", b"{}POST"),
        (b"{}", b"x" * MAX_BYTES),
    ],
)
def test_what_is_odd_goes_the_long_way(old: bytes, new: bytes) -> None:
    assert GOOD.count(old) == 1
    assert read_plain(GOOD.replace(old, new), PATHS) is None
