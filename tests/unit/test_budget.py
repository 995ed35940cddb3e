"""The bound of a pack: what the free memory holds, what is of use, what was learnt from running out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tinsmith.config import Settings
from tinsmith.machine import host_memory
from tinsmith.training.budget import LOOK_EVERY, MARGIN, USEFUL_TOKENS, Budget
from tinsmith.training.footprint import Footprint

CPU = torch.device("cpu")
MIB = 2**20
FOOTPRINT = Footprint(kept=MIB, recomputed=MIB / 8, head=64 * MIB)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | None]:
    """`free["mib"]` is what the machine has."""
    told: dict[str, int | None] = {"mib": 2048}
    monkeypatch.setattr(host_memory, "available_bytes", lambda: None if told["mib"] is None else told["mib"] * MIB)
    return told


def started(**settings: Any) -> Budget:
    budget = Budget(Settings(**settings), CPU)
    budget.start(FOOTPRINT)
    return budget


def test_it_is_what_the_memory_holds(free: dict[str, int]) -> None:
    """An eighth stays free, and what the head takes."""
    assert started().tokens == int((2048 * 7 / 8 - 64) / MARGIN)


def test_never_more_than_is_of_use_nor_less_than_a_little(free: dict[str, int]) -> None:
    free["mib"] = 10**6
    assert started().tokens == USEFUL_TOKENS["cpu"]
    free["mib"] = 1
    assert started().tokens == 64


def test_a_number_means_that_number(free: dict[str, int]) -> None:
    assert started(pass_max_tokens=20_000).tokens == 20_000


def test_where_nothing_is_known_it_is_what_is_of_use(free: dict[str, int | None]) -> None:
    free["mib"] = None
    budget = started()
    assert budget.tokens == USEFUL_TOKENS["cpu"]
    assert budget.can_keep(10**6)
    assert budget.shortfall(10**6, recompute=True) is None


def test_workers_of_other_bases_have_their_share(free: dict[str, int]) -> None:
    free["mib"] = 4096
    assert started(base_model=("a", "b")).free_bytes() == 2048 * MIB


def test_with_checkpointing_always_a_pack_holds_more(free: dict[str, int]) -> None:
    budget = started(activation_checkpointing="always")
    assert budget.tokens == min(USEFUL_TOKENS["cpu"], int((2048 * 7 / 8 - 64) * 8 / MARGIN))


def test_what_is_free_is_looked_at_again(free: dict[str, int]) -> None:
    budget = started()
    before = budget.tokens
    free["mib"] = 1024
    seen = {budget.tokens for _ in range(LOOK_EVERY)}
    assert len(seen) == 2
    assert budget.tokens < before / 1.9
    assert budget.can_keep(690)
    assert not budget.can_keep(700)
    free["mib"] = 2048
    assert budget.can_keep(700), "before a sequence is recomputed, the memory is looked at"


def test_what_can_not_be_held_at_all(free: dict[str, int]) -> None:
    """The estimate itself, without margin and reserve: nothing is refused that might go well."""
    budget = started()
    assert budget.shortfall(1984, recompute=False) is None
    assert budget.shortfall(1985, recompute=False) == (2049 * MIB, 2048 * MIB)
    assert budget.shortfall(1985, recompute=True) is None


def test_running_out_halves_it_and_success_raises_it(free: dict[str, int]) -> None:
    free["mib"] = 10**6
    budget = started()
    assert budget.ran_out(2000) == 1000
    assert budget.tokens == 1000
    budget.went_well(450)
    assert budget.tokens == 1000, "a pack that filled less than half of the bound says nothing of it"
    budget.went_well(500)
    assert budget.tokens == 1062
    for _ in range(40):
        budget.went_well(budget.tokens)
    assert budget.tokens == USEFUL_TOKENS["cpu"]


def test_it_never_falls_below_one() -> None:
    budget = Budget(Settings(), CPU)
    for _ in range(40):
        budget.ran_out(budget.tokens)
    assert budget.tokens == 1
