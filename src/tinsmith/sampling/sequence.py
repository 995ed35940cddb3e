"""The state of one sample request and of each sequence sampled for it. Plain data; the sampler moves it on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from tinsmith.sampling.blocks import Claim, num_blocks
from tinsmith.sampling.grammar import Matcher
from tinsmith.sampling.kv import PromptKV
from tinsmith.sampling.lora import Adapter
from tinsmith.sampling.rng import UInt64Array
from tinsmith.sampling.stop import StopRule
from tinsmith.types import FloatArray, SampledSequence, SampleItem, SampleResult, TokenArray

TopRow = tuple[list[int], list[float]]  # the most likely tokens at one position and their logprobs

NO_LOGPROB = -99999.0  # what the wire has for a position without a distribution


@dataclass(slots=True, eq=False)
class Request:
    """One sample request: waiting, then in prefill, then with sequences that start as memory allows.

    max_tokens: resolved, at least 1. prompt_kv: there from the start of the prefill until the last sequence started.
    first_logits_V: float32, the logits after the whole prompt.
    """

    item: SampleItem
    adapter: Adapter | None
    stop: StopRule
    max_tokens: int
    streams: UInt64Array
    num_prefilled: int = 0
    num_started: int = 0
    prompt_kv: PromptKV | None = None
    first_logits_V: Tensor | None = None
    prompt_logprobs: list[FloatArray] = field(default_factory=list)
    topk_tokens: list[TokenArray] = field(default_factory=list)
    topk_logprobs: list[FloatArray] = field(default_factory=list)
    finished: dict[int, SampledSequence] = field(default_factory=dict)

    @property
    def num_prompt(self) -> int:
        return int(self.item.prompt.shape[0])

    @property
    def num_unstarted(self) -> int:
        return self.item.num_samples - self.num_started

    @property
    def is_prefilled(self) -> bool:
        return self.num_prefilled == self.num_prompt

    @property
    def is_finished(self) -> bool:
        return len(self.finished) == self.item.num_samples

    @property
    def is_one_step(self) -> bool:
        """Nothing is decoded: the prefill alone gives the one token of each sequence."""
        return self.max_tokens == 1

    @property
    def sequence_need(self) -> int:
        """Blocks of one sequence at its longest: the last token that is sampled never enters the KV."""
        return num_blocks(self.num_prompt + self.max_tokens - 1)

    def claim(self) -> Claim | None:
        """What the request holds besides its sequences: its prompt, which the last sequence to start takes over."""
        held = num_blocks(self.num_prompt)
        if self.num_unstarted == 0:
            return None
        if self.is_one_step:
            return Claim(held, held)
        return Claim(held, self.sequence_need + (held if self.num_unstarted > 1 else 0))

    def result(self) -> SampleResult:
        """The answer once all sequences have finished."""
        result = SampleResult(tuple(self.finished[index] for index in range(self.item.num_samples)))
        if self.item.prompt_logprobs:
            nan = np.full(1, np.nan, np.float32)
            result = replace(result, prompt_logprobs=np.concatenate([nan, *self.prompt_logprobs]))
        k = self.item.topk_prompt_logprobs
        if k:
            no_tokens, no_logprobs = np.zeros((1, k), np.int32), np.full((1, k), NO_LOGPROB, np.float32)
            result = replace(
                result,
                topk_prompt_tokens=np.concatenate([no_tokens, *self.topk_tokens]),
                topk_prompt_logprobs=np.concatenate([no_logprobs, *self.topk_logprobs]),
            )
        return result


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample under way. tokens and logprobs: what was sampled; the last token has not entered the KV yet. topk: of
    each position, if the request wants them. matcher: holds the text to a schema, if the request has one.

    num_blocks: its KV length class; 0 before it has KV of its own.
    """

    request: Request
    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[TopRow] = field(default_factory=list)
    matcher: Matcher | None = None
    num_blocks: int = 0

    @property
    def num_kv(self) -> int:
        """Positions of the KV that are filled."""
        return self.request.num_prompt + len(self.tokens) - 1

    @property
    def must_grow(self) -> bool:
        """The next token's keys and values have no room."""
        return num_blocks(self.num_kv + 1) > self.num_blocks

    @property
    def pending(self) -> tuple[int, int]:
        """The token that enters the KV next, and its position."""
        return self.tokens[-1], self.num_kv

    @property
    def repeated(self) -> tuple[int, int]:
        """The token that a decode step put into the KV last, and its position. Computing it again changes no bit."""
        return self.tokens[-2], self.num_kv - 1

    def claim(self, num_held: int) -> Claim:
        return Claim(num_held, self.request.sequence_need)

    def result(self, is_stopped: bool, start: int = 0) -> SampledSequence:
        """What was sampled, from token number `start` on."""
        sequence = SampledSequence(
            tokens=np.array(self.tokens[start:], np.int32),
            logprobs=np.array(self.logprobs[start:], np.float32),
            stopped=is_stopped,
        )
        k = self.request.item.topk_sample_logprobs
        if not k:
            return sequence
        rows = self.topk[start:]
        return replace(
            sequence,
            topk_tokens=np.array([tokens for tokens, _ in rows], np.int32).reshape(-1, k),
            topk_logprobs=np.array([logprobs for _, logprobs in rows], np.float32).reshape(-1, k),
        )
