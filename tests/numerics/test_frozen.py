"""A frozen weight gives the products that plain torch gives, in either layout, and the same bits for any crowd."""

import pytest
import torch

from tinsmith.model import FrozenMatrix, frozen


@pytest.fixture(params=[True, False], ids=["packed", "plain"])
def packs(request, monkeypatch: pytest.MonkeyPatch):
    if not request.param:
        monkeypatch.setattr(frozen, "can_pack", lambda weight: False)
    return request.param


@pytest.mark.parametrize("shape", [(48, 200), (1, 16), (512, 192), (33, 7)])
@pytest.mark.parametrize("num_rows", [1, 16, 52, 300])
def test_products_are_those_of_plain_torch(packs: bool, shape: tuple[int, int], num_rows: int):
    num_out, num_in = shape
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(num_out, num_in, generator=generator)
    bias = torch.randn(num_out, generator=generator)
    x, y = torch.randn(num_rows, num_in, generator=generator), torch.randn(num_rows, num_out, generator=generator)
    matrix = FrozenMatrix(weight)
    assert (matrix.out_features, matrix.in_features) == shape
    for _ in range(2):
        assert_close(matrix.times(x), x.double() @ weight.double().T)
        assert_close(matrix.times(x, bias), x.double() @ weight.double().T + bias.double())
        assert_close(matrix.times_transpose(y), y.double() @ weight.double())


def test_rows_of_a_slice_and_of_a_view_are_read_rightly(packs: bool):
    weight, wide = torch.randn(24, 32), torch.randn(40, 64)
    assert_close(FrozenMatrix(weight).times(wide[4:20, ::2]), wide[4:20, ::2].double() @ weight.double().T)


@pytest.mark.parametrize("shape", [(192, 192), (512, 1536), (1536, 512), (1024, 192)])
def test_a_packed_row_has_the_same_bits_in_any_crowd(shape: tuple[int, int], threads: int):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if not frozen.can_pack(weight):
        pytest.skip("this processor has no packed layout")
    matrix = FrozenMatrix(weight)
    for product, width in ((matrix.times, shape[1]), (matrix.times_transpose, shape[0])):
        rows = torch.randn(700, width, generator=torch.Generator().manual_seed(1))
        crowd = product(rows)
        for count in (16, 20, 36, 64, 100, 256, 260, 516):
            start = (700 - count) // 2
            assert torch.equal(product(rows[start : start + count]), crowd[start : start + count])


def assert_close(found: torch.Tensor, expected: torch.Tensor):
    assert float((found.double() - expected).abs().max()) <= 1e-5 * float(expected.abs().max().clamp(min=1))
