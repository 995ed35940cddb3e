"""TLS by two files: the server's certificate with its chain, and its key, both PEM.

Owns how they are loaded, loaded again after they have changed, looked at before a start, and how a client on the same
machine trusts the very certificate that the server shows. Knows no HTTP.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import structlog

from tinsmith.errors import ConfigError

log = structlog.get_logger("tinsmith.tls")

HANDSHAKE_TURNS = 4  # of either side, more than TLS 1.2 and 1.3 take


class Certificate:
    """The context that connections are made with; those that are open keep what they began with.

    Raises:
        ConfigError: a file can't be read, isn't PEM, or the two don't belong together.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = (certificate, key)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._seen = self._marks()
        try:
            self._load(self.context)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"--tls-certificate {certificate}, --tls-key {key}: {_reason(error)}") from None

    def load_if_changed(self) -> bool:
        """Whether the files had changed. Ones that don't fit together, as while they are being replaced, change nothing
        and are looked at again."""
        marks = self._marks()
        if marks == self._seen:
            return False
        try:
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # a trial: a failure must not spoil the one in use
            self._load(self.context)
        except (OSError, ssl.SSLError) as error:
            log.warning("the certificate has changed and can't be used; the one before stays", error=_reason(error))
            return False
        self._seen = marks
        log.info("a new certificate is in use", certificate=str(self._files[0]))
        return True

    def _load(self, context: ssl.SSLContext) -> None:
        certificate, key = self._files
        context.load_cert_chain(certificate, key, password=_no_password)

    def _marks(self) -> list[tuple[int, int] | None]:
        return [_mark(path) for path in self._files]


def trusting(certificate: Path) -> ssl.SSLContext:
    """For a client that knows the certificate itself, whatever name it is for and whoever signed it.

    Raises:
        OSError: it can't be read (`ssl.SSLError`: or isn't PEM).
    """
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def valid_until(certificate: Path, key: Path) -> float:
    """Until when (unix seconds) clients take the certificate, by the clock of this machine: found by a handshake in
    memory, with a client that trusts it.

    Raises:
        ConfigError: as `Certificate`; or clients would refuse it, as it has expired or isn't valid yet.
    """
    server_reads, client_reads = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = Certificate(certificate, key).context.wrap_bio(server_reads, client_reads, server_side=True)
    client = trusting(certificate).wrap_bio(client_reads, server_reads)
    for side in (client, server) * HANDSHAKE_TURNS:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            raise ConfigError(f"--tls-certificate {certificate}: {error.verify_message}") from None
    shown = client.getpeercert()
    if not shown:
        raise ConfigError(f"--tls-certificate {certificate}: no handshake comes about with it")
    return float(ssl.cert_time_to_seconds(str(shown["notAfter"])))


def _mark(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _no_password() -> str:
    raise ConfigError("the key is locked with a password, and nobody is there to type it: give one without")


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"no certificate and key (PEM) that belong together ({error.reason or error})"
    return str(error.strerror)
