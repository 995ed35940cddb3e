"""JWTs: short-lived stand-ins for a key, signed by this server (HS256).

A token names the key that it was made for and speaks for it as long as both hold: it ends with its time, and with the
key, at once. It holds who its holder is, so that a client can say so without asking.
"""

from __future__ import annotations

import time
from typing import Any

import jwt

from tinsmith.errors import TokenError
from tinsmith.signing import Signer
from tinsmith.store.rows import Principal

ALGORITHM = "HS256"
ISSUER = "tinsmith"
PREFIX = "eyJ"  # how every JWT begins, and no key does
REQUIRED = ("iss", "sub", "iat", "exp", "key_id")


class Tokens:
    """ttl_s: for how long a token works."""

    def __init__(self, signer: Signer, ttl_s: float) -> None:
        self._secret = signer.sign("jwt")
        self._ttl_s = ttl_s

    def issue(self, principal: Principal, not_after: float | None = None) -> str:
        """A token for the principal. not_after: when the token ends that it is asked for with; the new one ends no
        later, so that a token that was taken can't be prolonged."""
        now = time.time()
        until = min(now + self._ttl_s, float("inf") if principal.expires_at is None else principal.expires_at)
        claims = {
            "iss": ISSUER,
            "sub": user_urn(principal.tenant_id),
            "org_id": principal.tenant_id,
            "org_name": principal.tenant_name,
            "key_id": principal.key_id,
            "iat": now,
            "exp": until if not_after is None else min(until, not_after),
        }
        return jwt.encode(claims, self._secret, algorithm=ALGORITHM)

    def read(self, token: str) -> tuple[str, float]:
        """(id of the key that the token stands for, when it ends).

        Raises:
            TokenError: it was not signed here, was changed, or has ended.
        """
        try:
            claims: dict[str, Any] = jwt.decode(
                token, self._secret, algorithms=[ALGORITHM], issuer=ISSUER, options={"require": list(REQUIRED)}
            )
            return str(claims["key_id"]), float(claims["exp"])
        except (jwt.PyJWTError, ValueError, TypeError):
            raise TokenError(
                "this token has ended or is not one of this server's: exchange a key for a new one at auth/token"
            ) from None


def user_urn(tenant_id: str) -> str:
    return f"tml:organization_user:{tenant_id}"
