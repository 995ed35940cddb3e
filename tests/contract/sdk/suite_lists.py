"""Lists as the SDK documents them: pages, order, filters and scopes; against the server without a model."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable
from typing import Any

import pytest
import tinker
from common import BASE, NOBODY, done
from tinker import types

SCOPES = ("owned", "accessible")


@pytest.fixture(scope="module")
def where() -> dict[str, str]:
    return {"base_url": os.environ["TOKENS_BASE_URL"], "api_key": os.environ["TOKENS_API_KEY"]}


@pytest.fixture(scope="module")
def runs(where: dict[str, str]) -> list[Any]:
    """Of five sessions, the oldest first; the first two of the project "lists". The last has four checkpoints."""
    made = []
    for project in ("lists", "lists", None, None, None):
        client = tinker.ServiceClient(**where, user_metadata={"suite": "lists"}, project_id=project)
        made.append(done(client.create_lora_training_client(BASE, rank=2)))
    for name in ("one", "two", "three"):
        made[-1].save_state(name).result()
    made[-1].save_weights_for_sampler("one").result()
    return made


@pytest.fixture(scope="module")
def rest(where: dict[str, str]) -> Any:
    """Made without a session, where a release can."""
    if hasattr(tinker, "RestClient"):
        return tinker.RestClient(**where)
    return tinker.ServiceClient(**where).create_rest_client()


def pages(ask: Callable[[int, int], list[Any]], size: int) -> list[Any]:
    """All that `ask(limit, offset)` lists, `size` at a time."""
    found: list[Any] = []
    while page := ask(size, len(found)):
        assert len(page) <= size
        found += page
    return found


def session_of(run: Any) -> str:
    return str(run.model_id.partition(":")[0])


@pytest.mark.parametrize("scope", SCOPES)
def test_runs(rest: Any, runs: list[Any], scope: str) -> None:
    """Newest first; the cursor says what was asked and how much there is."""

    def ask(limit: int, offset: int, **filters: Any) -> list[str]:
        answer = done(rest.list_training_runs(limit, offset, access_scope=scope, **filters))
        assert (answer.cursor.limit, answer.cursor.offset) == (limit, offset)
        totals.append(answer.cursor.total_count)
        return [row.training_run_id for row in answer.training_runs]

    totals: list[int] = []
    listed = pages(ask, 3)
    assert totals == [len(listed)] * len(totals)
    newest_first = [run.model_id for run in reversed(runs)]
    assert [run_id for run_id in listed if run_id in newest_first] == newest_first
    assert len(set(listed)) == len(listed)
    assert len(done(rest.list_training_runs()).training_runs) == min(20, len(listed))
    assert pages(lambda limit, offset: ask(limit, offset, project_id="lists"), 1) == newest_first[-2:]
    assert ask(10, 0, project_id="nobody's") == []
    assert done(rest.get_training_run(runs[0].model_id, access_scope=scope)).training_run_id == runs[0].model_id
    path = f"tinker://{runs[-1].model_id}/weights/one"
    found = done(rest.get_training_run_by_tinker_path(path, access_scope=scope))
    assert (found.training_run_id, found.last_checkpoint.checkpoint_id) == (runs[-1].model_id, "weights/three")


@pytest.mark.parametrize("scope", SCOPES)
def test_sessions(rest: Any, runs: list[Any], scope: str) -> None:
    listed = pages(lambda limit, offset: done(rest.list_sessions(limit, offset, access_scope=scope)).sessions, 3)
    newest_first = [session_of(run) for run in reversed(runs)]
    assert [session for session in listed if session in newest_first] == newest_first
    assert len(set(listed)) == len(listed)
    assert len(done(rest.list_sessions()).sessions) == min(20, len(listed))
    assert done(rest.get_session(newest_first[0], access_scope=scope)).training_run_ids == [runs[-1].model_id]
    if hasattr(tinker, "RestClient"):
        assert listed[0] == newest_first[0], "a RestClient made by itself has no session"


def test_checkpoints(rest: Any, runs: list[Any]) -> None:
    """Of all runs: newest first, in pages; of one run: all at once."""

    def ask(limit: int, offset: int) -> list[Any]:
        answer = done(rest.list_user_checkpoints(limit, offset))
        assert (answer.cursor.limit, answer.cursor.offset) == (limit, offset)
        totals.append(answer.cursor.total_count)
        return list(answer.checkpoints)

    totals: list[int] = []
    listed = pages(ask, 3)
    assert totals == [len(listed)] * len(totals)
    times = [row.time for row in listed]
    assert times == sorted(times, reverse=True)
    mine = [row.checkpoint_id for row in listed if runs[-1].model_id in row.tinker_path]
    assert mine == ["sampler_weights/one", "weights/three", "weights/two", "weights/one"]
    of_run = done(rest.list_checkpoints(runs[-1].model_id))
    assert sorted(row.checkpoint_id for row in of_run.checkpoints) == sorted(mine)
    assert done(rest.list_user_checkpoints()).cursor.limit == 100


def test_limits_are_named(rest: Any) -> None:
    for call in (rest.list_training_runs, rest.list_user_checkpoints, rest.list_sessions):
        for limit, offset in ((0, 0), (1001, 0), (1, -1)):
            with pytest.raises(tinker.BadRequestError, match="limit" if offset == 0 else "offset"):
                done(call(limit, offset))
    with pytest.raises(tinker.BadRequestError, match="access_scope"):
        done(rest.list_sessions(access_scope="everybody's"))


def test_a_moved_session_takes_its_runs_along(rest: Any, runs: list[Any]) -> None:
    done(rest.assign_session_project(session_of(runs[2]), "moved"))
    assert [row.training_run_id for row in done(rest.list_training_runs(project_id="moved")).training_runs] == [
        runs[2].model_id
    ]
    with pytest.raises(tinker.NotFoundError):
        done(rest.assign_session_project(NOBODY, "moved"))


@pytest.mark.skipif(not hasattr(types, "SessionSearchRequest"), reason="search_sessions came later")
def test_searching(rest: Any, runs: list[Any]) -> None:
    """As the docstring pages; newest first."""
    request = types.SessionSearchRequest(
        user_metadata={"suite": "lists"}, owner=types.AccessibleSearchOwner(), project_ids=["lists", "moved"], limit=1
    )
    found = []
    while True:
        page = done(rest.search_sessions(request))
        found += [session.session_id for session in page.sessions]
        if page.next_cursor is None:
            break
        request = request.model_copy(update={"cursor": page.next_cursor})
    assert [one for one in found if one != session_of(runs[2])] == [session_of(runs[1]), session_of(runs[0])]


def test_windows_and_days(rest: Any, where: dict[str, str], runs: list[Any]) -> None:
    """Times as text and as datetimes; today by default; what lies ahead and what is too long are refused."""
    asker = tinker.AdminClient(**where) if hasattr(tinker, "AdminClient") else rest
    hour = dt.datetime.now(dt.UTC).replace(minute=0, second=0, microsecond=0)
    later = hour + dt.timedelta(hours=1)
    ours = [session_of(runs[-1])]
    for start, end in ((hour, later), (hour.isoformat(), later.isoformat().replace("+00:00", "Z"))):
        usage = done(asker.get_billing_usage(start, end))
        assert set(ours) <= {event.session_id for event in usage.data}
        assert {(event.bucket_start, event.bucket_end) for event in usage.data} == {(hour, later)}
        assert usage.sessions[ours[0]].user_metadata == {"suite": "lists"}
    for start, end in ((later, later + dt.timedelta(hours=1)), (hour - dt.timedelta(days=15), hour), (later, hour)):
        with pytest.raises(tinker.BadRequestError):
            done(asker.get_billing_usage(start, end))
    today = hour.date()
    entries = done(asker.get_audit_log(day=today)).entries
    assert entries == done(asker.get_audit_log()).entries
    assert [entry.timestamp for entry in entries] == sorted(entry.timestamp for entry in entries)
    assert done(asker.get_audit_log("checkpoints", today - dt.timedelta(days=1))).entries == []
