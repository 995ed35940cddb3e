"""Inputs that are nearly good: seeds with bits turned, bytes moved, parts of other seeds and telling words put in.

An input follows from its target's name and its number alone, so that any of them can be made again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

MAX_BYTES = 64 << 10
EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**53, 2**63 - 1, 2**64 - 1)
VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, 1e-320, -0.0, "", "x", "\x00",
    "\ud800",
    "x" * 5000, "../../etc/passwd", "NaN", [], {}, [[]], [0] * 300, {"": 0}, {"a": {"b": {"c": []}}}, [None, {}],
)  # fmt: skip
ROUNDS = (1, 1, 1, 2, 3, 5, 9)


def draw(target: str, number: int, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """Input `number` of a target."""
    rng = random.Random(f"{target}:{number}")
    data = rng.choice(seeds)
    for _ in range(rng.choice(ROUNDS)):
        data = rng.choice(WAYS)(rng, data, seeds, words)
    return data[:MAX_BYTES]


def _place(rng: random.Random, data: bytes) -> int:
    return rng.randint(0, len(data))


def _turn(rng: random.Random, data: bytes, *_: Sequence[bytes]) -> bytes:
    if not data:
        return b"\x00"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _replace(rng: random.Random, data: bytes, *_: Sequence[bytes]) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.randbytes(rng.randint(1, 4)) + data[at + rng.randint(0, 4) :]


def _drop(rng: random.Random, data: bytes, *_: Sequence[bytes]) -> bytes:
    at = _place(rng, data)
    return data[:at] + data[at + rng.randint(1, max(1, len(data) // 8)) :]


def _cut(rng: random.Random, data: bytes, *_: Sequence[bytes]) -> bytes:
    return data[: _place(rng, data)]


def _repeat(rng: random.Random, data: bytes, *_: Sequence[bytes]) -> bytes:
    start = _place(rng, data)
    part = data[start : start + rng.randint(1, 64)]
    return data[:start] + part * rng.choice((2, 3, 100)) + data[start:]


def _splice(rng: random.Random, data: bytes, seeds: Sequence[bytes], _: Sequence[bytes]) -> bytes:
    other = rng.choice(seeds)
    return data[: _place(rng, data)] + other[_place(rng, other) :]


def _number(rng: random.Random, data: bytes, *_: Sequence[bytes]) -> bytes:
    """A length or an offset at an edge, in either order of bytes."""
    size = rng.choice((1, 2, 4, 8))
    value = (rng.choice(EDGES) + rng.choice((-1, 0, 0, 1))) % 2 ** (8 * size)
    at = _place(rng, data)
    return data[:at] + value.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]


def _word(rng: random.Random, data: bytes, _: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    word = rng.choice(words) if words else b"\x00"
    at = _place(rng, data)
    return data[:at] + word + data[at + rng.choice((0, 0, len(word))) :]


def _json(rng: random.Random, data: bytes, *_: Sequence[bytes]) -> bytes:
    """JSON with a value of another kind, a field too many, or one too few; what is none is turned."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _turn(rng, data)
    return json.dumps(_altered(rng, value)).encode()


def _altered(rng: random.Random, value: object) -> object:
    if isinstance(value, dict) and value:
        name = rng.choice(sorted(value))
        how = rng.randrange(8)
        if how == 0:
            return {key: inner for key, inner in value.items() if key != name}
        if how == 1:
            return {**value, rng.choice(("x", "type", "", name + "_", "\x00")): rng.choice(VALUES)}
        return {**value, name: _altered(rng, value[name])}
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        how = rng.randrange(6)
        if how == 0:
            return value[:at] + value[at + 1 :]
        if how == 1:
            return value[:at] + [value[at]] * rng.choice((2, 3, 50)) + value[at:]
        return [*value[:at], _altered(rng, value[at]), *value[at + 1 :]]
    return rng.choice(VALUES)


WAYS: tuple[Callable[..., bytes], ...] = (
    _turn, _turn, _replace, _drop, _cut, _repeat, _splice, _number, _number, _word, _word, _json, _json, _json,
)  # fmt: skip
