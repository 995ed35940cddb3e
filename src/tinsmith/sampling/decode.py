"""The decoding part of a walk: every sequence with KV moves on by a token, whatever its adapter, length and parameters.

What follows from who is in the batch (order of rows, adapter stacks, sampling parameters) is kept until that changes.
Shape letters: B sequences, T rows (B and others after them), D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinsmith.model import HEAD, BaseModel, padded_rows
from tinsmith.sampling.contexts import DecodeContext, decode_groups, head_logits
from tinsmith.sampling.kv import KVCache
from tinsmith.sampling.logits import Warp, draw, penalise, restrict
from tinsmith.sampling.paged import PagedKV
from tinsmith.sampling.rng import UInt64Array, uniforms
from tinsmith.sampling.row_lora import RowLora
from tinsmith.sampling.scores import Top, likeliest
from tinsmith.sampling.sequence import Sequence
from tinsmith.types import IntArray, SamplingParams

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
    """tokens, positions: int64, one for each sequence in the cache, in the order of its arenas; positions are places
    in the sequence."""

    def __init__(
        self, base: BaseModel, kv: KVCache[Sequence] | PagedKV[Sequence], lora: RowLora, *, is_exact: bool
    ) -> None:
        self._base = base
        self._is_exact = is_exact
        self._kv = kv
        self._version = -1
        self._sequences: list[Sequence] = []
        self._lora = lora
        self._rules: Rules | None = None  # of `_sequences`, made when they are needed
        self._must_look = True  # tokens and positions aren't what the last step left
        self.context = DecodeContext((), lora, base.lora, is_exact=is_exact)
        self.tokens: IntArray = np.zeros(0, np.int64)
        self.positions: IntArray = np.zeros(0, np.int64)
        self._counts_B: IntArray = np.zeros(0, np.int64)
        self._offsets: IntArray | None = None  # where some sequence has pictures

    @property
    def rotary(self) -> IntArray:
        """The rotary positions that go with `positions`."""
        return self.positions if self._offsets is None else self.positions + self._offsets

    @property
    def sequences(self) -> Seq[Sequence]:
        """In the order of `tokens`."""
        return self._sequences

    def prepare(self) -> int:
        """Make `tokens` and `positions` ready for a walk; the number of sequences."""
        if self._version != self._kv.version:
            self._arrange()
        if self._must_look:
            inputs = [s.pending for s in self._sequences]
            self.tokens, self.positions = np.array(inputs, np.int64).reshape(-1, 2).T
        return len(self._sequences)

    def seek(self) -> DecodeContext:
        """The context of a walk over `tokens` and `positions`."""
        positions_B = torch.from_numpy(self.positions).to(self._base.device)
        for group in self.context.groups:
            group.seek(positions_B[group.first : group.last], self._base.dtype)
        if self.context.states is not None:
            self.context.states.seek(positions_B)
        return self.context

    def draw(self, hidden_TD: Tensor) -> list[Drawn]:
        """A token for every sequence. Their rows come first, any others after them."""
        sequences = self._sequences
        num = len(sequences)
        hidden_TD = hidden_TD[: padded_rows(num)]
        logits_TV = head_logits(self._base, hidden_TD)
        self._lora.add(HEAD, hidden_TD, logits_TV)
        counts_B = np.array([len(s.tokens) for s in sequences], np.int64) if self._must_look else self._counts_B
        drawn = self._draw(self._base.final.apply_(logits_TV)[:num].float(), sequences, counts_B)
        self._counts_B = counts_B + 1
        self.tokens = np.array([each.token for each in drawn], np.int64)
        self.positions = self.positions + 1
        self._must_look = False
        return drawn

    def draw_first(self, sequences: Seq[Sequence]) -> list[Drawn]:
        """The first token of sequences whose prompt has been computed."""
        drawn: list[Drawn] = []
        for at in range(0, len(sequences), DRAW_ROWS):
            part = sequences[at : at + DRAW_ROWS]
            logits = [s.request.first_logits_V for s in part if s.request.first_logits_V is not None]
            drawn += self._draw(torch.stack(logits), part, np.zeros(len(part), np.int64))
        return drawn

    def _arrange(self) -> None:
        groups = decode_groups(self._kv, self._base.device)
        self._sequences = [owner for group in groups for owner in group.owners]
        self.context = DecodeContext(groups, self._lora, self._base.lora, self._kv.states, is_exact=self._is_exact)
        self._lora.arrange([s.request.adapter for s in self._sequences])
        offsets = np.array([s.offset for s in self._sequences], np.int64)
        self._offsets = offsets if offsets.any() else None
        self._rules = None
        self._must_look = True
        self._version = self._kv.version

    def _draw(self, logits_BV: Tensor, sequences: Seq[Sequence], counts_B: IntArray) -> list[Drawn]:
        """A token for each. Where that can't be done, each is drawn by itself, which changes no bit of the others."""
        try:
            return _draw(logits_BV, sequences, self._rules_of(sequences), counts_B)
        except Exception as error:
            if len(sequences) == 1:
                return [Drawn(sequences[0], 0, math.nan, error=error)]
        return [
            drawn
            for row, one in enumerate(sequences)
            for drawn in self._draw(logits_BV[row : row + 1], [one], counts_B[row : row + 1])
        ]

    def _rules_of(self, sequences: Seq[Sequence]) -> Rules:
        if sequences is self._sequences and self._rules is not None:
            return self._rules
        rules = Rules.of(sequences, self._base.info.vocab_size, self._base.device)
        if sequences is self._sequences:
            self._rules = rules
        return rules


@dataclass(frozen=True, slots=True)
class Rules:
    """How the tokens of B sequences are drawn: what stays the same from step to step.

    penalties: whether any is asked for. tops: how many of the likeliest tokens each wants; empty if none does any.
    matched: the rows that are held to a schema.
    """

    warp: Warp
    streams_B: UInt64Array
    params: list[SamplingParams]
    penalties: bool
    tops: list[int]
    matched: list[int]

    @classmethod
    def of(cls, sequences: Seq[Sequence], vocab_size: int, device: torch.device) -> Rules:
        params = [s.request.item.params for s in sequences]
        tops = [s.request.item.topk_sample_logprobs for s in sequences]
        return cls(
            warp=Warp.of(params, vocab_size, device),
            streams_B=np.array([s.request.streams[s.index] for s in sequences], np.uint64),
            params=params,
            penalties=any(p.presence_penalty or p.frequency_penalty for p in params),
            tops=tops if any(tops) else [],
            matched=[row for row, s in enumerate(sequences) if s.matcher is not None],
        )


def _draw(logits_BV: Tensor, sequences: Seq[Sequence], rules: Rules, counts_B: IntArray) -> list[Drawn]:
    """counts_B: tokens that each sequence has sampled so far."""
    uniforms_B = torch.from_numpy(uniforms(rules.streams_B, counts_B)).to(logits_BV.device)
    penalised_BV = penalise(logits_BV, rules.params, [s.tokens for s in sequences]) if rules.penalties else None
    if rules.matched:
        matchers = {row: sequences[row].matcher for row in rules.matched}
        allowed = {row: matcher.allowed() for row, matcher in matchers.items() if matcher is not None}
        penalised_BV = restrict(logits_BV if penalised_BV is None else penalised_BV, allowed)
    tokens_B, logprobs_B, norms_B1 = draw(logits_BV, rules.warp, uniforms_B, penalised_BV)
    tokens, logprobs = tokens_B.tolist(), logprobs_B.tolist()
    if not rules.tops:
        return [Drawn(*each) for each in zip(sequences, tokens, logprobs, strict=True)]
    tops = likeliest(rules.warp.scaled(logits_BV) - norms_B1, rules.tops)
    return [Drawn(*each) for each in zip(sequences, tokens, logprobs, tops, strict=True)]
