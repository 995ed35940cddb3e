"""The command line of any supported SDK, each command as a process of its own, compared with what the clients say.

Processes that don't depend on each other run at the same time. Which commands and options there are is read from the
release; one that is never given fails the run (calls.py).
"""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
import os
import re
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import tinker
from calls import commands
from common import BASE, NOBODY, TEXT, datum, done
from tinker import types
from tinker_cli import Commands

HAS = {command.removeprefix("tinker ") for command in commands()}


@pytest.fixture(scope="module")
def client() -> Any:
    """Its session is the only one of a project of its own."""
    where = {"base_url": os.environ["TOKENS_BASE_URL"], "api_key": os.environ["TOKENS_API_KEY"]}
    return tinker.ServiceClient(**where, user_metadata={"team": "a"}, project_id="command-line")


@pytest.fixture(scope="module")
def run(client: Any) -> Any:
    """Trained, saved and sampled, on the server that computes without a model."""
    run = done(client.create_lora_training_client(BASE, rank=4, user_metadata={"renderer": "plain"}))
    run.forward_backward([datum()], "cross_entropy").result()
    run.save_state("kept").result()
    sampler = done(client.create_sampling_client(model_path=run.save_weights_for_sampler("kept").result().path))
    sampler.sample(types.ModelInput.from_ints(TEXT), 2, types.SamplingParams(max_tokens=4, stop=[])).result()
    return run


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        return bytes(answer.read())


def session_of(run: Any) -> str:
    return str(run.model_id.partition(":")[0])


def test_version(cli: Commands) -> None:
    """Also as it is installed."""
    installed = Path(sys.executable).with_name("tinker")
    said = subprocess.run([installed, "version"], env=cli.env, capture_output=True, text=True, check=True).stdout
    assert said == cli("version") == f"tinker {tinker.__version__}\n"


def test_runs(token_cli: Commands, run: Any) -> None:
    """As a table and as JSON; 0 is no limit."""
    columns = ["id", "model", "owner", "lora", "updated", "status", "checkpoint"]
    listed, everything, info, table, about, wrong = token_cli.at_once(
        ("-f", "json", "run", "list", "--limit", "1"),
        ("--format", "json", "run", "list", "--limit", "0"),
        ("--format", "json", "run", "info", run.model_id),
        ("run", "list", "--limit", "0", "-c", ",".join(columns)),
        ("run", "info", run.model_id),
        ("run", "list", "--columns", "id"),
    )
    assert len(json.loads(listed)["runs"]) == 1
    assert run.model_id in [row["training_run_id"] for row in json.loads(everything)["runs"]]
    found = json.loads(info)
    assert (found["training_run_id"], found["base_model"], found["lora_rank"]) == (run.model_id, BASE, 4)
    assert (found["corrupted"], found.get("user_metadata", {"renderer": "plain"})) == (False, {"renderer": "plain"})
    (line,) = [line for line in table.splitlines() if run.model_id in line]
    assert BASE in line
    assert "weights/kept" in line
    assert "OK" in line
    assert "Active" in about or "OK" in about or "4" in about
    assert run.model_id in about
    assert BASE not in wrong
    assert "not found" in token_cli("run", "info", f"{NOBODY}:train:0", status=1).lower()


def test_billing(token_cli: Commands, run: Any) -> None:
    hour = dt.datetime.now(dt.UTC).replace(minute=0, second=0, microsecond=0)
    start, end = ((hour + dt.timedelta(hours=hours)).isoformat() for hours in (-1, 1))
    answer, table, rows, sessions = token_cli.at_once(
        ("--format", "json", "billing", "usage", start, end),
        ("billing", "usage", start, end),
        ("billing", "usage", start, end, "--csv", "-"),
        ("billing", "usage", start, end, "--csv", "rows.csv", "--sessions-csv", "sessions.csv"),
    )
    usage = json.loads(answer)
    mine = [event["event_info"] for event in usage["data"] if event["session_id"] == session_of(run)]
    assert {info["type"] for info in mine} == {
        "training", "sampling_prefill", "sampling_sample", "checkpoint", "storage",
    }  # fmt: skip
    assert sum(info["token_count"] for info in mine if info["type"] == "sampling_sample") == 2 * 4
    assert usage["sessions"][session_of(run)] == {"user_metadata": {"team": "a"}}
    assert usage.get("cost_data_through") is None
    assert f"{len(usage['data'])} hourly usage row(s)" in table
    assert len(list(csv.DictReader(io.StringIO(rows)))) == len(usage["data"])
    assert sessions == ""
    assert len((token_cli.directory / "rows.csv").read_text().splitlines()) == len(usage["data"]) + 1
    assert session_of(run) in (token_cli.directory / "sessions.csv").read_text()
    assert "14 days" in token_cli("billing", "usage", "2020-01-01T00:00:00Z", end, status=1)


@pytest.mark.skipif("billing checkpoint-storage" not in HAS, reason="`tinker billing checkpoint-storage` came later")
def test_storage(token_cli: Commands, run: Any) -> None:
    answer, rows, nothing = token_cli.at_once(
        ("--format", "json", "billing", "checkpoint-storage", "--project-id", "command-line"),
        ("billing", "checkpoint-storage", "--project-id", "command-line", "--csv", "-"),
        ("--format", "json", "billing", "checkpoint-storage", "--project-id", "nothing"),
    )
    (item,) = json.loads(answer)["data"]
    assert (item["checkpoint_count"], item["project_id"]) == (2, "command-line")
    assert item["user_name"]
    assert [row["size_bytes"] for row in csv.DictReader(io.StringIO(rows))] == [str(item["size_bytes"])]
    assert json.loads(nothing)["data"] == []


def test_traces(token_cli: Commands, run: Any) -> None:
    session_id = session_of(run)
    saved, said, url = token_cli.at_once(
        ("--format", "json", "session", "export-trace", session_id),
        ("session", "export-trace", session_id, "--output", "mine.pftrace"),
        ("session", "export-trace", session_id, "--url-only"),
    )
    trace = fetch(url.strip())
    for file in (f"{session_id}.pftrace", "mine.pftrace"):
        assert (token_cli.directory / file).read_bytes() == trace
    assert json.loads(saved)["file_size_bytes"] == len(trace)
    assert "mine.pftrace" in said
    assert all(name in trace for name in (run.model_id.encode(), b"forward_backward 1", b"sample 0"))
    assert "not found" in token_cli("session", "export-trace", NOBODY, status=1).lower()


@pytest.mark.skipif("model list" not in HAS, reason="`tinker model` came later")
def test_models(token_cli: Commands) -> None:
    answer, table, matching = token_cli.at_once(
        ("--format", "json", "model", "list"), ("model", "list"), ("-f", "json", "model", "list", "TINY")
    )
    (model,) = json.loads(answer)["models"]
    assert (model["model_name"], model["trainable"], model["sampleable"]) == (BASE, True, True)
    (line,) = [line for line in table.splitlines() if BASE in line]
    assert str(model["max_context_length"]) in line
    assert json.loads(matching) == json.loads(answer)
    assert "No model name contains 'huge'" in token_cli("model", "list", "huge", status=1)


@pytest.mark.skipif("auth status" not in HAS, reason="`tinker auth` came later")
def test_logging_in_and_out(token_cli: Commands) -> None:
    assert token_cli("auth", "status") == "Credentials available: yes\nTinker accessible: yes\n"
    assert "Tinker accessible: no" in token_cli("auth", "status", status=1, TINKER_API_KEY="tml-wrong")
    said = token_cli("auth", "login", stdin=token_cli.key + "\n", TINKER_API_KEY=None)
    assert re.search(r"Logged in as (\S+) \(\1\)\. Stored API key '\w+' as the default credential\.", said)
    stored = token_cli.directory / ".tinker" / "credentials.json"
    assert token_cli.key in stored.read_text()
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    assert "Tinker accessible: yes" in token_cli("auth", "status", TINKER_API_KEY=None)
    said = token_cli("auth", "logout", TINKER_API_KEY=None)
    assert re.match(r"Removed credential '\w+'\. The API key is still active\.", said)
    wrong = token_cli("auth", "login", stdin="tml-wrong\n", status=1, TINKER_API_KEY=None)
    assert "this key is unknown, was revoked or has expired" in wrong
    assert "(HTTP 401 from /api/v1/auth/apikey/me)" in wrong


@pytest.mark.skipif("auth whoami" not in HAS, reason="`tinker auth whoami` came later")
def test_whoami(token_cli: Commands) -> None:
    answer, table = token_cli.at_once(("--format", "json", "auth", "whoami"), ("auth", "whoami"))
    who = json.loads(answer)
    assert who["user_urn"].startswith("tml:organization_user:t")
    assert who["email"] is None
    assert who["user_urn"] in table
    assert who["org_urn"] in table
