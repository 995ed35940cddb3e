"""The end of samples that nobody asks for any more.

A client that is lost without a word keeps its session until that falls silent; one that drops a future keeps it for
good. What it asked for would hold seats and memory of the sampler for nobody.
"""

from __future__ import annotations

import time

import structlog

from tinsmith.api.services import Services
from tinsmith.observe.about import about
from tinsmith.store.quota_rules import duration
from tinsmith.types import Failure

log = structlog.get_logger("tinsmith.api")


def give_up_unpolled(services: Services, now: float) -> int:
    """Cancel the samples that nobody has asked for within `unpolled_sample_s`; how many. Blocks. now: unix seconds."""
    patience_s = services.settings.unpolled_sample_s
    if patience_s <= 0:
        return 0
    before = time.monotonic() - patience_s
    forgotten = [
        op
        for op in services.store.endings.open_since(now - patience_s)
        if services.polls.last(op) < before and not services.waiters.is_awaited(op.id)
    ]
    services.polls.forget(before)
    if not forgotten:
        return 0
    message = (
        f"nobody asked for the result of this sample for {duration(patience_s)} (--unpolled-sample-s), so it was "
        "cancelled: send the request again, and wait for its result"
    )
    ended = set(services.store.endings.give_up(forgotten, Failure("unpolled", "user", message), now))
    given_up = [op for op in forgotten if op.id in ended]
    for base_model in {op.base_model for op in forgotten}:
        for ringer in services.ringers.get(base_model, ()):
            ringer.ring()
    if given_up:
        log.info("samples that nobody asked for were cancelled", **about(given_up))
    return len(given_up)
