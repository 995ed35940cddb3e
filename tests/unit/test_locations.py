"""A location is allowed if it lies below what the operator named, however it is spelt; nothing else is."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import pytest

from tinsmith.api.locations import Locations, Url
from tinsmith.config import Settings
from tinsmith.errors import ConfigError, UserError

NAMED = Locations.of(["https://images.example/sets", "https://other.example:8443/"])


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("https://images.example/sets/a.png", "/sets/a.png"),
        ("https://IMAGES.example:443/sets/a%20b.png?width=3", "/sets/a%20b.png?width=3"),
        ("https://other.example:8443/anything", "/anything"),
    ],
)
def test_what_lies_below_a_prefix_is_allowed(location: str, target: str) -> None:
    found = NAMED.find(location)
    assert isinstance(found, Url)
    assert found.target == target


@pytest.mark.parametrize(
    "location",
    [
        "",
        "a.png",
        "http://images.example/sets/a.png",
        "ftp://images.example/sets/a.png",
        "https://images.example/",
        "https://images.example/sets",
        "https://images.example/settings/a.png",
        "https://images.example:444/sets/a.png",
        "https://images.example.evil.example/sets/a.png",
        "https://evil.example/https://images.example/sets/a.png",
        "https://images.example@evil.example/sets/a.png",
        "https://evil.example#@images.example/sets/a.png",
        "https://evil.example\\@images.example/sets/a.png",
        "https://images.example/sets/../secret.png",
        "https://images.example/sets/%2e%2e/secret.png",
        "https://images.example/sets/%252e%252e/secret.png",
        "https://images.example/sets/%2e%2e%2fsecret.png",
        "https://images.example/sets/..%5csecret.png",
        "https://images.example/sets/./a.png",
        "https://images.example/sets/a.png\r\nHost: evil.example",
        "https://images.example/sets/a b.png",
        "https://images.example/sets/ä.png",
        "https://images.example:99999/sets/a.png",
        "https://[::1/sets/a.png",
        "https:///sets/a.png",
        "//images.example/sets/a.png",
        "/etc/passwd",
        "file:///etc/passwd",
        "https://images.example/sets/" + "a" * 5000,
    ],
)
def test_nothing_else_is(location: str) -> None:
    with pytest.raises(UserError):
        NAMED.find(location)


def test_files_below_a_directory_are_allowed_and_links_out_of_it_are_not(tmp_path: Path) -> None:
    shelf, secret = tmp_path / "shelf", tmp_path / "secret.png"
    shelf.mkdir()
    secret.write_bytes(b"s")
    (shelf / "a.png").write_bytes(b"a")
    (shelf / "link.png").symlink_to(secret)
    (shelf / "up").symlink_to(tmp_path)
    os.symlink("loop", shelf / "loop")
    locations = Locations.of([str(shelf)])
    assert locations.find(f"{shelf}/a.png") == shelf / "a.png"
    assert locations.find(f"file://{shelf}/a.png") == shelf / "a.png"
    for bad in ("link.png", "up/secret.png", "../secret.png", "loop", "../shelf2/a.png"):
        with pytest.raises(UserError, match="not fetched from"):
            locations.find(f"{shelf}/{bad}")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
        "::1", "::", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1",
        "2002:7f00:1::", "ff02::1",
    ],
)  # fmt: skip
def test_private_addresses_are_out_of_reach(address: str) -> None:
    assert not NAMED.is_reachable("images.example", ipaddress.ip_address(address))


def test_public_addresses_and_named_networks_are_in_reach() -> None:
    assert NAMED.is_reachable("images.example", ipaddress.ip_address("93.184.216.34"))
    inside = Locations.of(["https://images.internal/", "10.0.0.0/8"])
    assert inside.is_reachable("images.internal", ipaddress.ip_address("10.1.2.3"))
    assert not inside.is_reachable("images.internal", ipaddress.ip_address("192.168.0.1"))
    literal = Locations.of(["https://127.0.0.1:9/"])
    assert literal.is_reachable("127.0.0.1", ipaddress.ip_address("127.0.0.1"))


@pytest.mark.parametrize(
    "text", ["http://images.example/", "images", "../shelf", "https://", "https://a@b/", "1.2.3/8"]
)
def test_a_setting_that_names_no_location_is_refused_at_the_start(text: str) -> None:
    with pytest.raises(ConfigError):
        Locations.of(Settings.load({}, picture_locations=(text,)).picture_locations)


def test_by_default_no_location_is_allowed() -> None:
    assert not Locations.of(Settings().picture_locations)
