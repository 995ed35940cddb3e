"""Requests drawn from our own OpenAPI document, good ones and spoiled ones, for every operation of a live server.

Answers have the documented status, media type and shape; none is a fault of ours, none lets the client wait, and every
error has a code that the page of errors lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import requests
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.generation.case import Case
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.contract.conftest import BASE, House
from tests.contract.depth import depth
from tests.contract.raw import PROTOBUF, Raw
from tests.contract.routes import Ids, belongings, closed_routes, training
from tests.contract.standing import standing
from tests.docs.test_errors_page import rows

WITHIN_S = 10.0  # on a busy machine
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
OPENAI_CODES = {"invalid_api_key", "model_not_found", "context_length_exceeded"}
OPEN = (
    "GET /api/v1/healthz",
    *(f"{method} /api/v1/downloads/{{run_id}}/{{kind}}/{{name}}/{{file}}" for method in ("GET", "HEAD")),
    *(f"{method} /hf/{{path}}" for method in ("GET", "HEAD")),
    "GET /api/v1/traces/{file}",
)
ENDS_ITS_KEY = "DELETE /api/v1/auth/apikey/me"
DESTRUCTIVE = re.compile(r"DELETE|/finish$")


def operations() -> list[str]:
    """ "METHOD path" of all that the document has to describe, from the route table."""
    closed = [re.sub(r"\{(\w+):\w+\}", r"{\1}", route) for route in closed_routes()]
    return sorted(
        [*OPEN, *(r if " /oai/" in r or " /anthropic/" in r else r.replace(" ", " /api/v1", 1) for r in closed)]
    )


class Edge:
    """A live server with a worker, its document, and a client of each kind."""

    def __init__(self, house: House, url: str) -> None:
        self.house, self.url = house, url
        self.raw = Raw(url, house.key)
        self.http = requests.Session()
        self.document = schemathesis.openapi.from_url(f"{url}/schema/openapi.json")
        self.shared = belongings(self.raw)
        archive = f"/training_runs/{self.shared.run}/checkpoints/external_weights/kept/archive"
        link = self.raw.send("GET", archive, headers={"accept": "application/json"}).json()["url"]
        self.links = {"link_query": dict(parse_qsl(urlsplit(link).query)), "seq_ids": count(50)}

    def close(self) -> None:
        self.raw.close()
        self.http.close()

    def call(self, case: Case) -> None:
        key = self.house.key
        if case.operation.label == ENDS_ITS_KEY:
            _, key = self.house.store.tenants.create_key(self.house.tenant_id, "short-lived")
        headers = {"X-API-Key": key}
        answer = case.call(
            base_url=self.url, session=self.http, headers=headers, timeout=WITHIN_S, allow_redirects=False
        )
        case.validate_response(answer, checks=CHECKS, headers=headers)
        if answer.status_code >= 400 and answer.content and b"try_again" not in answer.content:
            assert code_of(answer.json()) in {*rows(), *OPENAI_CODES}


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    limits = {"answer_hold_s": 2.0, "max_body_bytes": 1 << 20, "jwt_auth": True}
    with standing(tmp_path_factory.mktemp("document"), **limits) as (house, url), closing(Edge(house, url)) as edge:
        yield edge


@st.composite
def training_bodies(draw: st.DrawFn) -> bytes:
    """Good ones, and good ones that were cut or changed in one place."""
    body = training(draw(st.sampled_from(["x", "s1:train:0"])), draw(st.integers(1, 2**31 - 1)))
    at = draw(st.integers(0, len(body)))
    return draw(st.sampled_from([body, body[:at], body[:at] + draw(st.binary(max_size=8)) + body[at + 1 :]]))


schemathesis.openapi.media_type(PROTOBUF, training_bodies())


def test_the_document_describes_every_route(edge: Edge) -> None:
    described = {result.ok().label for result in edge.document.get_all_operations()}
    assert sorted(described) == operations()


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("label", operations())
def test_answers_are_as_documented(edge: Edge, label: str, mode: GenerationMode) -> None:
    operation = find(edge, label)
    if mode.is_negative and not (operation.body or operation.query):
        return  # any text will do in a path
    at = belongings(edge.raw) if DESTRUCTIVE.search(label) else edge.shared
    known = {**about(at), **edge.links}

    @settings(**depth())
    @given(case=operation.as_strategy(mode), knows_ids=st.booleans())
    def check(case: Case, knows_ids: bool) -> None:
        edge.call(with_known(case, known) if knows_ids else case)

    check()


def find(edge: Edge, label: str) -> APIOperation:
    method, _, path = label.partition(" ")
    return edge.document[path][method]


def about(at: Ids) -> dict[str, Any]:
    """By name of a parameter or field: what names the objects that are there, and values that are hard to guess."""
    return {
        "session_id": at.session,
        "model_id": at.run,
        "run_id": at.run,
        "sampling_session_id": at.sampler,
        "sampler_id": at.sampler,
        "request_id": at.sample,
        "tinker_path": at.path,
        "source_path": at.path,
        "model_path": at.sampler_path,
        "kind": "external_weights",
        "name": "kept",
        "base_model": BASE,
        "model": BASE,
        "messages": [{"role": "user", "content": "Hi"}],
        "starting_on": "2026-01-01T00:00:00Z",
        "ending_before": "2026-01-02T00:00:00Z",
        "path": f"{BASE}/resolve/main/tokenizer.json",
        "file": "archive.tar",
    }


def with_known(case: Case, known: dict[str, Any]) -> Case:
    """The case about objects that are there."""
    for place in (case.path_parameters, case.query, case.body):
        if isinstance(place, dict):
            place.update({name: known[name] for name in place if name in known})
    if isinstance(case.body, bytes):
        case.body = training(known["run_id"], next(known["seq_ids"]))
    if "/downloads/" in case.path:
        case.query = dict(known["link_query"])
    return case


def code_of(problem: dict[str, Any]) -> str:
    inner = problem.get("error")
    return str((inner if isinstance(inner, dict) else problem)["code"])
