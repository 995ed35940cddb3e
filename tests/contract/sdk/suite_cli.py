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
import tarfile
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import command
import pytest
import tinker
from calls import Ledger, commands
from common import BASE, NOBODY, TEXT, datum, done
from hub import hub
from tinker import types

FILES = ["adapter_config.json", "adapter_model.safetensors"]
WORKERS = 3
HAS = {command.removeprefix("tinker ") for command in commands()}


class Commands:
    """Runs `tinker` with a server's address and key, nothing else of the environment, in a directory of its own."""

    def __init__(self, server: str, directory: Path, ledger: Ledger, pool: ThreadPoolExecutor) -> None:
        self.directory, self._ledger, self._pool = directory, ledger, pool
        self.key = os.environ[f"{server}_API_KEY"]
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "TINKER_BASE_URL": os.environ[f"{server}_BASE_URL"],
            "TINKER_API_KEY": self.key,
            "TINKER_TELEMETRY": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "250",
        }

    def __call__(self, *args: str, status: int = 0, stdin: str = "", **env: str | None) -> str:
        """What it writes; with its complaints, if a status other than 0 is expected."""
        chosen = {name: value for name, value in {**self.env, **env}.items() if value is not None}
        call = self._ledger.begin_command(args)
        ended, said, complained = command.run(args, chosen, self.directory, stdin)
        assert ended == status, f"{args}: {said}{complained}"
        call.answered = status == 0
        return said + (complained if status else "")

    def json(self, *args: str) -> Any:
        return json.loads(self("--format", "json", *args))

    def at_once(self, *calls: tuple[str, ...]) -> list[str]:
        return list(self._pool.map(lambda args: self(*args), calls))


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    command.serve_forks()
    with ThreadPoolExecutor(WORKERS) as pool:
        yield pool


@pytest.fixture
def cli(tmp_path: Path, ledger: Ledger, pool: ThreadPoolExecutor) -> Commands:
    """Towards the server that computes with the model."""
    return Commands("TINKER", tmp_path, ledger, pool)


@pytest.fixture
def token_cli(tmp_path: Path, ledger: Ledger, pool: ThreadPoolExecutor) -> Commands:
    """Towards the server that has clients exchange their keys for tokens."""
    return Commands("TOKENS", tmp_path, ledger, pool)


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


@pytest.fixture(scope="module")
def real_run() -> Any:
    run = done(tinker.ServiceClient().create_lora_training_client(BASE, rank=8, seed=3))
    run.forward_backward([datum()], "cross_entropy").result()
    run.optim_step(types.AdamParams(learning_rate=5e-3)).result()
    return run


def checkpoints(run: Any) -> dict[str, Any]:
    rest = tinker.ServiceClient().create_rest_client()
    return {row.tinker_path: row for row in rest.list_checkpoints(run.model_id).result().checkpoints}


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
    assert "this key is unknown or was revoked" in wrong
    assert "(HTTP 401 from /api/v1/auth/apikey/me)" in wrong


@pytest.mark.skipif("auth whoami" not in HAS, reason="`tinker auth whoami` came later")
def test_whoami(token_cli: Commands) -> None:
    answer, table = token_cli.at_once(("--format", "json", "auth", "whoami"), ("auth", "whoami"))
    who = json.loads(answer)
    assert who["user_urn"].startswith("tml:organization_user:t")
    assert who["email"] is None
    assert who["user_urn"] in table
    assert who["org_urn"] in table


def test_checkpoints(cli: Commands, real_run: Any) -> None:
    training = real_run.save_state("managed").result().path
    sampler = real_run.save_weights_for_sampler("managed").result().path
    kinds = {training: "training", sampler: "sampler"}
    if hasattr(real_run, "save_weights_external"):
        kinds[real_run.save_weights_external("managed").result().path] = "external"
    of_run, of_all, table, _, _ = cli.at_once(
        ("--format", "json", "checkpoint", "list", "--run-id", real_run.model_id),
        ("--format", "json", "checkpoint", "list", "--limit", "0"),
        ("checkpoint", "list", "--run-id", real_run.model_id),
        ("checkpoint", "publish", training),
        ("checkpoint", "set-ttl", sampler, "--ttl", "7200"),
    )
    listed = {row["tinker_path"]: row for row in json.loads(of_run)["checkpoints"]}
    assert {path: listed[path]["checkpoint_type"] for path in kinds} == kinds
    assert all(listed[path]["size_bytes"] > 0 for path in kinds)
    assert set(listed) <= {row["tinker_path"] for row in json.loads(of_all)["checkpoints"]}
    assert "weights/managed" in table

    info, about = cli.at_once(("-f", "json", "checkpoint", "info", training), ("checkpoint", "info", sampler))
    shown = json.loads(info)
    assert (shown["public"], shown["lora_rank"], shown["tinker_path"]) == (True, 8, training)
    assert sampler in about
    assert checkpoints(real_run)[sampler].expires_at is not None
    cli.at_once(("checkpoint", "unpublish", training), ("checkpoint", "set-ttl", sampler, "--remove"))
    now = checkpoints(real_run)
    assert (now[training].public, now[sampler].expires_at) == (False, None)


def test_deleting_checkpoints(cli: Commands) -> None:
    """By path; by run with a type and between two times; cancelled."""
    run = done(tinker.ServiceClient().create_lora_training_client(BASE, rank=2))
    first, second, third = (run.save_state(name).result().path for name in ("one", "two", "three"))
    sampler = run.save_weights_for_sampler("one").result().path
    day = dt.timedelta(days=1)
    yesterday, tomorrow = ((dt.datetime.now(dt.UTC) + days).date().isoformat() for days in (-day, day))
    window = ("--run-id", run.model_id, "--after", yesterday, "--before", tomorrow)
    assert "cancelled" in cli("checkpoint", "delete", first, stdin="n\n")
    assert len(checkpoints(run)) == 4
    assert cli.json("checkpoint", "delete", "-y", first, third)["deleted_count"] == 2
    assert set(checkpoints(run)) == {second, sampler}
    assert cli.json("checkpoint", "delete", "--yes", *window, "--type", "weights")["deleted_count"] == 1
    assert set(checkpoints(run)) == {sampler}
    assert "matching filters" in cli("checkpoint", "delete", "-y", "--run-id", run.model_id, "--before", yesterday)


def test_downloads(cli: Commands, real_run: Any) -> None:
    """Each kind that the release downloads; the files are those that everybody else is sent."""
    paths = [real_run.save_state("down").result().path]
    if hasattr(real_run, "save_weights_external"):
        paths.append(real_run.save_weights_external("down").result().path)
    said = cli.at_once(
        *[("--format", "json", "checkpoint", "download", path, "--output", "here") for path in paths],
        ("checkpoint", "download", paths[0], "-o", "there"),
    )
    answers = [json.loads(answer) for answer in said[: len(paths)]]
    directories = [cli.directory / answer["destination"] for answer in answers]
    rest = tinker.ServiceClient().create_rest_client()
    if hasattr(rest, "get_external_weights_urls"):
        urls = rest.get_external_weights_urls(paths[-1]).result().urls
        assert sorted(urls) == FILES
        sent = {name: fetch(url) for name, url in urls.items()}
    else:
        link = rest.get_checkpoint_archive_url_from_tinker_path(paths[0]).result()
        with tarfile.open(fileobj=io.BytesIO(fetch(link.url))) as tar:
            sent = {name: tar.extractfile(name).read() for name in FILES}
    for answer, directory in zip(answers, directories, strict=True):
        files = {file.name: file.read_bytes() for file in directory.iterdir()}
        if not hasattr(rest, "get_checkpoint_archive_url"):
            assert answer["file_size_bytes"] == sum(map(len, files.values()))
        assert {name: files[name] for name in FILES} == sent
        assert set(files) - set(FILES) <= {"checkpoint_complete"}
    config = json.loads((directories[0] / FILES[0]).read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 32)
    again = ("checkpoint", "download", paths[0], "-o", "here")
    assert "already exists" in cli(*again, status=1)
    cli(*again, "--force")
    assert not [path for path in checkpoints(real_run) if path.endswith("/external_weights/download")]


def test_pushing_to_a_hub(cli: Commands, real_run: Any) -> None:
    path = real_run.save_state("pushed").result().path
    with hub() as there:
        home = str(cli.directory / "hf")
        env = {"HF_ENDPOINT": there.url, "HF_TOKEN": "hf_x", "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}
        pushed = json.loads(cli("-f", "json", "checkpoint", "push-hf", path, "--repo", "me/mine", **env))
        assert (pushed["checkpoint_path"], pushed["repo_id"]) == (path, "me/mine")
        files, header = there.commits["me/mine@main"]
        assert sorted(files) == ["README.md", *FILES]
        assert path in files["README.md"].decode()
        assert json.loads(files[FILES[0]])["base_model_name_or_path"] == BASE
        assert there.repositories["me/mine"]["visibility"] == "private"
        said = cli(
            "checkpoint", "push-hf", path, "-r", "me/other", "--public", "--revision", "v1",
            "--commit-message", "first", "--allow-pattern", "adapter_*", "--ignore-pattern", "*.json",
            "--no-model-card", **env,
        )  # fmt: skip
        assert "me/other" in said
        files, header = there.commits["me/other@v1"]
        assert sorted(files) == FILES[1:]
        assert header["summary"] == "first"
        assert there.repositories["me/other"]["visibility"] == "public"
        cli("checkpoint", "push-hf", path, "-r", "me/asked", "--create-pr", **env)
        assert there.commits["me/asked@main"][1]["query"] == "create_pr=1"
