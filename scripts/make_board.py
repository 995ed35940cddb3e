"""Writes the Grafana board, deploy/grafana/tinsmith.json: `python scripts/make_board.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOARD = Path(__file__).resolve().parents[1] / "deploy" / "grafana" / "tinsmith.json"
SOURCE = {"type": "prometheus", "uid": "${source}"}
WIDTH = 24
STAT_HEIGHT, GRAPH_HEIGHT = 4, 8
HERE = 'instance=~"$instance"'


@dataclass(frozen=True, slots=True)
class Panel:
    """title, unit as Grafana names it, and (legend, query) of each line. A `#` in a query stands for the labels that
    choose the server."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    kind: str = "timeseries"


def quantile(share: float, name: str, by: str = "", labels: str = "#") -> str:
    group = f"{by}, le" if by else "le"
    return f"histogram_quantile({share}, sum by ({group}) (rate({name}_bucket{{{labels}}}[$__rate_interval])))"


def mean(name: str) -> str:
    return f"sum(rate({name}_sum{{#}}[$__rate_interval])) / sum(rate({name}_count{{#}}[$__rate_interval]))"


def rate(name: str, by: str = "", labels: str = "#") -> str:
    group = f" by ({by})" if by else ""
    return f"sum{group} (rate({name}{{{labels}}}[$__rate_interval]))"


NO_POLLS = '#, route!~".*retrieve_future.*"'

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "At a glance",
        (
            Panel("Workers ready", "none", (("", "sum(tinsmith_worker_ready{#})"),), "stat"),
            Panel("Tokens a second", "short", (("", rate("tinsmith_tokens_total")),), "stat"),
            Panel("Requests waiting", "none", (("", "sum(tinsmith_queue_depth{#})"),), "stat"),
            Panel("Longest wait", "s", (("", "max(tinsmith_queue_oldest_seconds{#})"),), "stat"),
            Panel("Runs given up", "none", (("", 'sum(tinsmith_runs{#, status="corrupted"})'),), "stat"),
            Panel("Disk left", "bytes", (("", "min(tinsmith_disk_free_bytes{#})"),), "stat"),
        ),
    ),
    (
        "Work",
        (
            Panel("Tokens a second", "short", (("{{kind}}", rate("tinsmith_tokens_total", "kind")),)),
            Panel(
                "Tokens a second by tenant", "short", (("{{tenant}}", rate("tinsmith_tenant_tokens_total", "tenant")),)
            ),
            Panel(
                "Requests ended a second",
                "ops",
                (("{{kind}} {{outcome}}", rate("tinsmith_ops_total", "kind, outcome")),),
            ),
            Panel(
                "Requests failed a second, by code", "ops", (("{{code}}", rate("tinsmith_failed_ops_total", "code")),)
            ),
            Panel(
                "From acknowledgement to result, 95 %",
                "s",
                (("{{kind}}", quantile(0.95, "tinsmith_op_seconds", "kind")),),
            ),
            Panel(
                "Workers at work",
                "percentunit",
                (("worker {{worker}}", rate("tinsmith_worker_busy_seconds_total", "worker")),),
            ),
        ),
    ),
    (
        "Training passes",
        (
            Panel("Passes a second", "ops", (("passes", rate("tinsmith_pass_seconds_count")),)),
            Panel(
                "Who shares a pass",
                "none",
                (("runs", mean("tinsmith_pass_runs")), ("tenants", mean("tinsmith_pass_tenants"))),
            ),
            Panel("Tokens in a pass", "short", (("tokens", mean("tinsmith_pass_tokens")),)),
            Panel(
                "Computing",
                "s",
                (
                    ("pass, half", quantile(0.5, "tinsmith_pass_seconds")),
                    ("pass, 95 %", quantile(0.95, "tinsmith_pass_seconds")),
                    ("optimizer, 95 %", quantile(0.95, "tinsmith_optim_seconds")),
                ),
            ),
        ),
    ),
    (
        "Queue",
        (
            Panel(
                "Requests waiting, by tenant", "none", (("{{tenant}}", "sum by (tenant) (tinsmith_queue_depth{#})"),)
            ),
            Panel(
                "Held back by quotas, by tenant", "none", (("{{tenant}}", "sum by (tenant) (tinsmith_held_ops{#})"),)
            ),
            Panel(
                "Oldest request, by tenant",
                "s",
                (
                    ("{{tenant}}", "max by (tenant) (tinsmith_queue_oldest_seconds{#})"),
                    ("{{tenant}}, no quota", "max by (tenant) (tinsmith_queue_oldest_free_seconds{#})"),
                ),
            ),
            Panel("Waited, 95 %, by kind", "s", (("{{kind}}", quantile(0.95, "tinsmith_queue_wait_seconds", "kind")),)),
            Panel(
                "Waited, 95 %, by tenant",
                "s",
                (("{{tenant}}", quantile(0.95, "tinsmith_tenant_queue_wait_seconds", "tenant")),),
            ),
            Panel(
                "Waiting and running, by kind",
                "none",
                (
                    ("{{kind}} waits", "sum by (kind) (tinsmith_queued_ops{#}) > 0"),
                    ("{{kind}} runs", "sum by (kind) (tinsmith_running_ops{#}) > 0"),
                ),
            ),
        ),
    ),
    (
        "Sampling",
        (
            Panel(
                "First token",
                "s",
                (
                    ("half", quantile(0.5, "tinsmith_sample_first_token_seconds")),
                    ("95 %", quantile(0.95, "tinsmith_sample_first_token_seconds")),
                ),
            ),
            Panel("A step of the sampler, 95 %", "s", (("step", quantile(0.95, "tinsmith_sample_step_seconds")),)),
            Panel(
                "Seats",
                "none",
                (
                    ("requests, worker {{worker}}", "tinsmith_resident_samples{#}"),
                    ("sequences decoded, worker {{worker}}", "tinsmith_seated_sequences{#}"),
                    ("seats, worker {{worker}}", "tinsmith_sample_seats{#}"),
                ),
            ),
            Panel(
                "Keys and values",
                "bytes",
                (
                    ("used, worker {{worker}}", "tinsmith_kv_used_bytes{#}"),
                    ("free, worker {{worker}}", "tinsmith_kv_free_bytes{#}"),
                ),
            ),
            Panel("The base's matrices", "bytes", (("worker {{worker}}", "tinsmith_base_bytes{#}"),)),
            Panel("Read of the base's weights", "percentunit", (("worker {{worker}}", "tinsmith_base_read_ratio{#}"),)),
        ),
    ),
    (
        "HTTP",
        (
            Panel(
                "Answers a second, by route", "reqps", (("{{route}}", rate("tinsmith_http_requests_total", "route")),)
            ),
            Panel(
                "Answers a second, by status",
                "reqps",
                (("{{status}}", rate("tinsmith_http_requests_total", "status")),),
            ),
            Panel(
                "Answered within, 95 %, without polls",
                "s",
                (("{{route}}", quantile(0.95, "tinsmith_http_request_seconds", "route", NO_POLLS)),),
            ),
            Panel(
                "Refused a second, by code", "reqps", (("{{code}}", rate("tinsmith_refused_requests_total", "code")),)
            ),
            Panel(
                "Open polls and sessions",
                "none",
                (("polls", "tinsmith_open_polls{#}"), ("sessions", "tinsmith_sessions{#}")),
            ),
        ),
    ),
    (
        "Durability",
        (
            Panel(
                "Runs",
                "none",
                (
                    ("{{status}}", "sum by (status) (tinsmith_runs{#})"),
                    ("in memory", "sum(tinsmith_resident_runs{#})"),
                    ("in memory at most", "sum(tinsmith_resident_runs_max{#})"),
                ),
            ),
            Panel(
                "Snapshots",
                "s",
                (("written within, 95 %", quantile(0.95, "tinsmith_snapshot_seconds")),),
            ),
            Panel("Snapshots written", "Bps", (("bytes", rate("tinsmith_snapshot_written_bytes_total")),)),
            Panel(
                "Trouble",
                "none",
                (
                    (
                        "computed again: {{kind}}",
                        "sum by (kind) (increase(tinsmith_replayed_ops_total{#}[$__rate_interval]))",
                    ),
                    ("snapshots not written", "sum(increase(tinsmith_snapshot_failures_total{#}[$__rate_interval]))"),
                    ("snapshots damaged", "sum(increase(tinsmith_damaged_snapshots_total{#}[$__rate_interval]))"),
                    ("runs given up", "sum(increase(tinsmith_corrupted_runs_total{#}[$__rate_interval]))"),
                    (
                        "restarts of {{process}}",
                        "sum by (process) (increase(tinsmith_restarts_total{#}[$__rate_interval]))",
                    ),
                ),
            ),
            Panel(
                "Disk, 95 %",
                "s",
                (
                    ("commit", quantile(0.95, "tinsmith_commit_seconds")),
                    ("fsync of a file", quantile(0.95, "tinsmith_fsync_seconds")),
                ),
            ),
            Panel(
                "Stored",
                "bytes",
                (
                    ("{{kind}}", "sum by (kind) (tinsmith_disk_used_bytes{#})"),
                    ("snapshots", "tinsmith_snapshots_bytes{#}"),
                    ("checkpoints: {{kind}}", "sum by (kind) (tinsmith_checkpoints_bytes{#})"),
                ),
            ),
        ),
    ),
    (
        "Let go",
        (
            Panel(
                "Runs let go",
                "none",
                (("{{why}}", "sum by (why) (increase(tinsmith_let_go_runs_total{#}[$__rate_interval]))"),),
            ),
            Panel("Their snapshots", "Bps", (("bytes", rate("tinsmith_let_go_snapshot_bytes_total")),)),
            Panel(
                "Old rows",
                "none",
                (("{{kind}}", "sum by (kind) (increase(tinsmith_trimmed_rows_total{#}[$__rate_interval]))"),),
            ),
        ),
    ),
    (
        "Processes",
        (
            Panel(
                "Memory",
                "bytes",
                (
                    ("{{process}}", "tinsmith_process_memory_bytes{#}"),
                    ("runs, worker {{worker}}", "tinsmith_resident_runs_bytes{#}"),
                    ("runs at most, worker {{worker}}", "tinsmith_resident_runs_max_bytes{#}"),
                ),
            ),
            Panel(
                "Processor", "percentunit", (("{{process}}", rate("tinsmith_process_cpu_seconds_total", "process")),)
            ),
            Panel("Supervisor silent", "s", (("serve", "tinsmith_supervisor_silent_seconds{#}"),)),
        ),
    ),
)


def board() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = 0
    for title, own in ROWS:
        panels.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}, "panels": []})
        y += 1
        is_stats = own[0].kind == "stat"
        height, a_row = (STAT_HEIGHT, len(own)) if is_stats else (GRAPH_HEIGHT, 3)
        width = WIDTH // a_row
        for index, panel in enumerate(own):
            place = {"x": index % a_row * width, "y": y + index // a_row * height, "w": width, "h": height}
            panels.append(_panel(panel, place))
        y += -(-len(own) // a_row) * height
    for number, made in enumerate(panels, 1):
        made["id"] = number
    return {
        "uid": "tinsmith",
        "title": "tinsmith",
        "tags": ["tinsmith"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_source(), _instance()]},
        "panels": panels,
    }


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": SOURCE,
            "expr": query.replace("#", HERE),
            "legendFormat": legend,
        }
        for number, (legend, query) in enumerate(panel.lines)
    ]
    made: dict[str, Any] = {
        "type": panel.kind,
        "title": panel.title,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": targets,
    }
    if panel.kind == "timeseries":
        made["options"] = {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    return made


def _source() -> dict[str, Any]:
    return {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _instance() -> dict[str, Any]:
    return {
        "name": "instance",
        "label": "Server",
        "type": "query",
        "datasource": SOURCE,
        "query": "label_values(tinsmith_info, instance)",
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def text() -> str:
    return json.dumps(board(), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    BOARD.parent.mkdir(parents=True, exist_ok=True)
    BOARD.write_text(text(), encoding="utf-8")
    print(f"wrote {BOARD}")


if __name__ == "__main__":
    main()
