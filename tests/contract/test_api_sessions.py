"""Sessions over HTTP: projects, search page by page, the end by silence, and the timeline as a Perfetto trace."""

from __future__ import annotations

import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as perfetto_pb

from tests.contract.test_api_usage import train
from tinsmith.api.sessions import FINISH_PAUSE_S
from tinsmith.api.timeline import lanes, write_trace
from tinsmith.api.tokens import user_urn
from tinsmith.store.usage_rows import SharedStep, TracedOp
from tinsmith.types import OpId, OpKind, OpState, RunStatus

BEGIN, END = 1, 2


def make(api: Any, name: str, **changes: Any) -> str:
    return str(api.post("/create_session", {"display_name": name, **changes})["session_id"])


def found(api: Any, **asked: Any) -> list[str]:
    return [session["session_id"] for session in api.post("/sessions/search", asked)["sessions"]]


def test_search_by_what_a_session_is_called_and_holds(house: Any, api: Any, other: Any) -> None:
    night = make(api, "Nightly DPO run", user_metadata={"team": "a", "x.y": "1"}, project_id="p1")
    day = make(api, "daily 100% run", user_metadata={"team": "b"})
    theirs = make(other, "nightly")
    assert found(api) == [day, night]
    assert found(api, display_name="RUN nightly") == [night]
    assert found(api, display_name="100%") == [day]
    assert found(api, display_name="0_%") == []
    assert found(api, display_name="daily", session_id=night) == [day, night]
    assert found(api, session_id=theirs) == []
    assert found(api, user_metadata={"team": "a", "x.y": "1"}) == [night]
    assert found(api, user_metadata={"team": "a", "x.y": "2"}) == []
    assert found(api, project_ids=["p1", "p2"]) == [night]
    assert found(api, project_ids=[""]) == [day]
    assert found(api, project_ids=[]) == []
    assert found(api, owner={"type": "accessible"}) == [day, night]
    assert found(api, owner={"type": "user", "owner_urns": [user_urn(house.tenant_id)]}) == [day, night]
    assert found(api, owner={"type": "user", "owner_urns": ["somebody"]}) == []
    for key in ('a"b', "a\\b", "a\0b", "\0"):
        assert "quotes" in api.post("/sessions/search", {"user_metadata": {key: "1"}}, 400)["detail"]
    (summary,) = api.post("/sessions/search", {"session_id": night})["sessions"]
    assert summary | {"created_at": ""} == {
        "session_id": night,
        "created_at": "",
        "owner": user_urn(house.tenant_id),
        "project_id": "p1",
        "checkpoints_count": 0,
        "checkpoint_storage_bytes": 0,
        "status": {"type": "active"},
        "display_name": "Nightly DPO run",
        "user_metadata": {"team": "a", "x.y": "1"},
    }


def test_names_are_found_in_any_case_of_any_script(api: Any) -> None:
    first, second, _ = make(api, "Größe ÜBUNG eins"), make(api, "ΟΔΟΣ Ночь e\u0301t\u00e9"), make(api, "other")
    for asked in ("übung", "ÜBUNG größe", "GRÖSSE", "u\u0308bung", "eins"):
        assert found(api, display_name=asked) == [first], asked
    for asked in ("οδος", "ночь", "\u00c9TE\u0301", "ΟΔΟΣ"):
        assert found(api, display_name=asked) == [second], asked
    assert found(api, display_name="x\0") == []
    for asked in (" ", "\t\n", "\u3000"):
        assert "is blank" in api.post("/sessions/search", {"display_name": asked}, 400)["detail"]


def test_search_by_status(house: Any, api: Any) -> None:
    active, good, bad, silent = (make(api, name) for name in ("active", "good", "bad", "silent"))
    api.post(f"/sessions/{good}/finish", {"reason": {"type": "success"}})
    api.post(f"/sessions/{bad}/finish", {"reason": {"type": "errored"}, "detail": "why"})
    later = time.time() + 100
    for session in (active, good, bad):
        if session == active:
            house.store.sessions.beat(house.tenant_id, session, later)
    assert house.store.sessions.expire(time.time() + 1, later) == [silent]
    assert found(api, statuses=[{"type": "active"}]) == [active]
    assert found(api, statuses=[{"type": "client_finished"}]) == [bad, good]
    assert found(api, statuses=[{"type": "client_finished", "reasons": ["errored"]}, {"type": "active"}]) == [
        bad,
        active,
    ]
    assert found(api, statuses=[{"type": "failed"}, {"type": "cancelled"}]) == []
    by_id = {s["session_id"]: s.get("status") for s in api.post("/sessions/search", {})["sessions"]}
    assert by_id[bad] == {"type": "client_finished", "reason": {"type": "errored"}, "detail": "why"}
    assert by_id[silent] is None
    api.post("/session_heartbeat", {"session_id": silent}, 410)
    api.post("/create_model", {"session_id": silent, "model_seq_id": 0, "base_model": "tinsmith/tiny"})


def test_pages_follow_one_another_without_gap_or_overlap(house: Any, api: Any) -> None:
    """Also where many sessions began at one moment, and while new ones come."""
    moment = time.time() - 50
    made = {house.store.sessions.create(house.tenant_id, now=moment + (i // 5) * 1e-7).session_id for i in range(23)}
    seen: list[str] = []
    cursor = None
    while True:
        page = api.post("/sessions/search", {"limit": 4, **({"cursor": cursor} if cursor else {})})
        seen += [session["session_id"] for session in page["sessions"]]
        cursor = page.get("next_cursor")
        if cursor is None:
            break
        make(api, "later")
    assert len(seen) == 23
    assert set(seen) == made


def test_pages_of_the_list(api: Any) -> None:
    made = [make(api, name) for name in "abcde"][::-1]
    pages = [api.get("/sessions", params={"limit": 2, "offset": at})["sessions"] for at in (0, 2, 4, 6)]
    assert pages == [made[:2], made[2:4], made[4:], []]


@pytest.mark.parametrize(
    "asked",
    [
        {"limit": 0},
        {"limit": 201},
        {"statuses": []},
        {"statuses": [{"type": "asleep"}]},
        {"owner": {"type": "user", "owner_urns": []}},
        {"display_name": ""},
        {"cursor": {"last_created_at": "2026-01-01T00:00:00", "last_session_id": "s"}},
    ],
)
def test_bad_searches(api: Any, asked: dict[str, Any]) -> None:
    assert api.post("/sessions/search", asked, 400)["code"] == "invalid_request"


def test_runs_of_a_project(api: Any, worker: Any) -> None:
    first, second = make(api, "a", project_id="p1"), make(api, "b")
    runs = [api.create(session)["model_id"] for session in (first, second)]
    assert [run["training_run_id"] for run in api.get("/training_runs", params={"project_id": "p1"})[
        "training_runs"
    ]] == runs[:1]  # fmt: skip
    api.call("PUT", f"/sessions/{second}/project", 204, json={"project_id": "p1"})
    listed = api.get("/training_runs", params={"project_id": "p1", "limit": 1})
    assert [run["training_run_id"] for run in listed["training_runs"]] == runs[1:]
    assert listed["cursor"] == {"offset": 0, "limit": 1, "total_count": 2}
    for body in ({"project_id": ""}, {}, {"project_id": "x" * 513}):
        api.call("PUT", f"/sessions/{second}/project", 400, json=body)


@pytest.mark.parametrize("path", ["/sessions", "/sessions/{session}", "/training_runs", "/training_runs/{run}"])
def test_access_scopes(api: Any, worker: Any, path: str) -> None:
    session = make(api, "a")
    place = path.format(session=session, run=api.create(session)["model_id"])
    assert api.get(place, params={"access_scope": "owned"}) == api.get(place, params={"access_scope": "accessible"})
    assert "access_scope" in api.get(place, 400, params={"access_scope": "everybody's"})["detail"]


def read_trace(body: bytes) -> tuple[dict[int, str], dict[int, list[Any]]]:
    """(names of the tracks, events of each track in order), as Perfetto's own definitions read them."""
    trace = perfetto_pb.Trace.FromString(body)
    names, events = {}, defaultdict(list)
    for packet in trace.packet:
        if packet.HasField("track_descriptor"):
            names[packet.track_descriptor.uuid] = packet.track_descriptor.name
        else:
            events[packet.track_event.track_uuid].append((packet.timestamp, packet.track_event))
    return names, dict(events)


def args_of(event: Any) -> dict[str, Any]:
    return {a.name: a.string_value or a.int_value for a in event.debug_annotations}


def test_the_trace_shows_who_shared_the_pass(api: Any, other: Any, worker: Any, anonymous: Any) -> None:
    session, theirs = make(api, "mine"), make(other, "theirs")
    runs = [api.create(session, seq)["model_id"] for seq in (0, 1)]
    foreign = other.create(theirs)["model_id"]
    worker.step()
    for caller, run in ((api, runs[0]), (api, runs[1]), (other, foreign)):
        train(caller, run, 1, num_tokens=4)
    worker.step()
    train(api, runs[0], 2)
    export = api.get(f"/sessions/{session}/trace_export")
    assert export["status"] == "ready"
    response = anonymous.raw("GET", export["url"].partition("testserver.local")[2])
    assert response.status_code == 200
    assert int(response.headers["content-length"]) == len(response.content)
    assert foreign not in response.text
    assert theirs not in response.text
    names, events = read_trace(response.content)
    assert sorted(names.values()) == sorted(["session mine", "passes of hand", *runs])
    for track, of_track in events.items():
        times = [at for at, _ in of_track]
        assert times == sorted(times)
        depth = 0
        for _, event in of_track:
            depth += 1 if event.type == BEGIN else -1
            assert depth >= 0
        is_waiting = names[track] == runs[0]
        assert depth == (2 if is_waiting else 0), "only the request that waits goes on"
    passes = next(events[track] for track, name in names.items() if name.startswith("passes"))
    assert passes[0][1].name == "pass of 3 requests"
    shared = {"requests_together": 3, "runs_together": 3, "tokens_together": 12}
    assert args_of(passes[0][1]).items() >= {**shared, "other_runs": 1}.items()
    flows = set()
    for run, mate in (runs, runs[::-1]):
        of_run = next(events[track] for track, name in names.items() if name == run)
        begun = [event for _, event in of_run if event.type == BEGIN]
        assert [event.name for event in begun[:6]] == [
            "create 0", "queued", "running", "forward_backward 1", "queued", "running",
        ]  # fmt: skip
        assert args_of(begun[5]).items() >= {**shared, "with_runs_of_this_session": mate}.items()
        assert args_of(begun[3])["request_id"].startswith("req-")
        flows |= set(begun[5].flow_ids)
    assert len(flows) == 1


def test_a_trace_link_is_for_one_session_and_an_hour(
    house: Any, api: Any, other: Any, anonymous: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = make(api, "mine"), make(other, "theirs")
    url = api.get(f"/sessions/{mine}/trace_export")["url"].partition("testserver.local")[2]
    parts = urlsplit(url)
    query = {key: values[0] for key, values in parse_qs(parts.query).items()}
    assert anonymous.raw("GET", url).status_code == 200
    assert house.tenant_id not in url
    other.get(f"/sessions/{mine}/trace_export", 404)
    changed: list[tuple[str, dict[str, str]]] = [
        (parts.path.replace(mine, theirs), query),
        (parts.path, {**query, "expires": str(int(query["expires"]) + 1)}),
        (parts.path, {**query, "key": house.store.tenants.list_keys()[-1].key_id}),
        (parts.path, {**query, "signature": "0" * 64}),
    ]
    for path, params in changed:
        assert anonymous.raw("GET", path, params=params).status_code == 403
    key, secret = house.store.tenants.create_key(house.tenant_id, "short-lived")
    export = api.get(f"/sessions/{mine}/trace_export", headers={"X-API-Key": secret})
    lent = export["url"].partition("testserver.local")[2]
    assert anonymous.raw("GET", lent).status_code == 200
    house.store.tenants.revoke_key(key.key_id)
    assert "was revoked" in anonymous.raw("GET", lent).json()["detail"]
    now = time.time()
    monkeypatch.setattr("tinsmith.api.traces.time.time", lambda: now + 3601)
    assert anonymous.raw("GET", url).status_code == 410


def test_the_answer_to_the_end_of_a_session_comes_after_those_to_its_polls(api: Any) -> None:
    """The SDK on Python 3.11 waits for ever if it closes in the moment in which the answer to a poll arrives."""
    session = make(api, "ends")
    begun_at = time.monotonic()
    api.post(f"/sessions/{session}/finish", {"reason": {"type": "success"}})
    assert time.monotonic() - begun_at >= FINISH_PAUSE_S > 0


def traced(seq: int, created: float, started: float | None, finished: float | None) -> TracedOp:
    state = OpState.QUEUED if started is None else OpState.RUNNING if finished is None else OpState.DONE
    return TracedOp(
        OpId(f"req-{seq}"), OpKind.FORWARD, "b", "s:train:0", seq, state, 7, 1, "w", created, started, finished, None
    )


def test_requests_that_overlap_lie_in_lanes_of_their_own() -> None:
    ops = [traced(1, 0, 1, 5), traced(2, 2, 6, 8), traced(3, 5, 9, 10), traced(4, 7, None, None), traced(5, 11, 12, 13)]
    assert [[op.seq_id for op in lane] for lane in lanes(ops)] == [[1, 3, 5], [2], [4]]
    names, events = read_trace(write_trace("t", ops, {("w", 1, "pass"): SharedStep(1, 1, 7)}))
    assert sorted(names.values()) == ["passes of w", "s:train:0", "s:train:0", "s:train:0", "t"]
    running = {
        (at, later)
        for of_track in events.values()
        for (at, event), (later, _) in pairwise(of_track)
        if event.name == "running"
    }
    assert running == {(int(a * 1e9), int(b * 1e9)) for a, b in [(1, 5), (6, 8), (9, 10), (12, 13)]}


def test_a_trace_takes_time_in_proportion_to_its_requests() -> None:
    def cost_s(count: int, step: float | None) -> float:
        waiting = [traced(i, i, step, None) for i in range(count)]
        shared = {} if step is None else {("w", step, "pass"): SharedStep(count, 1, count)}
        started = time.perf_counter()
        assert len(write_trace("t", waiting, shared)) < 1000 * count
        return time.perf_counter() - started

    for step in (None, 1e6):
        cost_s(500, step)
        assert cost_s(8000, step) < 16 * 3 * min(cost_s(500, step) for _ in range(3)) + 0.5


def test_a_slice_names_some_of_many_runs_beside_it() -> None:
    ops = [replace(traced(i, 0, 1, 2), place=f"s:train:{i:03}") for i in range(200)]
    _, events = read_trace(write_trace("t", ops, {("w", 1, "pass"): SharedStep(200, 200, 7)}))
    named = [args_of(event).get("with_runs_of_this_session", "") for track in events.values() for _, event in track]
    assert {name.count("s:train") for name in named} == {0, 16}
    assert all(name.endswith(" and 183 more") for name in named if name)


def test_a_long_trace_is_cut_and_says_so(
    house: Any, api: Any, worker: Any, anonymous: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinsmith.api.traces.MAX_REQUESTS", 3)
    session = make(api, "mine")
    run = api.create(session)["model_id"]
    worker.step()
    for seq in (1, 2, 3):
        train(api, run, seq)
    url = api.get(f"/sessions/{session}/trace_export")["url"].partition("testserver.local")[2]
    names, events = read_trace(anonymous.raw("GET", url).content)
    assert "session mine (its newest 3 requests; older ones are left out)" in names.values()
    begun = [event.name for track in events.values() for _, event in track]
    assert "create 0" not in begun
    assert {"forward_backward 1", "forward_backward 3"} <= set(begun)


def test_many_who_fetch_a_trace_at_once_cost_one(
    house: Any, api: Any, anonymous: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = [make(api, name) for name in ("a", "b")]
    urls = [api.get(f"/sessions/{id_}/trace_export")["url"].partition("testserver.local")[2] for id_ in sessions]
    made, busy = [], []

    def ops(tenant_id: str, session_id: str, limit: int) -> list[TracedOp]:
        busy.append(1)
        made.append((session_id, len(busy)))
        time.sleep(0.2)
        busy.pop()
        return []

    monkeypatch.setattr(house.store.traces, "ops", ops)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: anonymous.raw("GET", urls[i % 2]), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert sorted(made) == sorted((session, 1) for session in sessions)
    now = time.monotonic()
    monkeypatch.setattr("tinsmith.api.once.time.monotonic", lambda: now + 6)
    anonymous.raw("GET", urls[0])
    assert len(made) == 3


def test_a_run_that_was_given_up_is_listed_as_corrupted(house: Any, api: Any, worker: Any) -> None:
    run = api.create(make(api, "a"))["model_id"]
    worker.step()
    assert api.get(f"/training_runs/{run}").get("corrupted", False) is False
    house.store.runs.set_status(worker._me, run, RunStatus.CORRUPTED)
    assert api.get(f"/training_runs/{run}")["corrupted"] is True
