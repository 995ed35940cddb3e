"""One tree of exceptions. Each carries a stable code, a category and a message that names the cure.

The categories are three: the user's mistake, a lack of capacity (retry later), and our own fault. Nothing here knows
HTTP; the edge turns a category into a status.
"""

from __future__ import annotations

from tinsmith.types import Failure

MAX_ECHO = 200  # characters
MAX_MESSAGE = 2000  # characters, for what no one thought of


class TinsmithError(Exception):
    """Base of all errors that are meant to reach a user. The code is part of the contract and never renamed."""

    code = "internal"
    category = "server"

    def __init__(self, message: str) -> None:
        message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}..."
        super().__init__(message)
        self.message = message

    def as_failure(self) -> Failure:
        return Failure(code=self.code, category=self.category, message=self.message)


class UserError(TinsmithError):
    """The request can't be carried out as it stands."""

    code = "invalid_request"
    category = "user"


class UnsupportedError(UserError):
    """The request names something that is known, but not offered here."""

    code = "unsupported"


class NotFoundError(UserError):
    """No such object for this tenant; another tenant's object answers alike."""

    code = "not_found"


class AuthError(UserError):
    """The key is missing, unknown or revoked."""

    code = "unauthorized"


class TokenError(AuthError):
    """The token that stands for a key has ended, or was not made here; the key itself may be good."""

    code = "invalid_token"


class ForbiddenError(UserError):
    """The key is good, but not for this."""

    code = "forbidden"


class GoneError(UserError):
    """It was there, and is no longer: a finished session, an expired future."""

    code = "gone"


class TooLargeError(UserError):
    """The request is beyond a limit that no waiting would change."""

    code = "too_large"


class QuotaError(UserError):
    """The request alone is larger than a quota of its tenant or key, so it could never be carried out."""

    code = "quota"


class RequestTimeoutError(UserError):
    """The rest of the request didn't come in."""

    code = "request_timeout"


class ConfigError(UserError):
    """A setting or a command line that can't work."""

    code = "bad_setting"


class CapacityError(TinsmithError):
    """There's no room now; the same request may succeed later."""

    code = "capacity"
    category = "capacity"


class GuessingError(CapacityError):
    """Too many unknown keys came from one address."""

    code = "too_many_unknown_keys"


class BusyError(CapacityError):
    """All that the server has of something is in use, whoever uses it."""


class NoMemoryError(TinsmithError):
    """The engine has no memory for something now, though it may have later. Nothing took effect."""

    code = "no_memory"
    category = "capacity"


class TakenError(CapacityError):
    """Another is writing to the database, and the caller chose not to wait. Nothing was written."""


class StorageFullError(CapacityError):
    """The disk is full. Nothing was written."""

    code = "storage_full"


class FencedError(TinsmithError):
    """A worker tried to write for a run whose lease it no longer holds. Nothing was written."""

    code = "fenced"


class CorruptError(TinsmithError):
    """A stored file, or what a row holds, doesn't match its checksum or its header."""

    code = "corrupt"


def echo(text: str) -> str:
    """What a user wrote, as a message may repeat it: quoted, and cut if it is long."""
    return repr(text) if len(text) <= MAX_ECHO else f"{text[:MAX_ECHO]!r}..."
