"""The suite in `sdk/` with the oldest and the newest supported SDK release, side by side, each in its own environment.

Environments are made if missing. `make contract` has every release make every call.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.contract_envs import VERSIONS
from scripts.contract_matrix import (
    PAGE,
    Report,
    call_table,
    plain_text,
    requests_by_tenant,
    run_all,
    servers,
    tenant_of,
)

TRIED = (VERSIONS[0], VERSIONS[-1])
CORE = {
    "POST /create_model",
    "POST /forward_backward",
    "POST /optim_step",
    "POST /save_weights",
    "POST /save_weights_for_sampler",
    "POST /load_weights",
    "POST /asample",
    "POST /auth/token",
    "POST /retrieve_future",
    "GET /training_runs/{run}/checkpoints",
}


@pytest.fixture(scope="module")
def reports_and_requests(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[list[Report], dict[str, Counter[str]]]]:
    with servers(tmp_path_factory.mktemp("versions")) as both:
        reports = run_all(TRIED, both)
        yield reports, requests_by_tenant([both.plain.log, both.tokens.log])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("index", range(len(TRIED)), ids=TRIED)
def test_the_suite_passes_and_leaves_no_call_out(
    reports_and_requests: tuple[list[Report], dict[str, Counter[str]]], index: int
) -> None:
    reports, requests = reports_and_requests
    report = reports[index]
    assert report.version == TRIED[index]
    assert not report.problems, "\n".join([*report.problems, report.output[-8000:]])
    assert set(requests[tenant_of(report.version)]) >= CORE


@pytest.mark.timeout(600)
def test_the_page_is_current(reports_and_requests: tuple[list[Report], dict[str, Counter[str]]]) -> None:
    """Except for how often; renew it with `make contract`."""
    reports, _ = reports_and_requests
    cells, calls = calls_on_the_page()
    assert tuple(cells) == VERSIONS
    assert calls >= {name for report in reports for name in report.calls}
    for report in reports:
        assert cells[report.version] == {name: uncounted(report.cell(name)) for name in calls}


def calls_on_the_page() -> tuple[dict[str, dict[str, str]], set[str]]:
    """By release and call, what is said there; and all calls."""
    table = PAGE.read_text().partition("\n## Calls\n\n")[2].partition("\n\n")[0]
    head, _, *rows = ([cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in table.splitlines())
    cells = {version: {row[0]: uncounted(row[column]) for row in rows} for column, version in enumerate(head) if column}
    return cells, {row[0] for row in rows}


def uncounted(cell: str) -> str:
    return re.sub(r"^\d+ ", "", cell)


def report(**calls: dict[str, object]) -> Report:
    return Report("0.1.0", 0, "", 1.0, calls, {}, {})


def row(calls: int = 1, failed: tuple[str, ...] = (), missing: tuple[str, ...] = ()) -> dict[str, object]:
    return {"calls": calls, "answered": calls, "failed": list(failed), "missing": list(missing)}


def test_what_no_test_calls_is_a_problem_by_name() -> None:
    assert report(a=row()).problems == []
    assert report(a=row(), b=row(missing=("b_async",))).problems == ["tinker 0.1.0: no test calls b_async"]
    assert report().problems == ["tinker 0.1.0: the suite ended with status 0"]


def test_a_table_names_what_a_release_does_not_have() -> None:
    table = call_table([report(a=row(3), b=row(failed=("t",))), report(b=row(), c=row(0, missing=("c",)))])
    assert plain_text(table).splitlines() == [
        "call  0.1.0     0.1.0",
        "a     3 passed  -",
        "b     1 FAILED  1 passed",
        "c     -         0 UNUSED",
    ]


def test_requests_are_counted_by_tenant_and_without_ids(tmp_path: Path) -> None:
    """A signed link is followed without a key; its session tells whose it is."""
    log = tmp_path / "log"
    run = f"s{'0' * 24}:train:0"
    line = '{"event": "request", "method": "GET", "path": "/api/v1/%s"%s}\n'
    log.write_text(
        "noise\n"
        + line % (f"training_runs/{run}/checkpoints/weights/a/archive", ', "tenant": "mine"')
        + line % (f"downloads/{run}/weights/a/archive.tar", "")
        + line % ("healthz", "")
    )
    assert requests_by_tenant([log]) == {
        "mine": {
            "GET /training_runs/{run}/checkpoints/weights/{name}/archive": 1,
            "GET /downloads/{run}/weights/{name}/{file}": 1,
        }
    }
