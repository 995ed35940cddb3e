"""Files encrypted with age (age-encryption.org/v1) to its owner's public keys: who reads the disk reads nothing.

Recipients are age's own keys (`age1...`) and SSH public keys (`ssh-ed25519 ...`, `ssh-rsa ...`).
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import pyrage

from tinsmith.errors import UserError

MAX_RECIPIENTS = 10
MAX_RECIPIENT_CHARS = 4096
SUFFIX = ".age"
PANIC = "PanicException"


def check_recipients(texts: Sequence[str] | None) -> tuple[str, ...]:
    """The recipients, if all of them are good ones; () for None or none.

    Raises:
        UserError: too many, or one that is no public key of a kind that age knows.
    """
    texts = tuple(texts or ())
    if len(texts) > MAX_RECIPIENTS:
        raise UserError(f"age_encryption_recipients holds {len(texts)} keys, at most {MAX_RECIPIENTS} are allowed")
    for index, text in enumerate(texts):
        try:
            _parse(text)
        except ValueError:
            raise UserError(
                f"age_encryption_recipients[{index}] is no public key: give one that begins with age1, "
                "ssh-ed25519 or ssh-rsa"
            ) from None
    return texts


def encrypt(data: bytes, recipients: Sequence[str]) -> bytes:
    """`data` so that each of the recipients can decrypt it.

    Raises:
        ValueError: a recipient that `check_recipients` would refuse.
    """
    sealed: bytes = pyrage.encrypt(data, [_parse(text) for text in recipients])
    return sealed


def _parse(text: str) -> Any:
    if len(text) > MAX_RECIPIENT_CHARS:
        raise ValueError("too long")
    if text.startswith("age1"):
        kind = pyrage.x25519
    else:
        kind = pyrage.ssh
        _check_fields(text)
    try:
        return kind.Recipient.from_str(text)
    except pyrage.RecipientError as error:
        raise ValueError(str(error)) from None
    except BaseException as error:  # pyo3 tells a panic of the library by a class that can't be imported
        if type(error).__name__ != PANIC:
            raise
        raise ValueError("not a key that the library can read") from None


def _check_fields(text: str) -> None:
    """An SSH public key holds its fields with the length of each before it (RFC 4251, section 5).

    Raises:
        ValueError: a field is cut off, or empty, which age 0.12 doesn't expect of numbers.
    """
    _, encoded, *_ = [*text.split(" "), "", ""]
    data = base64.b64decode(encoded, validate=True)
    while data:
        size = int.from_bytes(data[:4])
        if not 0 < size <= len(data) - 4:
            raise ValueError("a field of the key is empty or cut off")
        data = data[4 + size :]
