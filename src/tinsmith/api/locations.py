"""Which locations pictures may be fetched from: what the operator named, and nothing beside it.

A location is allowed by how it is spelt, before anything is looked up: a URL below a named prefix, or a file below a
named directory, where symbolic links have been followed. Which addresses a host may have is for `is_reachable`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

from tinsmith.errors import ConfigError, UserError, echo

HTTPS_PORT = 443
MAX_LOCATION_CHARS = 4096
MAX_UNQUOTES = 4
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses written as IPv6 (RFC 6052)

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Url:
    """host: in lower case. target: path and query, as they go into the request line."""

    host: str
    port: int
    target: str


@dataclass(frozen=True, slots=True)
class Locations:
    """prefixes: their targets end with a slash. networks: private addresses that the hosts may have."""

    prefixes: tuple[Url, ...] = ()
    directories: tuple[Path, ...] = ()
    networks: tuple[Network, ...] = ()

    @classmethod
    def of(cls, texts: Sequence[str]) -> Locations:
        """From the setting.

        Raises:
            ConfigError: one is no URL, directory or network.
        """
        prefixes: list[Url] = []
        directories: list[Path] = []
        networks: list[Network] = []
        for text in texts:
            try:
                if text.startswith("https://"):
                    url = _url(text)
                    prefixes.append(Url(url.host, url.port, url.target.rstrip("/") + "/"))
                elif text.startswith("/"):
                    directories.append(Path(text).resolve())
                else:
                    networks.append(ipaddress.ip_network(text))
            except (ValueError, UserError) as error:
                raise ConfigError(f"--picture-locations: {text!r} can't be used: {error}") from None
        return cls(tuple(prefixes), tuple(directories), tuple(networks))

    def __bool__(self) -> bool:
        return bool(self.prefixes or self.directories)

    def find(self, location: str) -> Url | Path:
        """What a location means, if it is allowed.

        Raises:
            UserError: it isn't.
        """
        if len(location) > MAX_LOCATION_CHARS or not location.isprintable():
            raise UserError("the location is too long, or holds what can't be printed")
        if location.startswith("https://"):
            url = _url(location)
            for prefix in self.prefixes:
                if (url.host, url.port) == (prefix.host, prefix.port) and url.target.startswith(prefix.target):
                    return url
        elif location.startswith(("/", "file:///")):
            path = Path(location.removeprefix("file://"))
            if ".." not in path.parts:
                return self._below(path, location)
        raise self._refusal(location)

    def _below(self, path: Path, location: str) -> Path:
        try:
            real = path.resolve()
        except (OSError, RuntimeError):  # a loop of links
            raise self._refusal(location) from None
        if not any(real.is_relative_to(directory) for directory in self.directories):
            raise self._refusal(location)
        return real

    def is_reachable(self, host: str, address: Address) -> bool:
        """Whether a host may be at that address: any public one, its own if the setting names it by it, and any of a
        named network."""
        plain = _unwrapped(address)
        if any(plain in network for network in self.networks) or _is_address(host, plain):
            return True
        is_odd = isinstance(plain, ipaddress.IPv6Address) and (plain.sixtofour or plain.teredo or plain in NAT64)
        return plain.is_global and not plain.is_multicast and not is_odd

    def _refusal(self, location: str) -> UserError:
        allowed = [f"https://{p.host}{'' if p.port == HTTPS_PORT else f':{p.port}'}{p.target}" for p in self.prefixes]
        named = ", ".join([*allowed, *map(str, self.directories)])
        return UserError(f"pictures are not fetched from {echo(location)}, but from {named}: send the picture itself")


def _url(text: str) -> Url:
    """Raises: UserError: no URL that could be asked for, or one that leads out of where it seems to be."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port or HTTPS_PORT
    except ValueError:
        raise UserError(f"{echo(text)} is no URL") from None
    if not text.isascii() or any(character in text for character in ' \\#"<>^`{|}') or "@" in parts.netloc or not host:
        raise UserError(f"{echo(text)} is no plain URL: https://host/path, with anything unusual percent-encoded")
    path = parts.path or "/"
    for _ in range(MAX_UNQUOTES):
        if any(part in (".", "..") for part in path.replace("\\", "/").split("/")) or not path.isprintable():
            raise UserError(f"the path of {echo(text)} leads elsewhere: write it without dots")
        if unquote(path) == path:
            break
        path = unquote(path)
    else:
        raise UserError(f"the path of {echo(text)} is percent-encoded too often")
    return Url(host.rstrip("."), port, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))


def _unwrapped(address: Address) -> Address:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return address if mapped is None else mapped


def _is_address(host: str, address: Address) -> bool:
    try:
        return ipaddress.ip_address(host) == address
    except ValueError:
        return False
