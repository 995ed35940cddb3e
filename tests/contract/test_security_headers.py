"""What every answer bears for browsers and caches, by whichever way it came; the bound on unknown keys over HTTP."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.contract.conftest import House
from tests.contract.raw import Raw
from tests.contract.routes import closed_routes, concrete
from tests.contract.standing import standing

EVERY = {"x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer"}
DATA = "default-src 'none'; frame-ancestors 'none'"


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, str]]:
    with standing(tmp_path_factory.mktemp("headers"), unknown_keys_per_minute=30) as made:
        yield made


def test_answers_are_not_kept_framed_or_sniffed(stand: tuple[House, str]) -> None:
    with closing(Raw(stand[1], stand[0].key)) as raw:
        for route in closed_routes():
            if route == "DELETE /auth/apikey/me":
                continue
            method, path = concrete(route)
            answer = raw.send(method, path, content=b"{}")
            assert EVERY.items() <= dict(answer.headers).items(), route
            assert answer.headers["content-security-policy"] == DATA, route
            assert answer.headers["cache-control"] in ("no-store", "private, no-store", "no-cache"), route
            assert "strict-transport-security" not in answer.headers, route


def test_the_express_lane_says_the_same(stand: tuple[House, str]) -> None:
    with closing(Raw(stand[1], stand[0].key)) as raw:
        raw.send("GET", "/sessions")
        fast = raw.send("POST", "/retrieve_future", json={"request_id": "req-0"})
        assert EVERY.items() <= dict(fast.headers).items()
        assert (fast.headers["content-security-policy"], fast.headers["cache-control"]) == (DATA, "no-store")


def test_the_page_runs_files_of_this_server_alone(stand: tuple[House, str]) -> None:
    page = httpx.get(f"{stand[1]}/schema")
    assert page.headers["content-type"].startswith("text/html")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert not re.findall(r"<script(?![^>]*\ssrc=)[^>]*>", page.text)
    assert not re.findall(r"\son\w+=", page.text)
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) == 5
    for path in loaded:
        assert path.startswith("/schema/assets/")
        assert httpx.get(stand[1] + path).status_code == 200
    start = httpx.get(f"{stand[1]}/schema/assets/start.js").text
    assert httpx.get(stand[1] + re.findall(r'url: "([^"]+)"', start)[0]).json()["openapi"]


def test_many_unknown_keys_are_told_to_wait_and_good_ones_go_on(stand: tuple[House, str]) -> None:
    house, url = stand

    def ask(secret: str) -> Any:
        return httpx.get(f"{url}/api/v1/sessions", headers={"X-API-Key": secret})

    assert ask(house.key).status_code == 200
    answers = [ask(f"tml-guess{number}") for number in range(60)]
    assert [answer.status_code for answer in answers[:20]] == [401] * 20
    late = answers[-1]
    assert (late.status_code, late.json()["code"], late.json()["category"]) == (
        429,
        "too_many_unknown_keys",
        "capacity",
    )
    assert int(late.headers["retry-after"]) > 0
    assert ask(house.key).status_code == 200
    elsewhere = [httpx.get(f"{url}/oai/api/v1/models", headers={"X-API-Key": f"tml-{n}"}) for n in range(5)]
    assert 429 in {answer.status_code for answer in elsewhere}


def test_an_address_is_believed_from_this_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says, which uvicorn reads when it isn't told."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    with standing(tmp_path, unknown_keys_per_minute=10) as (_, url):

        def statuses(own_address: str) -> list[int]:
            with httpx.Client(transport=httpx.HTTPTransport(local_address=own_address)) as client:
                tries = [
                    {"X-API-Key": f"tml-{own_address}-{number}", "X-Forwarded-For": f"203.0.113.{number}"}
                    for number in range(40)
                ]
                return [client.get(f"{url}/api/v1/sessions", headers=headers).status_code for headers in tries]

        assert set(statuses("127.0.0.1")) == {401}
        assert statuses("127.0.0.2")[-1] == 429


@pytest.mark.parametrize(
    "host", [b"x:99999", b": */*", b"x:y", b"[::1", b"\xff\xfe", b"a b", b"x/y@z#?", b"[::1]:99999", b"x" * 300]
)
def test_a_host_that_is_none_is_refused_without_a_fault(stand: tuple[House, str], host: bytes) -> None:
    parts = urlsplit(stand[1])
    with socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=20) as sock:
        sock.sendall(b"GET /api/v1/sessions HTTP/1.1\r\nhost: " + host + b"\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_every_kind_of_host_is_answered(stand: tuple[House, str]) -> None:
    for host in ("localhost", "my_service:8000", "10.0.0.1:80", "[::1]:8000", "[::1]", "a-b.example.org."):
        assert httpx.get(f"{stand[1]}/schema", headers={"Host": host}).status_code == 200
