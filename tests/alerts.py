"""Alert rules as tests read them: the series that each looks at, found in what `/metrics` says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

_FILE = Path(__file__).resolve().parents[1] / "deploy" / "prometheus" / "alerts.yml"
RULES: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for rule in yaml.safe_load(_FILE.read_text())["groups"][0]["rules"]
}
SELECTOR = re.compile(r"\b(tinsmith_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r"(\w+)\s*(=~?)\s*\"([^\"]*)\"")


def selected(alert: str, text: bytes) -> list[list[tuple[dict[str, str], float]]]:
    """For each selector of the rule, in its order: (labels, value) of the samples that it chooses. Those of a selector
    that is the rule's subject bear each label that its message names."""
    families = list(text_string_to_metric_families(text.decode()))
    samples = [sample for family in families for sample in family.samples]
    chosen = []
    for name, matchers in SELECTOR.findall(RULES[alert]["expr"]):
        wanted = [
            (label, value if how == "=~" else re.escape(value)) for label, how, value in MATCHER.findall(matchers)
        ]
        chosen.append(
            [
                (dict(sample.labels), sample.value)
                for sample in samples
                if sample.name == name and all(re.fullmatch(value, sample.labels[label]) for label, value in wanted)
            ]
        )
    named = set(re.findall(r"\$labels\.(\w+)", RULES[alert]["annotations"]["summary"])) - {"instance"}
    assert all(named <= labels.keys() for labels, _ in chosen[0]), f"{alert} speaks of {named}"
    return chosen
