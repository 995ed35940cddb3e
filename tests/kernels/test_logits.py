"""Logsumexp and gradients of logits: the kernels against plain torch, and that against autograd."""

import pytest
import torch

from tests.kernels.lab import DEVICE
from tinsmith.training.logit_kernels import FusedLogits
from tinsmith.training.logits import LogitOps, Pairs, PlainLogits

ROWS, VOCAB = 9, 5003
NUM_TARGETS = [1, 1, 3, 1, 0, 2, 1, 1, 1]
OPS = {"plain": PlainLogits(), "triton": FusedLogits()}


def make_pairs() -> tuple[Pairs, torch.Tensor]:
    torch.manual_seed(2)
    counts = torch.tensor(NUM_TARGETS)
    first_C = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    row_F = torch.arange(ROWS).repeat_interleave(counts)
    target_F = torch.randint(0, VOCAB, (len(row_F),))
    target_F[2:5] = torch.tensor([7, 7, 11])  # the same target twice in a row
    coef_F = torch.randn(len(row_F))
    coef_F[-1] = 0
    return Pairs(first_C.to(DEVICE), row_F.to(DEVICE), target_F.to(DEVICE)), coef_F.to(DEVICE)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_against_autograd(ops: LogitOps):
    pairs, coef_F = make_pairs()
    logits_CV = (5 * torch.randn(ROWS, VOCAB)).to(DEVICE)
    logits_CV[3, 17] = float("-inf")
    leaf = logits_CV.double().requires_grad_()
    (coef_F * leaf.log_softmax(-1)[pairs.row_F, pairs.target_F]).sum().backward()
    lse_C = ops.logsumexp(logits_CV)
    torch.testing.assert_close(lse_C, leaf.detach().logsumexp(-1).float(), rtol=1e-6, atol=1e-6)
    rows_M = torch.tensor([0, 2, 3, 5, 7], device=DEVICE)
    grad_MV = ops.gradient(logits_CV, lse_C, pairs, coef_F, rows_M, torch.float32)
    torch.testing.assert_close(grad_MV, leaf.grad[rows_M].float(), rtol=1e-4, atol=1e-6)


def test_rounded_to_bfloat16_the_kernel_agrees_with_plain_torch():
    pairs, coef_F = make_pairs()
    logits_CV = (5 * torch.randn(ROWS, VOCAB)).to(DEVICE)
    lse_C = PlainLogits().logsumexp(logits_CV)
    rows_M = torch.arange(ROWS, device=DEVICE)
    ours, theirs = (op.gradient(logits_CV, lse_C, pairs, coef_F, rows_M, torch.bfloat16) for op in OPS.values())
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter's arithmetic
@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_shows(ops: LogitOps, value: float):
    logits_CV = torch.randn(3, VOCAB, device=DEVICE)
    logits_CV[1, VOCAB // 2] = value
    assert torch.isfinite(ops.logsumexp(logits_CV)).tolist() == [True, False, True]
