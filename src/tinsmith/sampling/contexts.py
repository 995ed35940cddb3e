"""What sampling wants of the base: prefill of prompt chunks, decode of one token for many sequences, or both at once.

A prefill pass packs chunks of several prompts; attention and LoRA are computed for each chunk by itself, so its
numbers are those it has alone. A decode pass has one row for each sequence, ordered as the arenas hold them;
attention is one call for each length class.
Shape letters: T rows, H query heads, G key/value heads, Q query heads of one key/value head, D head size, W positions
of a class, E positions up to an end, N sequences of a class or rows of a chunk, M of these, I inputs, O outputs, V
vocabulary, C channels of a layer that mixes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.errors import UnsupportedError
from tinsmith.model import HEAD, MIN_ROWS, BaseModel, ExpertAdapters, OwnRoutes, Routes, padded_rows
from tinsmith.model.attention import AttentionKind, block_attention, masked_attention, reach_of
from tinsmith.model.delta import Chunks, DeltaKind, StateShape, go_on
from tinsmith.model.lora import NO_ADAPTERS, ExpertLora, LoraBackend
from tinsmith.sampling.blocks import BLOCK_TOKENS, num_blocks
from tinsmith.sampling.expert_rows import expert_segments, merged, shifted
from tinsmith.sampling.kv import Arena, KVCache, KVShape, PromptKV
from tinsmith.sampling.lora import Adapter
from tinsmith.sampling.paged import PagedGroup, PagedKV, PagedPrompt
from tinsmith.sampling.row_lora import RowLora
from tinsmith.sampling.sequence import Sequence
from tinsmith.sampling.states import SequenceStates
from tinsmith.types import IntArray

MASK_ROWS = 64


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows first..last-1 of the pass are positions start.. of one prompt. last_seen: where some see later ones, see
    `Scene.last_seen`."""

    first: int
    last: int
    start: int
    adapter: Adapter | None
    kv: PromptKV | PagedPrompt
    last_seen: IntArray | None = None

    @property
    def num_rows(self) -> int:
        return self.last - self.first


class PrefillContext(OwnRoutes):
    """Attention of each chunk over its own prompt so far, LoRA of each chunk by its own adapter."""

    def __init__(self, segments: Seq[Segment], device: torch.device, dtype: torch.dtype, backend: LoraBackend) -> None:
        self._segments = segments
        self.backend = backend
        self.expert_segments = expert_segments((segment.first, segment.last, segment.adapter) for segment in segments)
        self._chunks: Chunks | None = None
        self._masks = [_late_mask(segment, device, dtype) for segment in segments]
        self._reaches = [reach_of(segment.last_seen, device) for segment in segments]

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, kind: AttentionKind) -> Tensor:
        heads, rows, size = q_HTD.shape
        out_THD = q_HTD.new_zeros(rows, heads, size)
        for segment, mask, reach in zip(self._segments, self._masks, self._reaches, strict=True):
            part = slice(segment.first, segment.last)
            k_GED, v_GED = segment.kv.put(layer, segment.start, k_GTD[:, part], v_GTD[:, part])
            q_HND = q_HTD[:, part]
            if reach is not None or not kind.is_plain(segment.kv.num_tokens):
                out_HND = block_attention(q_HND[None], k_GED[None], v_GED[None], segment.start, kind, reach)[0]
                out_THD[part] = out_HND.transpose(0, 1)
                continue
            if mask is None:
                out_HND = _attention(q_HND, k_GED, v_GED, None, kind)
                out_THD[part] = out_HND.transpose(0, 1)
                continue
            for first in range(0, segment.num_rows, len(mask)):
                last = min(first + len(mask), segment.num_rows)
                end = segment.start + last
                seen = mask[len(mask) - (last - first) :, mask.shape[1] - end :]
                out_HMD = _attention(q_HND[:, first:last], k_GED[:, :end], v_GED[:, :end], seen, kind)
                out_THD[part][first:last] = out_HMD.transpose(0, 1)
        return out_THD

    def mix(self, layer: int, mixed_TC: Tensor, g_TH: Tensor, beta_TH: Tensor, kind: DeltaKind) -> Tensor:
        """States move on in each prompt when the whole walk is through; see `PromptStates`."""
        if self._chunks is None:
            self._chunks = Chunks([(s.num_rows, s.start) for s in self._segments], mixed_TC.device)
        prompts = [segment.kv.states for segment in self._segments]
        states = [prompt.layers[layer] for prompt in prompts]
        wanted = [p.wanted(s.start, s.start + s.num_rows) for p, s in zip(prompts, self._segments, strict=True)]
        out_THE, ends = go_on(mixed_TC, g_TH, beta_TH, kind, self._chunks, states, wanted)
        for prompt, state, kept in zip(prompts, ends.states, ends.kept, strict=True):
            prompt.put(layer, state, kept)
        return out_THE

    def add_lora(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        for segment in self._segments:
            if segment.adapter is not None:
                part = slice(segment.first, segment.last)
                segment.adapter.add(group, x_TI[part], y_TO[part])
        return ()

    def experts(self, name: str, routes: Routes) -> ExpertAdapters:
        return ExpertLora([self.expert_segments], name, routes, self.backend)


class DecodeGroup:
    """The sequences of one length class: rows first..last-1 of the pass are slots 0..N-1 of the arena.

    Those of a long class are attended to one by one, over as many blocks as each has.
    """

    def __init__(self, arena: Arena[Sequence], first: int, device: torch.device) -> None:
        self.arena = arena
        self.first = first
        self.last = first + len(arena.owners)
        self.owners = arena.owners
        self._columns_W = torch.arange(arena.num_positions, device=device)
        self._slots_N1 = torch.arange(len(arena.owners), device=device)[:, None]
        self._positions_N = torch.empty(0, dtype=torch.int64, device=device)
        self._masks: dict[tuple[int | None, int | None], Tensor] = {}
        self._dtype = torch.float32
        self._ends: list[int] = []
        self._indices: dict[int, Tensor] = {}

    def seek(self, positions_N: Tensor, dtype: torch.dtype) -> None:
        """Prepare the step that writes `positions_N` (int64) and attends up to them."""
        if self.arena.is_long:
            self._ends = [num_blocks(position + 1) * BLOCK_TOKENS for position in positions_N.tolist()]
        self._dtype = dtype
        self._positions_N = positions_N
        self._masks.clear()
        self._indices.clear()

    def attend(self, layer: int, q_NHD: Tensor, k_GND: Tensor, v_GND: Tensor, kind: AttentionKind) -> Tensor:
        """[N, H, D]; writes k and v first."""
        num, heads, size = q_NHD.shape
        k_CGWD, v_CGWD = self.arena.layers[layer]
        groups = k_CGWD.shape[1]
        index = self._written(groups)
        k_CGWD.view(-1, size).index_copy_(0, index, k_GND.transpose(0, 1).reshape(-1, size))
        v_CGWD.view(-1, size).index_copy_(0, index, v_GND.transpose(0, 1).reshape(-1, size))
        q_NGQD = q_NHD.reshape(num, groups, heads // groups, size)
        mask = self._mask(kind).expand(num, 1, heads // groups, -1)
        if not self.arena.is_long:
            out_NGQD = masked_attention(q_NGQD, k_CGWD[:num], v_CGWD[:num], mask, kind)
            return out_NGQD.reshape(num, heads, size)
        outs = []
        for slot, end in enumerate(self._ends):
            one = slice(slot, slot + 1)
            k, v, seen = k_CGWD[one, :, :end], v_CGWD[one, :, :end], mask[one, :, :, :end]
            outs.append(masked_attention(q_NGQD[one], k, v, seen, kind))
        return torch.cat(outs).reshape(num, heads, size)

    def _mask(self, kind: AttentionKind) -> Tensor:
        """0 where a sequence's new position sees a position of its slot, else -inf: [N, 1, 1, W]."""
        mask = self._masks.get(kind.reaches)
        if mask is None:
            columns_W, positions_N1 = self._columns_W[: max(self._ends, default=None)], self._positions_N[:, None]
            seen_NW = columns_W <= positions_N1
            unseen_NW = kind.unseen(positions_N1, columns_W)
            if unseen_NW is not None:
                seen_NW &= ~unseen_NW
            hidden = torch.full(seen_NW.shape, float("-inf"), dtype=self._dtype, device=seen_NW.device)
            mask = self._masks[kind.reaches] = hidden.masked_fill_(seen_NW, 0.0)[:, None, None]
        return mask

    def _written(self, heads: int) -> Tensor:
        """Rows of the arena seen as [C * G * W, D]: where each sequence's keys of each head go, [N * G]."""
        index = self._indices.get(heads)
        if index is None:
            head_G = torch.arange(heads, device=self._positions_N.device)
            slot_head_NG = self._slots_N1 * heads + head_G
            index = (slot_head_NG * self.arena.num_positions + self._positions_N[:, None]).view(-1)
            self._indices[heads] = index
        return index


class Group(Protocol):
    """Sequences in rows first..last-1 of a pass, in the order of `owners`, whose attention is computed together."""

    owners: list[Sequence]
    first: int
    last: int

    def seek(self, positions_N: Tensor, dtype: torch.dtype) -> None: ...

    def attend(self, layer: int, q_NHD: Tensor, k_GND: Tensor, v_GND: Tensor, kind: AttentionKind) -> Tensor: ...


def decode_groups(kv: KVCache[Sequence] | PagedKV[Sequence], device: torch.device) -> list[Group]:
    """All sequences of a layout."""
    if isinstance(kv, PagedKV):
        return [PagedGroup(kv, device)]
    groups: list[Group] = []
    first = 0
    for arena in kv.arenas:
        groups.append(DecodeGroup(arena, first, device))
        first = groups[-1].last
    return groups


class DecodeContext(OwnRoutes):
    """One token of every sequence in the groups; rows past the last group are padding.

    is_exact: in experts each row is computed by itself. backend: of the adapters in experts. states: of the sequences,
    in a model that has any.
    """

    def __init__(
        self,
        groups: Seq[Group],
        lora: RowLora,
        backend: LoraBackend,
        states: SequenceStates[Sequence] | None = None,
        *,
        is_exact: bool,
    ) -> None:
        self.groups = groups
        self.states = states
        self.backend = backend
        self._lora = lora
        owners = [owner for group in groups for owner in group.owners]
        if states is not None:
            states.arrange(owners)
        rows = [(row, row + 1, owner.request.adapter) for row, owner in enumerate(owners)]
        self.expert_segments = expert_segments(rows if is_exact else merged(rows))

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, kind: AttentionKind) -> Tensor:
        heads, rows, size = q_HTD.shape
        q_THD = q_HTD.transpose(0, 1)
        out_THD = q_HTD.new_zeros(rows, heads, size)
        for group in self.groups:
            part = slice(group.first, group.last)
            out_THD[part] = group.attend(layer, q_THD[part], k_GTD[:, part], v_GTD[:, part], kind)
        return out_THD

    def mix(self, layer: int, mixed_TC: Tensor, g_TH: Tensor, beta_TH: Tensor, kind: DeltaKind) -> Tensor:
        assert self.states is not None, "a model with states has memory for them"
        return self.states.mix(layer, mixed_TC, g_TH, beta_TH, kind)

    def add_lora(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        self._lora.add(group, x_TI, y_TO)
        return ()

    def experts(self, name: str, routes: Routes) -> ExpertAdapters:
        return ExpertLora([self.expert_segments], name, routes, self.backend)


class MixedContext(OwnRoutes):
    """Decoding sequences in rows 0..num_decoded-1, prompts in those after them."""

    def __init__(self, decode: DecodeContext, num_decoded: int, prefill: PrefillContext) -> None:
        self._parts = ((decode, slice(0, num_decoded)), (prefill, slice(num_decoded, None)))
        self._expert_segments = decode.expert_segments + shifted(prefill.expert_segments, num_decoded)
        self._backend = prefill.backend

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, kind: AttentionKind) -> Tensor:
        outs = [
            context.attend(layer, q_HTD[:, part], k_GTD[:, part], v_GTD[:, part], kind) for context, part in self._parts
        ]
        return torch.cat(outs)

    def mix(self, layer: int, mixed_TC: Tensor, g_TH: Tensor, beta_TH: Tensor, kind: DeltaKind) -> Tensor:
        outs = [context.mix(layer, mixed_TC[part], g_TH[part], beta_TH[part], kind) for context, part in self._parts]
        return torch.cat(outs)

    def add_lora(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        for context, part in self._parts:
            context.add_lora(group, x_TI[part], y_TO[part])
        return ()

    def experts(self, name: str, routes: Routes) -> ExpertAdapters:
        return ExpertLora([self._expert_segments], name, routes, self._backend)


class ShapeProbe(OwnRoutes):
    """Records the key/value heads and head size of each layer, or the shape of its state; leaves attention out."""

    def __init__(self) -> None:
        self.heads: dict[int, tuple[int, int]] = {}
        self.states: dict[int, StateShape] = {}

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, kind: AttentionKind) -> Tensor:
        self.heads[layer] = (k_GTD.shape[0], k_GTD.shape[2])
        return torch.zeros_like(q_HTD).transpose(0, 1)

    def mix(self, layer: int, mixed_TC: Tensor, g_TH: Tensor, beta_TH: Tensor, kind: DeltaKind) -> Tensor:
        self.states[layer] = kind.state_shape(mixed_TC.dtype)
        return mixed_TC.new_zeros(len(mixed_TC), kind.heads, kind.value_size)

    def add_lora(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        return ()

    def experts(self, name: str, routes: Routes) -> ExpertAdapters:
        return NO_ADAPTERS


def probe_kv_shape(base: BaseModel) -> KVShape:
    """The shape of the model's keys, values and states, seen in one small pass, which `num_forwards` doesn't count.

    Raises:
        UnsupportedError: it has no keys and values at all.
    """
    probe = ShapeProbe()
    counted = base.num_forwards
    rows_T = torch.zeros(MIN_ROWS, dtype=torch.int64, device=base.device)
    base.hidden(rows_T, torch.arange(MIN_ROWS, device=base.device), probe)
    base.num_forwards = counted
    heads = tuple(probe.heads.get(layer, (0, 0)) for layer in range(base.num_layers))
    if not any(groups for groups, _ in heads):
        raise UnsupportedError(f"{base.info.name}: no layer has keys and values, by which memory is counted here")
    return KVShape(heads, base.dtype, base.device, probe.states)


def pad_rows(x_ND: Tensor) -> Tensor:
    """Rows as a matrix product needs them for bits that don't depend on their number; the added ones are zero."""
    missing = padded_rows(len(x_ND)) - len(x_ND)
    return F.pad(x_ND, (0, 0, 0, missing)) if missing else x_ND


def head_logits(base: BaseModel, hidden_TD: Tensor) -> Tensor:
    """The head's float32 outputs [T, V], without any adapter and before `base.final`; T as `padded_rows` says."""
    return base.head.times_float32(hidden_TD)


def adapter_logits(base: BaseModel, hidden_ND: Tensor, adapter: Adapter | None) -> Tensor:
    """float32 logits [N, V] of rows that share one adapter."""
    logits_NV = head_logits(base, pad_rows(hidden_ND))[: len(hidden_ND)]
    if adapter is not None:
        adapter.add(HEAD, hidden_ND, logits_NV)
    return base.final.apply_(logits_NV.float())


def _attention(q_HND: Tensor, k_GED: Tensor, v_GED: Tensor, mask: Tensor | None, kind: AttentionKind) -> Tensor:
    """Of rows of one prompt; plain causal without a mask."""
    q, k, v = q_HND[None], k_GED[None], v_GED[None]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=kind.scale, enable_gqa=True
    )[0]


def _late_mask(segment: Segment, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """What rows of a chunk that isn't the first may see, 0 or -inf, [M, start + n]; None for a first chunk, which is
    plain causal.

    For the last M rows of the chunk; any others see the same, so many columns fewer from the right. On the CPU M is
    small, so that the mask is: a chunk's rows are taken M at a time there. Made once for all layers.
    """
    if segment.start == 0:
        return None
    rows = segment.num_rows if device.type == "cuda" else min(MASK_ROWS, segment.num_rows)
    end = segment.start + segment.num_rows
    mask = torch.zeros(rows, end, dtype=dtype, device=device)
    mask[:, end - rows :] = torch.full((rows, rows), float("-inf"), dtype=dtype, device=device).triu_(1)
    return mask
