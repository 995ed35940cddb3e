"""Whose pack is next, of training passes that are under way at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from tinsmith.worker.passes import OpenPass, Passes

LONG, SHORT = 1.0, 0.1  # seconds of a pack


class Adapters:
    """Runs of adapters, none given up."""

    def need(self, run_id: str) -> None: ...

    def given_up(self, run_id: str) -> None: ...

    def __getitem__(self, run_id: str) -> SimpleNamespace:
        return SimpleNamespace(row=SimpleNamespace(spec=SimpleNamespace(is_full=False)))


def passes() -> Passes:
    """Without an engine: what is computed is said by `spent`."""
    nothing: Any = SimpleNamespace(
        start_pass=lambda items: None,
        train_item=lambda op: SimpleNamespace(run_id=op.run_id, work=op.cost_tokens, num_tokens=op.cost_tokens),
        take=lambda op: None,
        charge_pass=lambda op, work: None,
        weight=lambda tenant: 1.0,
    )
    return Passes(nothing, nothing, nothing, cast(Any, Adapters()), nothing)


def begin(passes: Passes, tenant: str) -> OpenPass:
    op: Any = SimpleNamespace(id=tenant, run_id=tenant, tenant_id=tenant, cost_tokens=8, created_at=0.0)
    passes.begin([op], set(), is_suspect=False)
    return passes._open[0]


def compute(passes: Passes, one: OpenPass, seconds: float) -> None:
    one.seconds += seconds
    passes.spent(one, seconds)


def test_a_short_pass_waits_for_a_pack_or_two_beside_nine_long_ones() -> None:
    """It had a tenth of a pack's time, so a fluid server would begin its next after one pack of the others."""
    all_passes = passes()
    for number in range(9):
        begin(all_passes, f"long{number}")
    for _ in range(20):
        chosen = all_passes.next()
        assert chosen is not None
        compute(all_passes, chosen, LONG)
    waits = []
    for _ in range(30):
        short, waited = begin(all_passes, "short"), 0
        while (chosen := all_passes.next()) is not short:
            assert chosen is not None
            compute(all_passes, chosen, LONG)
            waited += 1
        waits.append(waited)
        compute(all_passes, short, SHORT)
        all_passes._open.remove(short)
    assert max(waits) <= 2
    assert 0.8 <= sum(waits) / len(waits) <= 1.2


def test_passes_that_ask_for_much_take_turns() -> None:
    """One whose tenant comes back at once gets no more than one that has packs left."""
    all_passes, given = passes(), {"long": 0.0, "back": 0.0}
    long, back = begin(all_passes, "long"), begin(all_passes, "back")
    for _ in range(40):
        chosen = all_passes.next()
        assert chosen is not None
        given["long" if chosen is long else "back"] += LONG
        compute(all_passes, chosen, LONG)
        if chosen is back:
            all_passes._open.remove(back)
            back = begin(all_passes, "back")
    assert abs(given["long"] - given["back"]) <= 2 * LONG
