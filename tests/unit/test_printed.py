"""What commands print is what it is: an id such as `s1:train:0` holds no emoji, a name no markup."""

from __future__ import annotations

import time

import pytest

from tests.unit.test_cli import KEY, SCOPES, run, served, stub  # noqa: F401  fixtures
from tinsmith.cli import keeping
from tinsmith.upkeep.verify import Finding, Report

NAME = "ci :train: [/b] [red]x"


def test_reports_name_runs_as_they_are_called(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    run_id, other = "s12:train:0", "s12:train:1"
    keeping._show(Report(findings=[Finding(run_id, "[/lost]", "restore it")], replaced=[(other, time.time())]))
    shown = capsys.readouterr().out
    assert run_id in shown
    assert f"{other}: a damaged snapshot was replaced" in shown
    assert "[/lost]" in shown


def test_lists_show_names_as_they_are(stub, served, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("COLUMNS", "200")
    stub.answer = 200, {"keys": [{**KEY, "name": NAME}]}
    assert NAME in run("keys", "list", "--data-dir", served).stdout
    stub.answer = 200, {"scopes": [{**SCOPES[0], "tenant": NAME}]}
    assert NAME in run("admin", "quotas", "--data-dir", served).stdout
    stub.answer = 200, {"weights": [{"tenant": NAME, "weight": 2}]}
    assert NAME in run("admin", "weights", "--data-dir", served).stdout


@pytest.mark.parametrize(
    "command", ["runs delete", "import", "export", "keys rotate", "admin set-quota", "top", "disk"]
)
def test_help_holds_no_picture(command: str) -> None:
    text = run(*command.split(), "--help").stdout
    assert "--help" in text
    assert not [char for char in text if ord(char) >= 0x1F000]
