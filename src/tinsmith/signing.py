"""Signatures of this server: what it hands out to be shown again, without remembering it.

HMAC-SHA256 over a purpose and the values that are bound together, with the secret of the data directory. Owns no
format of links or tokens. The secret is never shown, and comparing takes the same time for every wrong signature.
"""

from __future__ import annotations

import hashlib
import hmac
import json

SECRET_BYTES = 32


class Signer:
    """`secret`: at least `SECRET_BYTES` random bytes, the same for all processes that serve a data directory."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) < SECRET_BYTES:
            raise ValueError(f"a signing secret has at least {SECRET_BYTES} bytes, not {len(secret)}")
        self._secret = secret

    def sign(self, purpose: str, *values: str | int) -> str:
        """64 hex digits. A signature for one purpose is none for another."""
        message = json.dumps([purpose, *values]).encode()
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()

    def is_good(self, signature: str, purpose: str, *values: str | int) -> bool:
        expected = self.sign(purpose, *values).encode()
        return hmac.compare_digest(expected, signature.encode("utf-8", "surrogateescape"))
