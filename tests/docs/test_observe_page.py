"""The operator's page, the board and the alerts name what there is: every series and label of theirs is one of ours."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from scripts import make_board, make_metrics_table
from tinsmith.observe import series
from tinsmith.observe.metrics import Counter
from tinsmith.types import OpState

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "how-to" / "observe.md").read_text()
BOARD = json.loads((ROOT / "deploy" / "grafana" / "tinsmith.json").read_text())
ALERTS = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
QUERIES = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", [])] + [
    rule["expr"] for rule in ALERTS
]
BY_NAME = {one.name: one for one in series.TABLE}
OF_PROMETHEUS = {"instance", "job", "le"}


def test_the_table_of_the_page_is_current() -> None:
    assert make_metrics_table.page() == PAGE, "run `make docs`"
    assert all(f"| `{one.name}` |" in PAGE for one in series.TABLE)


def test_the_board_is_current() -> None:
    assert make_board.text() == (ROOT / "deploy" / "grafana" / "tinsmith.json").read_text(), "run `make docs`"


@pytest.mark.parametrize("query", QUERIES)
def test_every_series_and_label_of_a_query_is_there(query: str) -> None:
    named = re.findall(r"\b(tinsmith_\w+?)(_bucket|_sum|_count)?\b(?:\{([^}]*)\})?", query)
    assert named or query.startswith("up{")
    labels: set[str] = set()
    for name, suffix, chosen in named:
        one = BY_NAME[name]
        assert bool(suffix) == (one.kind == "histogram"), name
        used = set(re.findall(r"(\w+)\s*[=!]", chosen))
        assert used - OF_PROMETHEUS <= set(one.labels), (name, used)
        labels |= set(one.labels)
    grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
    assert grouped - OF_PROMETHEUS <= labels


@pytest.mark.parametrize("query", [rule["expr"] for rule in ALERTS])
def test_an_alert_fires_where_nothing_of_its_kind_was_counted_before(query: str) -> None:
    """A series that begins with 1 has no increase, and a rate of what isn't there is not 0 but nothing."""
    for name, value in re.findall(r"increase\((tinsmith_\w+)\{\w+=\"(\w+)\"", query):
        one = BY_NAME[name]
        assert isinstance(one, Counter)
        assert value in one.first
    assert not re.search(r"rate\([^)]*\)\)? == 0", query)


@pytest.mark.parametrize(
    "target",
    [target for panel in BOARD["panels"] for target in panel.get("targets", [])],
    ids=lambda each: each["expr"],
)
def test_a_legend_names_labels_that_its_query_leaves(target: dict[str, str]) -> None:
    (name, *_) = re.findall(r"\btinsmith_\w+", target["expr"])
    one = BY_NAME.get(name) or BY_NAME[re.sub(r"_(bucket|sum|count)$", "", name)]
    grouped = re.search(r"\b(?:sum|max|min)\b(?: by \(([^)]*)\))?", target["expr"])
    left = set(one.labels) if grouped is None else set(re.findall(r"\w+", grouped[1] or ""))
    assert set(re.findall(r"{{(\w+)}}", target.get("legendFormat", ""))) <= left


def test_what_ends_without_a_worker_hides_no_standstill() -> None:
    """The API counts by itself what it refuses at arrival and what is cancelled, also while no worker works."""
    (query,) = (rule["expr"] for rule in ALERTS if rule["alert"] == "TinsmithNothingDone")
    (chosen,) = re.findall(r"tinsmith_ops_total\{outcome=~\"([^\"]*)\"\}", query)
    outcomes = {"refused"} | {state.value for state in OpState if state.is_final}
    assert {outcome for outcome in outcomes if re.fullmatch(chosen, outcome)} == {"done", "failed"}


@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_every_alert_says_what_to_do(alert: str) -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and f"`{alert}`" in line.split("|")[1]]
    assert len(rows) == 1
    assert len(rows[0]) > 80


def test_the_board_shows_what_there_is() -> None:
    """All that is counted is on the board, but for what only tells what is served."""
    shown = set(re.findall(r"tinsmith_\w+", json.dumps(BOARD)))
    stems = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    left_out = {one.name for one in series.TABLE} - stems
    assert left_out <= {"tinsmith_snapshots", "tinsmith_checkpoints"}
