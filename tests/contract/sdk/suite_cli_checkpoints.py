"""`tinker checkpoint` of any supported SDK, each command as a process of its own, compared with what the clients say.

Processes that don't depend on each other run at the same time. Which commands and options there are is read from the
release; one that is never given fails the run (calls.py).
"""

from __future__ import annotations

import datetime as dt
import io
import json
import tarfile
import urllib.request
from typing import Any

import pytest
import tinker
from common import BASE, datum, done
from hub import hub
from tinker import types
from tinker_cli import Commands

FILES = ["adapter_config.json", "adapter_model.safetensors"]


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
