"""The gated delta rule over packed sequences, and the short convolution before it: layers that keep a state in place of
keys and values (arXiv 2412.06464, equation 10).

Of each head, with a state S of [D, E] that begins at zero, and with k and q of length one:

    S_t = exp(g_t) · (S_{t-1} - β_t k_t (k_tᵀ S_{t-1})) + β_t k_t v_tᵀ        o_t = S_tᵀ q_t / √D

In chunks of `CHUNK` positions, what happens within a chunk is products of matrices (section 3.3 there, with the UT
transform of arXiv 2406.06484, section 3.2), and only states go from chunk to chunk. Chunks begin at multiples of
`CHUNK` of a sequence's own positions, also where it goes on from a state. All first chunks are computed together, then
all second ones: each sequence by itself, so that its bits don't depend on the others. States and sums are float32.

Shape letters: T rows of a pass, R of these that belong to sequences, P rows filled up to chunks, J chunks, M positions
of a chunk, N sequences, C channels of the convolution, K its taps, G key heads, H value heads, D key size, E value
size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.model.activation import stable_sigmoid

CHUNK = 64
NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class StateShape:
    """Of one sequence's state in one layer. num_bytes: with rows in the dtype that the model computes in."""

    channels: int
    taps: int
    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.taps * self.channels * self.dtype.itemsize + self.heads * self.key_size * self.value_size * 4


@dataclass(frozen=True, slots=True, eq=False)
class LayerState:
    """What one layer keeps of a sequence: the last K rows before the convolution, oldest first, [K, C], and S, float32
    [H, D, E]. Never written to."""

    rows_KC: Tensor
    state_HDE: Tensor

    @property
    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.rows_KC, self.state_HDE))


@dataclass(frozen=True, slots=True, eq=False)
class DeltaKind:
    """How one layer mixes. taps_CK: float32 weights of the convolution, the last for the row itself. A row's channels
    are all queries, all keys, then all values; a key head serves H / G value heads, one after another."""

    taps_CK: Tensor
    key_heads: int
    heads: int
    key_size: int
    value_size: int

    def state_shape(self, dtype: torch.dtype) -> StateShape:
        channels, taps = self.taps_CK.shape
        return StateShape(channels, taps, self.heads, self.key_size, self.value_size, dtype)

    def split(self, x_RC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the convolved channels, float32: q and k [R, H, D], of length one, q over √D; v [R, H, E]."""
        keys = self.key_heads * self.key_size
        q_RX, k_RX, v_RX = torch.split(x_RC, [keys, keys, x_RC.shape[-1] - 2 * keys], -1)
        q_RHD, k_RHD = (
            _unit(x.view(len(x), self.key_heads, -1)).repeat_interleave(self.heads // self.key_heads, -2)
            for x in (q_RX, k_RX)
        )
        return q_RHD * self.key_size**-0.5, k_RHD, v_RX.view(len(v_RX), self.heads, -1)


class Chunks:
    """Where the rows of sequences, which lie end to end from row 0, are in chunks: all first chunks of the sequences,
    then all second ones, those with most chunks first."""

    def __init__(self, spans: Sequence[tuple[int, int]], device: torch.device) -> None:
        """spans: (number of rows, position of the first) of each sequence."""
        self.spans = tuple(spans)
        self.num_rows = sum(num for num, _ in spans)
        counts = [-(-(start % CHUNK + num) // CHUNK) for num, start in spans]
        self.order = sorted(range(len(spans)), key=lambda index: -counts[index])
        ranks = {index: rank for rank, index in enumerate(self.order)}
        self.sizes = [sum(count > step for count in counts) for step in range(max(counts))]
        self.counts = [counts[index] for index in self.order]
        firsts = torch.tensor([0, *self.sizes]).cumsum(0)
        places = []
        for index, (num, start) in enumerate(spans):
            at = torch.arange(start % CHUNK, start % CHUNK + num)
            places.append((firsts[at // CHUNK] + ranks[index]) * CHUNK + at % CHUNK)
        self.place_R = torch.cat(places).to(device)
        self.num_placed = int(firsts[-1]) * CHUNK

    def placed(self, x_RX: Tensor) -> Tensor:
        """[R, H, ...] -> [J, H, M, ...]; what no row is in is zero, and changes no state."""
        x_PX = x_RX.new_zeros(self.num_placed, *x_RX.shape[1:]).index_copy(0, self.place_R, x_RX)
        return x_PX.view(-1, CHUNK, *x_RX.shape[1:]).transpose(1, 2)


@dataclass(slots=True)
class Ends:
    """What a pass leaves of its sequences, in their order. wanted: of each, the positions, multiples of CHUNK within
    it, at which its state is kept besides; kept: these."""

    wanted: Sequence[Collection[int]]
    states: list[LayerState]
    kept: list[Mapping[int, LayerState]]


def mix(mixed_TC: Tensor, g_TH: Tensor, beta_TH: Tensor, kind: DeltaKind, chunks: Chunks) -> Tensor:
    """[T, H, E] of whole sequences; zero in rows beyond theirs. Differentiable; keeps its inputs alone.

    Args:
        mixed_TC: rows before the convolution. g_TH, beta_TH: float32, g at most 0.
    """
    if torch.is_grad_enabled():
        return cast(Tensor, _Mix.apply(mixed_TC, g_TH, beta_TH, kind, chunks))  # type: ignore[no-untyped-call]
    return _mix(mixed_TC, g_TH, beta_TH, kind, chunks)


def go_on(
    mixed_TC: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    kind: DeltaKind,
    chunks: Chunks,
    states: Sequence[LayerState],
    wanted: Sequence[Collection[int]],
) -> tuple[Tensor, Ends]:
    """The same of sequences that go on from `states`; and what they end with. Not differentiable."""
    ends = Ends(wanted, [], [])
    return _mix(mixed_TC, g_TH, beta_TH, kind, chunks, states, ends), ends


def step(
    mixed_NC: Tensor,
    g_NH: Tensor,
    beta_NH: Tensor,
    kind: DeltaKind,
    rows_NKC: Tensor,
    state_NHDE: Tensor,
    is_new_N: Tensor,
) -> Tensor:
    """[N, H, E]: one row of each of N sequences, whose rows and states are moved on in place.

    is_new_N: where it is false, the state has the row already: it is only read, and the outcome is that of the first
    time, to the bit.
    """
    shifted_NKC = torch.cat([rows_NKC[:, 1:], mixed_NC[:, None]], 1)
    rows_NKC.copy_(torch.where(is_new_N[:, None, None], shifted_NKC, rows_NKC))
    x_NC = _silu(_weighed([rows_NKC[:, tap].float() for tap in range(rows_NKC.shape[1])], kind.taps_CK))
    q_NHD, k_NHD, v_NHE = kind.split(x_NC)
    zero = g_NH.new_zeros(())
    g_NH, beta_NH = (torch.where(is_new_N[:, None], x, zero) for x in (g_NH, beta_NH))
    state_XDE = state_NHDE.flatten(0, 1)
    state_XDE.mul_(g_NH.exp().view(-1, 1, 1))
    q_X1D, k_X1D = (x.reshape(-1, 1, kind.key_size) for x in (q_NHD, k_NHD))
    held_X1E = k_X1D @ state_XDE
    news_X1E = (v_NHE.reshape(held_X1E.shape) - held_X1E).mul_(beta_NH.reshape(-1, 1, 1))
    state_XDE.baddbmm_(k_X1D.transpose(1, 2), news_X1E)
    return (q_X1D @ state_XDE).view(v_NHE.shape).to(mixed_NC.dtype)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed_TC: Tensor, g_TH: Tensor, beta_TH: Tensor, kind: DeltaKind, chunks: Chunks) -> Tensor:
        ctx.save_for_backward(mixed_TC, g_TH, beta_TH)
        ctx.of = kind, chunks
        return _mix(mixed_TC, g_TH, beta_TH, kind, chunks)

    @staticmethod
    def backward(ctx: Any, dout_THE: Tensor) -> tuple[Tensor | None, ...]:
        """Computed a second time, with autograd: what lies between would be many times the inputs."""
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            out_THE = _mix(*inputs, *ctx.of)
        return (*torch.autograd.grad(out_THE, inputs, dout_THE), None, None)


def _mix(
    mixed_TC: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    kind: DeltaKind,
    chunks: Chunks,
    states: Sequence[LayerState] | None = None,
    ends: Ends | None = None,
) -> Tensor:
    num = chunks.num_rows
    mixed_RC = mixed_TC[:num]
    x_RC = _silu(_convolved(mixed_RC, kind.taps_CK, chunks.spans, states))
    q, k, v = (chunks.placed(x) for x in kind.split(x_RC))
    g, beta = (chunks.placed(x[:num]) for x in (g_TH, beta_TH))
    out, at_ends, kept = _scan(q, k, v, g, beta, chunks, states, ends)
    if ends is not None:
        _note(ends, mixed_RC, chunks, states, at_ends, kept)
    out_RHE = out.transpose(1, 2).flatten(0, 1).index_select(0, chunks.place_R).to(mixed_TC.dtype)
    return F.pad(out_RHE, (0, 0, 0, 0, 0, len(mixed_TC) - num)) if len(mixed_TC) > num else out_RHE


def _scan(
    q_JHMD: Tensor,
    k_JHMD: Tensor,
    v_JHME: Tensor,
    g_JHM: Tensor,
    beta_JHM: Tensor,
    chunks: Chunks,
    states: Sequence[LayerState] | None,
    ends: Ends | None,
) -> tuple[Tensor, dict[int, Tensor], dict[tuple[int, int], Tensor]]:
    """[J, H, M, E]; where `ends` are asked for, states after the last chunk by sequence, and before wanted ones by
    sequence and step."""
    sums_JHM = g_JHM.double().cumsum(-1)  # what lies between two positions is a small difference of large sums
    later_MM = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=g_JHM.device).triu_(1)
    apart_JHMM = sums_JHM[..., :, None] - sums_JHM[..., None, :]
    decay_JHMM = apart_JHMM.float().masked_fill(later_MM, float("-inf")).exp()
    grown_JHM1 = sums_JHM.float().exp()[..., None]
    known_JHMD = k_JHMD * beta_JHM[..., None]
    system_JHMM = (known_JHMD @ k_JHMD.transpose(-1, -2)) * decay_JHMM
    asked = torch.cat([v_JHME * beta_JHM[..., None], known_JHMD * grown_JHM1], -1)
    solved = torch.linalg.solve_triangular(system_JHMM, asked, upper=False, unitriangular=True)
    seen_JHMM = (q_JHMD @ k_JHMD.transpose(-1, -2)) * decay_JHMM
    last_JH1 = sums_JHM[..., -1:]
    written_JHMD = k_JHMD * (last_JH1 - sums_JHM).float().exp()[..., None]
    parts = (solved, seen_JHMM, q_JHMD * grown_JHM1, written_JHMD, last_JH1.float().exp()[..., None])
    by_step = zip(*(torch.split(part, chunks.sizes) for part in parts), strict=True)

    value_size = v_JHME.shape[-1]
    if states is None:
        state = v_JHME.new_zeros(len(chunks.order), q_JHMD.shape[1], q_JHMD.shape[-1], value_size)
    else:
        state = torch.stack([states[index].state_HDE for index in chunks.order])
    outs, at_ends, kept = [], {}, {}
    for number, (solved_N, seen_N, q_N, written_N, kept_N) in enumerate(by_step):
        size = len(q_N)
        if ends is not None:
            for rank in range(size):
                index = chunks.order[rank]
                if (chunks.spans[index][1] // CHUNK + number) * CHUNK in ends.wanted[index]:
                    kept[index, number] = state[rank].clone()
        state = state[:size]
        news = solved_N[..., :value_size] - solved_N[..., value_size:] @ state
        outs.append(q_N @ state + seen_N @ news)
        state = state * kept_N + written_N.transpose(-1, -2) @ news
        if ends is not None:
            for rank in range(size):
                if chunks.counts[rank] == number + 1:
                    at_ends[chunks.order[rank]] = state[rank].clone()
    return torch.cat(outs), at_ends, kept


def _note(
    ends: Ends,
    mixed_RC: Tensor,
    chunks: Chunks,
    states: Sequence[LayerState] | None,
    at_ends: Mapping[int, Tensor],
    kept: Mapping[tuple[int, int], Tensor],
) -> None:
    assert states is not None, "ends are asked for of sequences that go on"
    first = 0
    for index, (num, start) in enumerate(chunks.spans):
        own_XC = torch.cat([states[index].rows_KC, mixed_RC[first : first + num]])
        taps = len(states[index].rows_KC)
        ends.states.append(LayerState(own_XC[num : num + taps].clone(), at_ends[index]))
        of_sequence = {}
        for (owner, number), state in kept.items():
            if owner == index:
                position = (start // CHUNK + number) * CHUNK
                of_sequence[position] = LayerState(own_XC[position - start : position - start + taps].clone(), state)
        ends.kept.append(of_sequence)
        first += num


def _convolved(
    mixed_RC: Tensor, taps_CK: Tensor, spans: Sequence[tuple[int, int]], states: Sequence[LayerState] | None
) -> Tensor:
    """Each channel with its own past, float32: Σ over taps of weight · row, the row itself last."""
    before = taps_CK.shape[1] - 1
    pieces: list[Tensor] = []
    none = mixed_RC.new_zeros(before, mixed_RC.shape[1])
    for index, rows in enumerate(torch.split(mixed_RC, [num for num, _ in spans])):
        pieces += [none if states is None else states[index].rows_KC[1:], rows]
    wide_XC = torch.cat(pieces).float()
    length = len(wide_XC) - before
    out_XC = _weighed([wide_XC[tap : tap + length] for tap in range(before + 1)], taps_CK)
    firsts = [sum(num for num, _ in spans[:index]) + before * index for index in range(len(spans))]
    own = [out_XC[first : first + num] for first, (num, _) in zip(firsts, spans, strict=True)]
    return torch.cat(own)


def _weighed(rows: Sequence[Tensor], taps_CK: Tensor) -> Tensor:
    """In the order of the taps, product and sum apart: they round alike wherever an element stands."""
    out = rows[0] * taps_CK[:, 0]
    for tap in range(1, len(rows)):
        out = out + rows[tap] * taps_CK[:, tap]
    return out


def _silu(x: Tensor) -> Tensor:
    return x * stable_sigmoid(x)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)
