"""One decode pass: every sequence with KV moves on by a token, whatever its adapter, length and sampling parameters.

What follows from who is in the batch (order of rows, adapter stacks, sampling parameters) is kept until that changes.
Shape letters: B sequences, T rows (B and padding), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Container
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinsmith.model import HEAD, BaseModel, padded_rows
from tinsmith.sampling.contexts import DecodeContext, DecodeGroup, head_logits
from tinsmith.sampling.kv import KVCache
from tinsmith.sampling.logits import Warp, draw, penalise, restrict
from tinsmith.sampling.lora import DecodeLora
from tinsmith.sampling.rng import uniforms
from tinsmith.sampling.scores import Top, likeliest
from tinsmith.sampling.sequence import Sequence

DRAW_ROWS = 64  # rows of logits held at once when many sequences start from one prompt


class Drawn(NamedTuple):
    """A sequence, its next token and that token's logprob; the likeliest tokens, if they were asked for.

    error: why none could be drawn for this sequence, which is its own affair.
    """

    sequence: Sequence
    token: int
    logprob: float
    top: Top | None = None
    error: Exception | None = None


class Decoder:
    def __init__(self, base: BaseModel, kv: KVCache[Sequence]) -> None:
        self._base = base
        self._kv = kv
        self._version = -1
        self._sequences: list[Sequence] = []
        self._lora = DecodeLora(base.device)
        self._context = DecodeContext((), self._lora)
        self._warp: Warp | None = None  # of `_sequences`, made when it is needed

    def step(self, paused: Container[Sequence]) -> list[Drawn]:
        """Compute one token for every sequence in the cache. Paused ones are carried along and nothing comes of it."""
        if self._version != self._kv.version:
            self._arrange()
        sequences = self._sequences
        inputs = [s.repeated if s in paused else s.pending for s in sequences]
        inputs += [(0, 0)] * (padded_rows(len(inputs)) - len(inputs))
        tokens_T, positions_T = torch.tensor(inputs, device=self._base.device).unbind(1)
        for group in self._context.groups:
            group.seek(positions_T[group.first : group.last], self._base.dtype)
        hidden_TD = self._base.hidden(tokens_T, positions_T, self._context)
        logits_TV = head_logits(self._base, hidden_TD)
        self._lora.add(HEAD, hidden_TD, logits_TV)
        drawn = self._draw(logits_TV[: len(sequences)].float(), sequences)
        return [d for d in drawn if d.sequence not in paused]

    def draw_first(self, sequences: Seq[Sequence]) -> list[Drawn]:
        """The first token of sequences whose prompt has been computed."""
        drawn: list[Drawn] = []
        for at in range(0, len(sequences), DRAW_ROWS):
            part = sequences[at : at + DRAW_ROWS]
            logits = [s.request.first_logits_V for s in part if s.request.first_logits_V is not None]
            drawn += self._draw(torch.stack(logits), part)
        return drawn

    def _arrange(self) -> None:
        groups: list[DecodeGroup] = []
        self._sequences = []
        for arena in self._kv.arenas:
            groups.append(DecodeGroup(arena, len(self._sequences), self._base.device))
            self._sequences += arena.owners
        self._context = DecodeContext(groups, self._lora)
        self._lora.arrange([s.request.adapter for s in self._sequences])
        self._warp = None
        self._version = self._kv.version

    def _draw(self, logits_BV: Tensor, sequences: Seq[Sequence]) -> list[Drawn]:
        """A token for each. Where that can't be done, each is drawn by itself, which changes no bit of the others."""
        try:
            return _draw(logits_BV, sequences, self._warp_of(sequences))
        except Exception as error:
            if len(sequences) == 1:
                return [Drawn(sequences[0], 0, math.nan, error=error)]
        return [d for row, one in enumerate(sequences) for d in self._draw(logits_BV[row : row + 1], [one])]

    def _warp_of(self, sequences: Seq[Sequence]) -> Warp:
        if sequences is self._sequences and self._warp is not None:
            return self._warp
        warp = Warp.of([s.request.item.params for s in sequences], self._base.info.vocab_size, self._base.device)
        if sequences is self._sequences:
            self._warp = warp
        return warp


def _draw(logits_BV: Tensor, sequences: Seq[Sequence], warp: Warp) -> list[Drawn]:
    streams_B = np.array([s.request.streams[s.index] for s in sequences], np.uint64)
    positions_B = np.array([len(s.tokens) for s in sequences], np.int64)
    uniforms_B = torch.from_numpy(uniforms(streams_B, positions_B)).to(logits_BV.device)
    params = [s.request.item.params for s in sequences]
    penalised_BV = penalise(logits_BV, params, [s.tokens for s in sequences])
    allowed = {row: s.matcher.allowed() for row, s in enumerate(sequences) if s.matcher is not None}
    if allowed:
        penalised_BV = restrict(logits_BV if penalised_BV is None else penalised_BV, allowed)
    tokens_B, logprobs_B, logprobs_BV = draw(logits_BV, warp, uniforms_B, penalised_BV)
    tops = likeliest(logprobs_BV, [s.request.item.topk_sample_logprobs for s in sequences])
    return [Drawn(*d) for d in zip(sequences, tokens_B.tolist(), logprobs_B.tolist(), tops, strict=True)]
