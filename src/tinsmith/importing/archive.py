"""A tar that was sent: where its files lie. Nothing is unpacked, and no name in it becomes a path.

The headers are read one by one with `tarfile`'s own parser of a header. The module's reader of whole archives isn't
used: it keeps extended headers in memory however large they say they are.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from tinsmith.errors import UserError, echo

BLOCK = tarfile.BLOCKSIZE
MAX_MEMBERS = 256
MAX_EXTENDED_BYTES = 1 << 16
SEND = "send an uncompressed tar with the adapter's files at its root"
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE)
COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "a zip archive",
}  # fmt: skip
MOVES = (b" path=", b" size=", b" GNU.sparse", b" linkpath=")


@dataclass(frozen=True, slots=True)
class Stretch:
    """`size` bytes from `offset` on."""

    offset: int
    size: int


def files_in(file: BinaryIO, num_bytes: int) -> Mapping[str, Stretch]:
    """The regular files of a tar by name, without a leading `./`; directories are left out.

    Raises:
        UserError: it isn't an uncompressed tar, is cut short, or holds links, devices or names that lead elsewhere.
    """
    file.seek(0)
    begun = file.read(max(map(len, COMPRESSED)))
    kind = next((kind for magic, kind in COMPRESSED.items() if begun.startswith(magic)), None)
    if kind is not None:
        raise UserError(f"what was sent is {kind}, not an uncompressed tar: unpack it, and {SEND}")
    found: dict[str, Stretch] = {}
    at, num_members = 0, 0
    while at + BLOCK <= num_bytes:
        file.seek(at)
        block = file.read(BLOCK)
        if not block.strip(b"\0"):
            break
        member = _header(block)
        begin, end = at + BLOCK, at + BLOCK + member.size
        num_members += 1
        if num_members > MAX_MEMBERS:
            raise UserError(f"the archive holds more than {MAX_MEMBERS} entries: send the adapter's files alone")
        if member.size < 0 or end > num_bytes:
            raise UserError(f"the archive ends within {echo(member.name)}: it was not sent whole")
        at = begin + -(-member.size // BLOCK) * BLOCK
        if member.type in EXTENDED:
            _check_extended(file, begin, member.size)
        elif member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.name.endswith("/"):
            name = member.name.removeprefix("./")
            if name.startswith("/") or ".." in name.split("/") or name in found:
                raise UserError(f"the archive holds {echo(member.name)}, which leads elsewhere or is there twice")
            found[name] = Stretch(begin, member.size)
        elif member.type not in (tarfile.DIRTYPE, tarfile.AREGTYPE):
            raise UserError(f"the archive holds {echo(member.name)}, which is no plain file: send files alone")
    if not found:
        raise UserError(f"the archive holds no files: {SEND}")
    return found


def _header(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except tarfile.HeaderError as error:
        raise UserError(
            f"not an uncompressed tar ({error}): {SEND}, or a run's state as one safetensors file"
        ) from None


def _check_extended(file: BinaryIO, begin: int, size: int) -> None:
    """Times and owners are of no interest; what moves the next entry would have to be followed."""
    if size > MAX_EXTENDED_BYTES:
        raise UserError("the archive has an extended header that is too long: write a plain tar")
    file.seek(begin)
    records = file.read(size)
    if any(word in records for word in MOVES):
        raise UserError(
            "the archive has names or sizes that don't fit a plain tar: write it with --format=ustar or gnu"
        )
