"""A tenant deletes a run of its own: over HTTP and by the command line."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from tinsmith.cli import main as cli
from tinsmith.cli import runs as run_commands
from tinsmith.errors import ConfigError


def test_a_deleted_run_is_gone_for_its_owner_and_absent_for_others(api: Any, other: Any, worker: Any) -> None:
    session = api.session()
    run = api.create(session)["model_id"]
    place = f"/training_runs/{run}"
    assert "wait or run" in api.call("DELETE", place, 400)["detail"]
    worker.step()
    api.post("/save_weights", {"model_id": run, "seq_id": 1, "path": "a"})
    worker.step()
    assert "1 checkpoints" in api.call("DELETE", place, 400)["detail"]
    absent = other.call("DELETE", "/training_runs/s0:train:0", 404)
    foreign = other.call("DELETE", place, 404)
    assert foreign["code"] == absent["code"] == "not_found"
    api.call("DELETE", f"{place}?with_checkpoints=true", 204)
    for method, path, body in (
        ("GET", place, None),
        ("GET", f"{place}/checkpoints", None),
        ("DELETE", place, None),
        ("POST", "/get_info", {"model_id": run}),
        ("POST", "/optim_step", {"model_id": run, "seq_id": 2, "adam_params": {}}),
    ):
        refusal = api.call(method, path, 410, json=body)
        assert refusal["code"] == "gone", (path, refusal)
        assert f"the run {run} was deleted on " in refusal["detail"]
    assert other.call("GET", place, 404)["code"] == "not_found"
    assert api.get("/training_runs")["training_runs"] == []
    assert api.get("/checkpoints")["checkpoints"] == []
    assert api.get(f"/sessions/{session}")["training_run_ids"] == []
    assert [entry["event"] for entry in api.get("/audit")["entries"]][-2:] == [
        "checkpoint_delete",
        "project_run_delete",
    ]


def test_the_command_asks_for_just_that(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    class Server:
        def call(self, method: str, path: str) -> None:
            asked.append((method, path))

    monkeypatch.setattr(run_commands, "server_of", lambda data_dir: Server())
    for more in ([], ["--with-checkpoints"]):
        done = CliRunner().invoke(cli.app, ["runs", "delete", "s1:train:0", *more], catch_exceptions=False)
        assert done.stdout == "s1:train:0: deleted\n"
    assert asked == [
        ("DELETE", "/training_runs/s1:train:0"),
        ("DELETE", "/training_runs/s1:train:0?with_checkpoints=true"),
    ]
    with pytest.raises(ConfigError, match="no id of a run"):
        CliRunner().invoke(cli.app, ["runs", "delete", "../keys"], catch_exceptions=False)
    assert len(asked) == 2
