"""How a batch of mixed adapters is cut into tiles and slots."""

import gc
import weakref
from collections.abc import Collection

import pytest
import torch

from tinsmith.model.lora import LoraWeights
from tinsmith.sampling import lora as sampling_lora
from tinsmith.sampling.lora import Adapter, DecodeLora, assign_slots, rank_class, stretches, tile_rows
from tinsmith.sampling.stacked import Block, StackedGroup, blocks_of

WIDTHS = {"layer": (32,), "group": (32, 16, 8), "uneven": (24, 16)}


def adapter(seed: int, rank: int = 4, names: Collection[str] = WIDTHS, width: int = 64) -> Adapter:
    """For groups of one, three and two layers."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {
        name: LoraWeights(
            torch.randn(len(widths) * rank, width, generator=generator) * 0.1,
            tuple(torch.randn(outputs, rank, generator=generator) for outputs in widths),
            tuple((32 + layer) / rank for layer in range(len(widths))),
        )
        for name, widths in WIDTHS.items()
        if name in names
    }
    return Adapter.holding(matrices, {})


@pytest.mark.parametrize(
    ("rows", "adapters", "tile"), [(1, 1, 4), (32, 32, 4), (5, 1, 8), (9, 1, 16), (100, 1, 16), (63, 32, 4)]
)
def test_tile_rows(rows, adapters, tile):
    assert tile_rows(rows, adapters) == tile


def test_slots_are_kept_and_reused():
    a, b, c, d = (adapter(i) for i in range(4))
    assert assign_slots([], [a, b, a]) == [0, 1, 2]
    assert assign_slots([a, b, c], [c, a]) == [1, 0]  # no gap, so one of them moves
    assert assign_slots([a, b, c], [c, b]) == [2, 1]
    assert assign_slots([a, b, c], [d, c]) == [1, 2]
    assert assign_slots([a, None], [b, c, a, a]) == [1, 2, 0, 3]


def test_rows_and_places_that_go_on_together_are_one_stretch():
    assert stretches([0, 1, 2], [0, 1, 2]) == [(0, 0, 3)]
    assert stretches([2, 0, 1], [0, 1, 2]) == [(0, 1, 2), (2, 0, 1)]
    assert stretches([0, 1, 4], [0, 4, 5]) == [(0, 0, 1), (1, 4, 1), (4, 5, 1)]
    assert stretches([], []) == []


@pytest.mark.parametrize("rank", [1, 4, 8, 9, 32])
def test_rank_class(rank):
    assert rank_class(rank) == {1: 8, 4: 8, 8: 8, 9: 16, 32: 32}[rank]


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_changing_batch_gives_each_row_its_own_adapter(is_exact):
    adapters = [adapter(i, (4, 8, 12, 32)[i % 4], WIDTHS if i % 3 else ("layer", "group")) for i in range(12)]
    generator = torch.Generator().manual_seed(1)
    lora = DecodeLora(torch.device("cpu"), is_exact)
    for count in (1, 5, 12, 40, 3, 0, 7, 40, 150, 2):
        chosen = [int(i) for i in torch.randint(0, 13, (count,), generator=generator)]
        rows = [None if i == 12 else adapters[i] for i in chosen]
        x = torch.randn(count + 4, 64, generator=generator)
        lora.arrange(rows)
        for name, widths in WIDTHS.items():
            y = torch.randn(count + 4, sum(widths), generator=generator)
            before = y.clone()
            lora.add(name, x, y)
            lora.add("another layer", x, y)
            for row, own in enumerate([*rows, None, None, None, None]):
                if own is None:
                    assert torch.equal(y[row], before[row])
                    continue
                weights = own.matrices.get(name)
                if weights is None:
                    assert torch.equal(y[row], before[row])
                    continue
                us = torch.split(weights.a_KI @ x[row], own.rank)
                layers = zip(weights.scales, weights.bs, us, strict=True)
                delta = torch.cat([scale * (b_OR @ u_R) for scale, b_OR, u_R in layers])
                torch.testing.assert_close(y[row], before[row] + delta, atol=1e-4, rtol=1e-4)


def test_outputs_are_cut_into_pieces_of_one_layer_each():
    assert blocks_of([1024, 512, 512]) == [Block((0, 0, 1, 2), 512, (0, 2048))]
    assert blocks_of([96]) == [Block((0,), 96, (0, 96))]
    assert blocks_of([24, 16]) == [Block((0,), 24, (0, 24)), Block((1,), 16, (24, 40))]


@pytest.fixture
def loads(monkeypatch):
    """The slots that were written to."""
    slots: list[int] = []
    fill = StackedGroup.fill

    def counted(self, slot, weights):
        slots.append(slot)
        fill(self, slot, weights)

    monkeypatch.setattr(StackedGroup, "fill", counted)
    return slots


def test_adapters_that_come_back_are_not_copied_again(loads):
    a, b, c, d = adapters = [adapter(i) for i in range(4)]
    lora = DecodeLora(torch.device("cpu"), is_exact=False)
    lora.arrange(adapters)
    assert len(loads) == 4 * len(WIDTHS)
    for batch in ([c, d], [], [a, b], adapters, [d, None, c, b]):
        lora.arrange(batch)
    assert len(loads) == 4 * len(WIDTHS)
    lora.arrange([a, d])  # no gap: one of the two moves
    assert len(loads) == 5 * len(WIDTHS)


def test_stacks_that_nobody_uses_stay_within_a_bound(loads, monkeypatch):
    some, others = ([adapter(10 * rank + i, rank) for i in range(3)] for rank in (4, 16))
    lora = DecodeLora(torch.device("cpu"), is_exact=False)
    for batch in (some, others, some, others):
        lora.arrange(batch)
    assert len(loads) == 6 * len(WIDTHS)
    monkeypatch.setattr(sampling_lora, "KEPT_BYTES", 0)
    lora.arrange(others)
    lora.arrange(some)
    assert len(loads) == 9 * len(WIDTHS)
    lora.arrange([])
    assert not lora._stacks


def test_a_stack_keeps_no_adapter_alive():
    lora = DecodeLora(torch.device("cpu"), is_exact=False)
    made = [adapter(i) for i in range(2)]
    left = weakref.ref(made[0])
    lora.arrange(made)
    lora.arrange([])
    del made
    gc.collect()
    assert left() is None
