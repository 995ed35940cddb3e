"""Secrets and prompts are in no log, error, timeline or figure of a server at its most talkative.

Prompts are, in the log alone, if that is asked for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from litestar.testing import TestClient

from tests.contract.conftest import BASE, Api, House
from tests.contract.raw import Raw
from tests.contract.routes import belongings
from tests.service import Service, running
from tinsmith.api.app import build_app, with_edge
from tinsmith.api.services import Services
from tinsmith.config import Settings
from tinsmith.observe import logs as observe
from tinsmith.store.rows import NewOp
from tinsmith.types import OpId

WORD = "Zwitschermaschine"  # in what users write
TOKENS = [771, 313, 902, 177, 645]  # of a prompt
SECRETS = {
    "wrong key": "tml-Canary_wrong_key_0123456789",
    "odd key": "CanaryKeyWithoutAPrefix0123456789",
    "bearer": "CanaryBearer0123456789abcdef",
    "cookie": "CanaryCookie0123456789",
    "header": "CanaryHeader0123456789",
    "token": "eyJDYW5hcnki.eyJDYW5hcnkiOiIx.Q2FuYXJ5U2lnbmF0dXJl",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    flags = ("--device", "fake", "--log-level", "debug", "--jwt-auth")
    with running(tmp_path_factory.mktemp("canaries") / "data", *flags) as made:
        yield made


def speak(service: Service) -> list[str]:
    """All that a client says, rightly and wrongly; the secrets that came back. The answers that are errors are kept."""
    shown: list[str] = []
    errors: list[str] = []
    with closing(Raw(service.url, service.key)) as raw:
        ids = belongings(raw)
        token = raw.good("/auth/token", json={}).json()["jwt"]
        made = raw.good("/admin/keys", json={"name": "k"}).json()["secret"]
        place = f"/training_runs/{ids.run}/checkpoints/weights/kept"
        access = raw.good(f"{place}/access_token", json={}).json()["token"]
        link = raw.send("GET", f"{place}/archive", headers={"accept": "application/json"}).json()["url"]
        shown += [token, made, access, link.partition("signature=")[2], service.key]
        assert httpx.get(link).status_code == 200
        assert httpx.get(link + "0").status_code == 403
        sampler = {"sampling_session_id": ids.sampler, "seq_id": 7}
        prompt = {"chunks": [{"type": "encoded_text", "tokens": TOKENS}]}
        params = {"max_tokens": 2, "stop": [WORD]}
        raw.good("/asample", json={**sampler, "prompt": prompt, "sampling_params": params})
        chat = {"model": BASE, "max_tokens": 2, "messages": [{"role": "user", "content": f"Say {WORD}."}]}
        for path in ("/oai/api/v1/chat/completions", "/anthropic/api/v1/messages"):
            assert raw.send("POST", path, json=chat).status_code == 200
        bodies: list[tuple[str, Any]] = [
            ("/asample", {**sampler, "seq_id": 8, "prompt": {"chunks": [{"tokens": [*TOKENS, 10**9]}]}}),
            ("/asample", {**sampler, "seq_id": 9, "prompt": {"chunks": [{"tokens": TOKENS * 1000}]}}),
            ("/asample", {**sampler, "seq_id": 10, "prompt": WORD}),
            ("/oai/api/v1/chat/completions", {**chat, "messages": [{"role": "user", "content": {"x": WORD}}]}),
            ("/oai/api/v1/completions", {"model": BASE, "prompt": [[WORD]], "max_tokens": 1}),
            ("/create_session", {"tags": [WORD], "user_metadata": WORD}),
            ("/telemetry", {"events": [WORD], "session_id": 1}),
        ]
        for path, body in bodies:
            answer = raw.ask("POST", path, json=body)
            errors.append(repr(answer) if not isinstance(answer, httpx.Response) else answer.text)
        for content in (f'{{"prompt": "{WORD}"'.encode(), f'"{WORD}'.encode(), WORD.encode()):
            for path in ("/asample", "/optim_step", "/forward_backward", "/create_custom_loss"):
                errors.append(raw.send("POST", path, content=content, headers={"cookie": SECRETS["cookie"]}).text)
        trace = raw.send("GET", f"/sessions/{ids.session}/trace_export").json()["url"]
        errors.append(httpx.get(trace).content.decode("latin-1"))
        errors.append(raw.send("GET", "/admin/runs").text)
        figures = httpx.get(f"{service.url}/metrics", headers={"X-API-Key": service.key}).text
        assert "tinsmith_ops_total" in figures
        errors.append(figures)
    for headers in (
        {"X-API-Key": SECRETS["wrong key"]},
        {"X-API-Key": SECRETS["odd key"]},
        {"Authorization": f"Bearer {SECRETS['bearer']}"},
        {"Authorization": f"Basic {SECRETS['bearer']}"},
        {"X-API-Key": SECRETS["token"]},
        {"X-API-Key": service.key, "X-Request-Id": f"{SECRETS['header']} x", "X-Other": SECRETS["header"]},
    ):
        errors.append(httpx.get(f"{service.url}/api/v1/sessions/none", headers=headers).text)
    errors.append(httpx.get(f"{service.url}/api/v1/healthz", params={"key": SECRETS["odd key"]}).text)
    service.said = errors  # type: ignore[attr-defined]
    return shown


def test_nothing_that_is_a_users_alone_is_logged_or_repeated(service: Service) -> None:
    secrets = [*speak(service), *SECRETS.values()]
    log = service.log.read_text(encoding="utf-8").partition("ready after")[2]  # before it the first key is shown
    assert log.count('"path"') > 30, "debug lines are there"
    errors: list[str] = service.said  # type: ignore[attr-defined]
    for place, text in (("log", log), *(("answer", error) for error in errors)):
        for secret in secrets:
            assert secret not in text, (place, secret)
        for spelling in (str(TOKENS)[1:-1], ",".join(map(str, TOKENS))):
            assert spelling not in text, place
    assert WORD not in log
    assert not [error for error in errors if f"Say {WORD}" in error]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """What this process logs at debug, as a server would."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    with (tmp_path / "log").open("w+", encoding="utf-8") as out:
        observe.configure(Settings(log_level="debug", log_format="json"), "api", out)
        structlog.configure(cache_logger_on_first_use=False)
        yield lambda: (tmp_path / "log").read_text(encoding="utf-8") if out.flush() is None else ""
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        structlog.reset_defaults()


def make_sampler(api: Api) -> str:
    body = {"session_id": api.session(), "sampling_session_seq_id": 0, "base_model": BASE}
    return str(api.post("/create_sampling_session", body)["sampling_session_id"])


def asked_of(sampler: str) -> dict[str, Any]:
    prompt = {"chunks": [{"tokens": TOKENS}]}
    return {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt, "sampling_params": {"max_tokens": 1}}


def test_a_fault_of_ours_logs_no_payload(house: House, monkeypatch: pytest.MonkeyPatch, log: Callable[[], str]) -> None:
    """Tracebacks, and the database's own words about a statement, which would hold the values that it was given."""
    with TestClient(with_edge(build_app(house.services)), raise_server_exceptions=False) as client:
        api = Api(client, house.key)
        sampler = make_sampler(api)
        with house.store._database.write() as conn:
            conn.exec_driver_sql("ALTER TABLE sessions RENAME COLUMN tags TO labels")
        api.call("POST", "/create_session", 500, json={"tags": [WORD], "sdk_version": "t"})

        def fail(services: Services, new: NewOp) -> None:
            raise RuntimeError(f"a fault beside a payload of {len(new.payload or b'')} bytes")

        monkeypatch.setattr(Services, "enqueue", fail)
        api.call("POST", "/asample", 500, json=asked_of(sampler))
    said = log()
    assert "Traceback" in said
    assert "a fault beside" in said
    assert "no column named tags" in said
    assert WORD not in said
    assert str(TOKENS)[1:-1] not in said


@pytest.mark.parametrize("is_asked", [True, False])
def test_prompts_are_logged_on_request_alone(make_house: Any, log: Callable[[], str], is_asked: bool) -> None:
    house = make_house(log_prompts=is_asked)
    with TestClient(with_edge(build_app(house.services))) as client:
        api = Api(client, house.key)
        promise = api.post("/asample", asked_of(make_sampler(api)))
        assert house.store.ops.get(house.tenant_id, OpId(promise["request_id"])).payload
    assert (json.dumps(TOKENS) in log()) is is_asked
