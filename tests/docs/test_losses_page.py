"""The page of losses names exactly what may be called, and what is on offer."""

from __future__ import annotations

import re
from pathlib import Path

from tinsmith.validate.requests import LOSSES
from tinsmith.wire.loss_ops import ATTRIBUTES, CALLS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "losses.md").read_text()


def listed() -> set[str]:
    """Keys of CALLS, from the bullets of the page."""
    found: set[str] = set()
    section = PAGE.partition("### What a loss may call")[2].partition("Some are what")[0]
    for bullet in section.split("\n* ")[1:]:
        head, _, names = bullet.partition(":")
        words = re.findall(r"`([\w.]+)`", names)
        if head.startswith("`torch.f(x)`"):
            found |= {f"{room}{word}" for word in words for room in ("torch.", ".")}
        elif head.startswith("attributes"):
            assert set(words) == set(ATTRIBUTES)
            found.add("getattr")
        else:
            rooms = {"`torch.f`": "torch.", "`x.f`": ".", "`torch.nn": "torch.nn.functional.", "operators": "operator."}
            room = next((room for start, room in rooms.items() if head.startswith(start)), "math.")
            found |= {f"{room}{word}" for word in words}
    return found


def test_the_page_lists_what_may_be_called() -> None:
    assert listed() == set(CALLS)


def test_the_page_lists_the_losses_on_offer_with_their_inputs_and_settings() -> None:
    rows = {
        row.split("|")[1].strip(" `"): row for row in PAGE.splitlines() if row.startswith("| `") and row.count("|") == 5
    }
    for name, signature in LOSSES.items():
        for key, default in signature.config.items():
            assert f"`{key}` {default:g}" in rows[name]
