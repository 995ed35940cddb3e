"""The LoRA of decode rows in experts: the kernels, in Triton's interpreter, against the plain loop."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.lab import DEVICE, error
from tinsmith.lora_options import LoraOptions
from tinsmith.model import LinearInfo, Routes, RowLayout
from tinsmith.sampling.lora import Adapter
from tinsmith.sampling.slot_kernel import add_slots
from tinsmith.sampling.slot_lora import SlotLora, add_slots_plainly
from tinsmith.types import Targets

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
NUM, EACH = 5, 2


def linears(inputs: int, inner: int, *, shares: bool) -> list[LinearInfo]:
    outer = 1 if shares else NUM
    return [
        LinearInfo("m.w1", "mlp", inputs, inner, "m.w1", outer, NUM),
        LinearInfo("m.w3", "mlp", inputs, inner, "m.w1" if shares else "m.w3", outer, NUM),
        LinearInfo("m.w2", "mlp", inner, inputs, "m.w2", NUM, outer),
    ]


def adapter(layers: list[LinearInfo], rank: int, dtype: torch.dtype, **ranks: int) -> Adapter:
    layout = RowLayout(layers, Targets(), rank, alpha=2.0 * rank, options=LoraOptions(ranks=tuple(ranks.items())))
    return Adapter.of(layout, torch.randn(layout.num_params).to(DEVICE, dtype) * 0.1)


def in_float32(one: Adapter) -> Adapter:
    experts = {
        name: type(w)(w.a_EKI.float(), tuple(b.float() for b in w.bs), w.scales) for name, w in one.experts.items()
    }
    return Adapter.holding({}, experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "inputs", "inner"), [((8, 32, 16), 48, 144), ((3, 5, 40), 30, 21)])
@pytest.mark.parametrize("shares", [True, False])
def test_they_are_their_reference(ranks, inputs: int, inner: int, dtype: torch.dtype, *, shares: bool) -> None:
    """Ranks of all kinds, also of single layers, factors shared and not, rows of nobody and of padding; then others."""
    torch.manual_seed(1)
    layers = linears(inputs, inner, shares=shares)
    a, b, c = (adapter(layers, rank, dtype) for rank in ranks)
    mixed, outside = adapter(layers, ranks[0], dtype, w2=ranks[1]), Adapter.holding({}, {})
    lora = SlotLora(layers, torch.zeros(8, dtype=dtype, device=DEVICE))
    before = lora.tables.addresses
    for batch in ([None, a, b, a, c, None, a, b, outside], [c, None], [None, None], [mixed, a, mixed]):
        lora.arrange(batch)
        num = len(batch) + 2
        routes = Routes.of(torch.rand(num, NUM, device=DEVICE).topk(EACH).indices, NUM, may_fill=False)
        exact = {one: in_float32(one) for one in (a, b, c, mixed, outside)}
        for name in lora._groups:
            group = lora.group(name)
            x_NI = torch.randn(num * EACH, group.inputs, device=DEVICE).to(dtype)
            y_NO = torch.randn(num * EACH, sum(group.widths), device=DEVICE).to(dtype)
            expected, untouched = y_NO.float(), y_NO.clone()
            add_slots_plainly(
                [exact[one] for one in lora._adapters], lora._owners, name, routes, x_NI.float(), expected
            )
            if lora.shape.rank_class:
                add_slots(lora.tables, group, lora.shape, routes, x_NI, y_NO)
            assert error(y_NO.float(), expected) < BOUNDS[dtype]
            of_nobody = [
                slot
                for slot, row in enumerate(routes.rows_N.tolist())
                if row >= len(batch) or batch[row] is None or batch[row] is outside
            ]
            assert torch.equal(y_NO[of_nobody], untouched[of_nobody])
    assert lora.tables.addresses == before


def test_more_adapters_than_there_is_room_for_move_the_tables() -> None:
    layers = linears(16, 16, shares=True)
    lora = SlotLora(layers, torch.zeros(8, device=DEVICE))
    before = lora.tables.addresses
    lora.arrange([adapter(layers, 4, torch.float32) for _ in range(40)])
    assert lora.tables.addresses != before
    assert lora.tables.owners_B[:41].tolist() == [*range(40), -1]
