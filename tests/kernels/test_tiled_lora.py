"""The LoRA of decode rows: the kernels, in Triton's interpreter, against the plain loop over tiles."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.lab import DEVICE, error
from tinsmith.lora_options import PLAIN, LoraOptions
from tinsmith.model import LinearInfo, RowLayout
from tinsmith.sampling.lora import Adapter
from tinsmith.sampling.tiled_kernel import add_tiles
from tinsmith.sampling.tiled_lora import TiledLora, add_tiles_plainly, tiles_of
from tinsmith.types import Targets

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def linears(inputs: int, inner: int) -> list[LinearInfo]:
    """Three layers with one input, and one with another."""
    widths = {"q": 144, "k": 16, "v": 16}
    shared = [LinearInfo(f"attn.{name}", "attn", inputs, width, "attn.q") for name, width in widths.items()]
    return [*shared, LinearInfo("mlp.down", "mlp", inner, inputs, "mlp.down")]


MIXED = LoraOptions(ranks=(("down", 9), ("k", 24)), alphas=(("v", 5.0),))


def adapter(
    layers: list[LinearInfo], rank: int, dtype: torch.dtype, targets: Targets, options: LoraOptions = PLAIN
) -> Adapter:
    layout = RowLayout(layers, targets, rank, alpha=2.0 * rank, options=options)
    return Adapter.of(layout, torch.randn(layout.num_params).to(DEVICE, dtype) * 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "inputs"), [((8, 32, 16), 48), ((3, 5, 40), 30)])
def test_they_are_their_reference(ranks: tuple[int, ...], inputs: int, dtype: torch.dtype) -> None:
    """Ranks and target sets of all kinds, also of single layers, tiles that are full and not, rows of nobody; then
    another batch."""
    torch.manual_seed(1)
    layers = linears(inputs, 300)
    made = [adapter(layers, rank, dtype, Targets(mlp=rank != ranks[1], unembed=False)) for rank in ranks]
    lora = TiledLora(layers, DEVICE, dtype)
    before = lora.tables.addresses
    mixed = adapter(layers, ranks[0], dtype, Targets(unembed=False), MIXED)
    made.append(mixed)
    a, b, c, _ = made
    for batch in ([None, a, b, a, c, None, *[a] * 17, b, None], [c, None], [None, None], [b, b, a], [mixed, a, mixed]):
        lora.arrange(batch)
        for name in ("attn.q", "mlp.down"):
            group = lora.group(name)
            x_TI = torch.randn(len(batch) + 1, group.inputs, device=DEVICE).to(dtype)
            y_TO = torch.randn(len(batch) + 1, sum(group.widths), device=DEVICE).to(dtype)
            expected, untouched = y_TO.float(), y_TO.clone()
            exact = {m: adapter_in_float32(m) for m in made}
            add_tiles_plainly([(exact[m], rows) for m, rows in tiles_of(batch)], name, x_TI.float(), expected)
            if lora.shape.rank_class:
                add_tiles(lora.tables, group, lora.shape, x_TI, y_TO)
            assert error(y_TO.float(), expected) < BOUNDS[dtype]
            of_nobody = [row for row, m in enumerate([*batch, None]) if m is None or name not in m.matrices]
            assert torch.equal(y_TO[of_nobody], untouched[of_nobody])
    assert lora.tables.addresses == before


def adapter_in_float32(one: Adapter) -> Adapter:
    matrices = {
        name: type(w)(w.a_KI.float(), tuple(b_OR.float() for b_OR in w.bs), w.scales)
        for name, w in one.matrices.items()
    }
    return Adapter.holding(matrices, {})


def test_the_heads_float32_logits_take_bfloat16_adapters() -> None:
    torch.manual_seed(2)
    layers = linears(64, 32)
    own = adapter(layers, 16, torch.bfloat16, Targets(unembed=False))
    lora = TiledLora(layers, DEVICE, torch.bfloat16)
    lora.arrange([own, None])
    x_TI = torch.randn(2, 64, device=DEVICE).bfloat16()
    y_TO, expected = torch.zeros(2, 2, 176, device=DEVICE)
    add_tiles(lora.tables, lora.group("attn.q"), lora.shape, x_TI, y_TO)
    add_tiles_plainly([(adapter_in_float32(own), [0])], "attn.q", x_TI.float(), expected)
    assert error(y_TO, expected) < 1e-2


def test_more_tiles_than_there_is_room_for_move_the_tables() -> None:
    layers = linears(32, 32)
    made = [adapter(layers, 4, torch.float32, Targets(mlp=False, unembed=False)) for _ in range(300)]
    lora = TiledLora(layers, DEVICE, torch.float32)
    before = lora.tables.addresses
    lora.arrange(made)
    assert lora.tables.capacity >= 300
    assert lora.tables.addresses != before
    assert lora.tables.rows_TM[:300, 0].tolist() == list(range(300))
