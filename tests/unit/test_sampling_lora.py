"""How a batch of mixed adapters is cut into tiles and slots."""

import pytest
import torch

from tinsmith.model.lora import LoraWeights
from tinsmith.sampling.lora import Adapter, DecodeLora, assign_slots, tile_rows
from tinsmith.types import Targets

WIDTHS = (32, 16, 8)


def adapter(seed: int, rank: int = 4, targets: Targets | None = None, width: int = 64) -> Adapter:
    """For one group of three layers and one of one."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {
        name: LoraWeights(
            torch.randn(len(widths) * rank, width, generator=generator) * 0.1,
            tuple(torch.randn(outputs, rank, generator=generator) for outputs in widths),
        )
        for name, widths in (("layer", WIDTHS[:1]), ("group", WIDTHS))
    }
    return Adapter(targets or Targets(), rank, 32 / rank, matrices)


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


@pytest.mark.parametrize("rank", [1, 4, 8, 9, 32])
def test_rank_class(rank):
    assert adapter(0, rank).rank_class == {1: 8, 4: 8, 8: 8, 9: 16, 32: 32}[rank]


def test_a_changing_batch_gives_each_row_its_own_adapter():
    adapters = [adapter(i, (4, 8, 12, 32)[i % 4], Targets(mlp=i % 3 == 0)) for i in range(12)]
    generator = torch.Generator().manual_seed(1)
    lora = DecodeLora(torch.device("cpu"))
    for count in (1, 5, 12, 40, 3, 0, 7, 40, 2):
        chosen = [int(i) for i in torch.randint(0, 13, (count,), generator=generator)]
        rows = [None if i == 12 else adapters[i] for i in chosen]
        x = torch.randn(count + 4, 64, generator=generator)
        lora.arrange(rows)
        for name, widths in (("layer", WIDTHS[:1]), ("group", WIDTHS)):
            y = torch.randn(count + 4, sum(widths), generator=generator)
            before = y.clone()
            lora.add(name, x, y)
            lora.add("another layer", x, y)
            for row, own in enumerate([*rows, None, None, None, None]):
                if own is None:
                    assert torch.equal(y[row], before[row])
                    continue
                weights = own.matrices[name]
                us = torch.split(weights.a_KI @ x[row], own.rank)
                delta = torch.cat([b_OR @ u_R for b_OR, u_R in zip(weights.bs, us, strict=True)])
                torch.testing.assert_close(y[row], before[row] + own.scale * delta, atol=1e-4, rtol=1e-4)
