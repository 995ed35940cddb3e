"""The ledger over HTTP: what is metered, for whom, in which hour; what checkpoints take; the audit log."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from tests.contract.raw import PROTOBUF
from tinsmith.api.billing import storage_by_hour
from tinsmith.errors import TooLargeError
from tinsmith.store.usage_rows import StoredSpan, Usage
from tinsmith.types import TenantId
from tinsmith.wire import wire_pb2 as pb

HOUR_S = 3600


def window(hours: int = 1) -> dict[str, str]:
    """The hours up to now, the running one included."""
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    return {"starting_on": (end - timedelta(hours=hours + 1)).isoformat(), "ending_before": end.isoformat()}


def usage(api: Any, **changes: str) -> Any:
    return api.get("/billing/usage/events", params={**window(), **changes})


def totals(answer: Any) -> dict[str, float]:
    sums: dict[str, float] = {}
    for event in answer["data"]:
        info = event["event_info"]
        kind = info["type"] + ("_cached" if info.get("cached") else "")
        amount = info.get("token_count") or info.get("count") or info.get("gigabyte_hours")
        sums[kind] = sums.get(kind, 0) + amount
    return sums


def train(api: Any, run: str, seq_id: int, num_tokens: int = 6) -> Any:
    request = pb.ForwardBackwardRequest(model_id=run, seq_id=seq_id, loss_fn="cross_entropy")
    datum = request.data.add()
    datum.model_input.add().encoded_text.tokens = np.arange(1, num_tokens + 1, dtype="<i4").tobytes()
    target = datum.loss_fn_inputs["target_tokens"]
    target.dense, target.dtype = np.arange(1, num_tokens + 1, dtype="<i8").tobytes(), pb.DT_I64
    target.shape.append(num_tokens)
    headers = {"content-type": PROTOBUF}
    return api.call("POST", "/forward_backward", 200, content=request.SerializeToString(), headers=headers)


@pytest.fixture
def used(api: Any, worker: Any) -> dict[str, str]:
    """A session with a run that was trained twice, saved and sampled; one of its requests was a bad one."""
    session = api.session()
    run = api.create(session)["model_id"]
    worker.step()
    train(api, run, 1)
    train(api, run, 2, num_tokens=4)
    api.post("/save_weights", {"model_id": run, "seq_id": 3, "path": "kept"})
    api.post("/optim_step", {"model_id": run, "seq_id": 4, "adam_params": {"learning_rate": -1}})
    sampler = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tinsmith/tiny"}
    sampler_id = api.post("/create_sampling_session", sampler)["sampling_session_id"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3, 4, 5]}]}
    sample = {"sampling_session_id": sampler_id, "seq_id": 0, "prompt": prompt, "sampling_params": {"max_tokens": 3}}
    api.post("/asample", sample)
    api.post("/asample", sample)
    while worker.step():
        pass
    return {"session": session, "run": run}


def test_usage_by_kind_run_and_session(api: Any, used: dict[str, str]) -> None:
    answer = usage(api)
    found = totals(answer)
    assert found.pop("storage") > 0
    assert found == {"training": 10, "checkpoint": 1, "sampling_prefill": 5, "sampling_sample": 3}
    assert answer["sessions"] == {used["session"]: {"user_metadata": {"a": "1"}}}
    for event in answer["data"]:
        is_sampled = event["event_info"]["type"].startswith("sampling")
        assert event["training_run_id"] == (None if is_sampled else used["run"])
        assert (event["session_id"], event["base_model"]) == (used["session"], "tinsmith/tiny")
        assert event["user_name"] == "alice"
        start, end = (datetime.fromisoformat(event[key]) for key in ("bucket_start", "bucket_end"))
        assert end - start == timedelta(hours=1)
        assert (start.minute, start.second) == (0, 0)
    assert answer["cost_data_through"] is None
    assert {event["estimated_cost_usd"] for event in answer["data"]} == {None}


def test_a_tenant_sees_its_own_and_an_administrator_all(api: Any, other: Any, used: dict[str, str]) -> None:
    """alice holds an administrator's key, bob does not."""
    assert usage(other)["data"] == []
    assert other.get("/billing/usage/checkpoints/current")["data"] == []
    other.post("/create_session", {})
    assert {event["user_name"] for event in usage(api)["data"]} == {"alice"}


def test_what_is_recorded_again_is_not_metered_again(house: Any, api: Any, worker: Any, used: dict[str, str]) -> None:
    before = house.store.ledger.usage(None, 0, 2**40, 100)
    ops = [op for op in worker.seen if op.kind.is_pass]
    outcomes = [worker._outcome(op) for op in ops]
    assert house.store.ops.finish(worker._me, outcomes, time.time()) == []
    assert house.store.ledger.usage(None, 0, 2**40, 100) == before


def test_the_project_of_usage_is_that_of_the_session_now(api: Any, used: dict[str, str]) -> None:
    assert {event["project_id"] for event in usage(api)["data"]} == {None}
    api.call("PUT", f"/sessions/{used['session']}/project", 204, json={"project_id": "alpha"})
    assert {event["project_id"] for event in usage(api)["data"]} == {"alpha"}
    assert [item["project_id"] for item in api.get("/billing/usage/checkpoints/current")["data"]] == ["alpha"]
    assert api.get("/billing/usage/checkpoints/current", params={"project_id": "beta"})["data"] == []


def test_what_checkpoints_take_now(api: Any, used: dict[str, str]) -> None:
    (checkpoint,) = api.get(f"/training_runs/{used['run']}/checkpoints")["checkpoints"]
    (item,) = api.get("/billing/usage/checkpoints/current")["data"]
    size = checkpoint["size_bytes"]
    assert (item["checkpoint_count"], item["size_bytes"], item["user_name"]) == (1, size, "alice")
    assert item["size_gigabytes"] == pytest.approx(size / 1e9)
    api.call("DELETE", f"/training_runs/{used['run']}/checkpoints/weights/kept", 204)
    assert api.get("/billing/usage/checkpoints/current")["data"] == []


def test_a_checkpoints_storage_ends_with_it(house: Any, api: Any, worker: Any, used: dict[str, str]) -> None:
    def spans() -> list[StoredSpan]:
        return house.store.ledger.spans(house.tenant_id, 0.0, 1e12, 10)

    (open_span,) = spans()
    assert open_span.until is None
    api.call("PUT", f"/training_runs/{used['run']}/checkpoints/weights/kept/ttl", 204, json={"ttl_seconds": 500})
    assert spans()[0].until == pytest.approx(time.time() + 500, abs=5)
    api.post("/save_weights", {"model_id": used["run"], "seq_id": 5, "path": "kept", "overwrite": True})
    worker.step()
    replaced, current = spans()
    assert replaced.until == current.since
    assert current.until is None
    api.call("DELETE", f"/training_runs/{used['run']}/checkpoints/weights/kept", 204)
    assert [span.until is not None and span.until <= time.time() for span in spans()] == [True, True]


def test_storage_is_the_overlap_of_life_and_hour() -> None:
    def span(since: float, until: float | None, run: str = "r", size: int = 2 * 10**9) -> StoredSpan:
        return StoredSpan(TenantId("t"), "t", "s", None, {}, run, "b", size, since, until)

    hour = 100 * HOUR_S
    spans = [span(hour - 10 * HOUR_S, hour + 900), span(hour + 1800, None, size=10**9), span(hour, hour + 36, "other")]
    found = {(at, s.run_id): gb_h for at, s, gb_h in storage_by_hour(spans, hour, hour + 2 * HOUR_S, 100)}
    assert found == {
        (hour, "r"): pytest.approx(2 * 0.25 + 1 * 0.5),
        (hour + HOUR_S, "r"): pytest.approx(1.0),
        (hour, "other"): pytest.approx(2 * 0.01),
    }
    with pytest.raises(TooLargeError):
        storage_by_hour([span(0.0, None)], 0, 1000.0 * HOUR_S, 99)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"starting_on": "2026-01-01T00:30:00Z"}, "full hour"),
        ({"starting_on": "yesterday"}, "2026-01-31T13:00:00Z"),
        ({"starting_on": "0001-01-01T00:00:00Z"}, "full hour"),
        ({"ending_before": "9999-12-31T23:00:00Z"}, "full hour"),
        ({"starting_on": "2020-01-01T00:00:00Z"}, "14 days"),
        ({"starting_on": "2999-01-01T00:00:00Z", "ending_before": "2999-01-02T00:00:00Z"}, "future"),
        ({"ending_before": "1990-01-01T00:00:00+01:00"}, "after"),
    ],
)
def test_bad_windows(api: Any, changes: dict[str, str], word: str) -> None:
    assert word in api.get("/billing/usage/events", 400, params={**window(), **changes})["detail"]


def test_cached_prompt_tokens_are_told_apart(api: Any, worker: Any, used: dict[str, str]) -> None:
    finish = worker._outcome

    def cached(op: Any) -> Any:
        return replace(finish(op), usage=Usage(prefill_tokens=4, cached_tokens=9, sampled_tokens=1))

    before = totals(usage(api))
    worker._outcome = cached
    made = {"session_id": used["session"], "sampling_session_seq_id": 7, "base_model": "tinsmith/tiny"}
    sampler = api.post("/create_sampling_session", made)["sampling_session_id"]
    body = {"prompt": {"chunks": [{"tokens": list(range(1, 14))}]}, "sampling_params": {"max_tokens": 1}}
    api.post("/asample", {"sampling_session_id": sampler, "seq_id": 0, **body})
    worker.step()
    after = totals(usage(api))
    assert after["sampling_prefill_cached"] == 9
    assert after["sampling_prefill"] - before["sampling_prefill"] == 4


def audit(api: Any, **params: str) -> list[Any]:
    return list(api.get("/audit", params=params)["entries"])


def test_every_administrative_act_is_in_the_audit_log(api: Any, other: Any, used: dict[str, str]) -> None:
    run = used["run"]
    made = api.post("/admin/keys", {"name": "ci", "tenant": "carol"})
    api.call("DELETE", f"/admin/keys/{made['key_id']}", 200)
    api.call("DELETE", f"/admin/keys/{made['key_id']}", 200)
    api.call("PUT", f"/sessions/{used['session']}/project", 204, json={"project_id": "alpha"})
    api.call("PUT", f"/training_runs/{run}/checkpoints/weights/kept/ttl", 204, json={"ttl_seconds": None})
    api.call("DELETE", f"/training_runs/{run}/checkpoints/weights/kept", 204)
    other.call("DELETE", "/auth/apikey/me", 204)
    entries = audit(api)
    assert [entry["event"] for entry in entries] == [
        "organization_create", "organization_create", "organization_key_create", "organization_key_create",
        "organization_create", "organization_key_create", "organization_key_revoke", "project_session_set",
        "checkpoint_ttl_set", "checkpoint_delete", "organization_key_revoke",
    ]  # fmt: skip
    actors = [entry["event_details"]["actor"] for entry in entries]
    assert actors == ["server"] * 4 + ["alice"] * 6 + ["bob"]
    path = f"tinker://{run}/weights/kept"
    assert entries[-2]["tinker_path"] == entries[-2]["event_details"]["tinker_path"] == path
    assert entries[-2]["model_id"] == run
    assert entries[-4]["event_details"]["project_id"] == "alpha"
    assert entries[5]["event_details"]["key_id"] == made["key_id"]
    assert made["secret"] not in str(entries)
    kinds = {kind: len(audit(api, event_type=kind)) for kind in ("checkpoints", "projects", "teams", "organizations")}
    assert kinds == {"checkpoints": 2, "projects": 1, "teams": 0, "organizations": 8}


def test_sharing_is_in_the_audit_log(api: Any, other: Any, used: dict[str, str]) -> None:
    place, path = f"/training_runs/{used['run']}/checkpoints/weights/kept", f"tinker://{used['run']}/weights/kept"
    api.call("POST", f"{place}/publish", 204)
    copied = other.post("/copy_weights", {"source_path": path, "destination_project_id": "p"})["tinker_path"]
    api.call("DELETE", f"{place}/publish", 204)
    entries = [(entry["event"], entry["tinker_path"], entry["event_details"]) for entry in audit(api)[-3:]]
    assert [event for event, _, _ in entries] == ["checkpoint_publish", "checkpoint_copy", "checkpoint_unpublish"]
    assert [tinker_path for _, tinker_path, _ in entries] == [path, copied, path]
    assert [details["actor"] for _, _, details in entries] == ["alice", "bob", "alice"]
    assert entries[1][2]["source"] == path
    assert {entry["event"] for entry in audit(other, event_type="checkpoints")} == {"checkpoint_copy"}


def test_the_audit_log_of_a_day_and_a_tenant(api: Any, other: Any, used: dict[str, str]) -> None:
    today = datetime.now(UTC).date()
    assert audit(api, day=today.isoformat()) == audit(api)
    assert audit(api, day=(today - timedelta(days=1)).isoformat()) == []
    mine = audit(other)
    assert {entry["event_details"]["organization"] for entry in mine} == {"bob"}
    assert len(mine) == 2
    for day in ("today", "9999-12-31", "2026-02-30"):
        assert "2026-01-31" in api.get("/audit", 400, params={"day": day})["detail"]
    api.get("/audit", 400, params={"event_type": "users"})


def test_no_act_can_be_pushed_out_of_the_audit_log(
    api: Any, other: Any, used: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More acts than a page shows: the page says so in what every client shows, and the next ones have the rest."""
    session = other.session()
    for number in range(25):
        other.call("PUT", f"/sessions/{session}/project", 204, json={"project_id": f"p{number}"})
    whole = api.get("/audit")
    assert "next_cursor" not in whole
    assert len(whole["entries"]) > 25
    pages, cursor = [], None
    while cursor is not None or not pages:
        page = api.get("/audit", params={"limit": "10", **({} if cursor is None else {"cursor": cursor})})
        cursor = page.get("next_cursor")
        entries = page["entries"]
        if cursor is not None:
            mark = entries.pop(0)
            assert mark["event"] == "organization_log_cut"
            assert mark["event_details"]["cursor"] == cursor
            assert cursor in mark["event_details"]["message"]
            assert len(entries) == 10
        pages.insert(0, entries)
    assert [entry for page in pages for entry in page] == whole["entries"]
    mine = other.get("/audit", params={"limit": "10", "event_type": "projects"})
    assert mine["entries"][0]["event"] == "project_log_cut"
    for bad in ("nothing", "1e400_1", "-1_1", "1.0_", "1" * 40 + "_1"):
        assert "next_cursor" in api.get("/audit", 400, params={"cursor": bad})["detail"]
    for bad in ("0", "10001", "x"):
        api.get("/audit", 400, params={"limit": bad})
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    assert api.get("/audit")["entries"] == []


def test_what_changes_nothing_is_no_act(api: Any, used: dict[str, str]) -> None:
    checkpoint = f"/training_runs/{used['run']}/checkpoints/weights/kept"
    before = len(audit(api))
    for _ in range(3):
        api.call("PUT", f"/sessions/{used['session']}/project", 204, json={"project_id": "omega"})
        api.call("POST", f"{checkpoint}/publish", 204)
    for _ in range(3):
        api.call("DELETE", f"{checkpoint}/publish", 204)
    events = [entry["event"] for entry in audit(api)[before:]]
    assert events == ["project_session_set", "checkpoint_publish", "checkpoint_unpublish"]


def test_a_refused_act_is_not_in_the_audit_log(api: Any, other: Any, used: dict[str, str]) -> None:
    before = len(audit(api))
    other.call("DELETE", f"/training_runs/{used['run']}/checkpoints/weights/kept", 404)
    other.call("PUT", f"/sessions/{used['session']}/project", 404, json={"project_id": "mine"})
    api.call("DELETE", "/admin/keys/nothing", 404)
    assert len(audit(api)) == before
