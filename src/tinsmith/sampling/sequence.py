"""The state of one sample request and of each sequence sampled for it. Plain data; the sampler moves it on.

A `Prompt` is what a prefill computes: the prompt of a request, or all that a preempted sequence had in its KV.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from tinsmith.model.vision import Scene
from tinsmith.pictures import Picture
from tinsmith.route_tape import RouteArray, RouteTape
from tinsmith.sampling.blocks import num_blocks
from tinsmith.sampling.grammar import Grammar, Matcher
from tinsmith.sampling.kv import PromptKV
from tinsmith.sampling.lora import Adapter
from tinsmith.sampling.paged import PagedPrompt
from tinsmith.sampling.rng import UInt64Array
from tinsmith.sampling.scores import PromptScores, Top
from tinsmith.sampling.stop import StopRule
from tinsmith.types import SampledSequence, SampleItem, SampleResult, TokenArray


@dataclass(slots=True, eq=False)
class Request:
    """One sample request: waiting, then in prefill, then with sequences that start as memory allows.

    prompt_routes, finished_routes: of a request that records them, int16 [., L, K], see `route_tape`.
    num_cached: tokens at the prompt's beginning that needed no computing.
    arrival: its number among all requests. sequences: those under way. num_preempted: how often its prompt lost its KV.
    has_begun: it has a token.
    max_tokens: resolved, at least 1. prompt_kv: there from the start of the prefill until the last sequence started.
    first_logits_V: float32, the logits after the whole prompt. grammar: of its schema, there before the prefill.
    scene: of the prompt's pictures.
    """

    item: SampleItem
    adapter: Adapter | None
    stop: StopRule
    max_tokens: int
    streams: UInt64Array
    scores: PromptScores
    arrival: int = 0
    num_prefilled: int = 0
    num_cached: int = 0
    num_started: int = 0
    num_preempted: int = 0
    has_begun: bool = False
    prompt_kv: PromptKV | PagedPrompt | None = None
    first_logits_V: Tensor | None = None
    grammar: Grammar | None = None
    scene: Scene | None = None
    prompt_routes: RouteArray | None = None
    sequences: dict[Sequence, None] = field(default_factory=dict)
    finished: dict[int, SampledSequence] = field(default_factory=dict)
    finished_routes: dict[int, RouteArray] = field(default_factory=dict)
    num_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = int(self.item.prompt.shape[0])

    @property
    def age(self) -> tuple[int, int]:
        """Smaller is older. A prompt whose sequences haven't all started is younger than those that have."""
        return self.arrival, self.item.num_samples

    @property
    def tokens(self) -> TokenArray:
        """What its prefill computes."""
        return self.item.prompt

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Among these tokens."""
        return self.item.pictures

    @property
    def tenant(self) -> str:
        return self.item.scope

    @property
    def line(self) -> tuple[str, str | None]:
        """The tenant, and the snapshot that it samples from: the requests of a line are taken in their order."""
        return self.item.scope, self.item.adapter

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
    def num_skippable(self) -> int:
        """Prompt tokens whose hidden states nobody needs: all before the first that is scored, and before the last."""
        return min(self.num_prompt - 1, self.scores.wanted.start)

    @property
    def sequence_need(self) -> int:
        """Blocks of one sequence at its longest: the last token that is sampled never enters the KV."""
        return num_blocks(self.num_prompt + self.max_tokens - 1)

    @property
    def prompt_blocks(self) -> int | None:
        """What the request holds besides its sequences: its prompt, which the last sequence to start takes over."""
        return num_blocks(self.num_prompt) if self.num_unstarted else None

    def result(self) -> SampleResult:
        """The answer once all sequences have finished."""
        sequences = tuple(self.finished[index] for index in range(self.item.num_samples))
        found = SampleResult(sequences, prompt_cache_hit_tokens=self.num_cached, routes=self._tape())
        return self.scores.add_to(found)

    def finish(self, sequence: Sequence, is_stopped: bool) -> None:
        """The sequence has ended."""
        self.finished[sequence.index] = sequence.result(is_stopped)
        if self.prompt_routes is not None:
            routes = np.array(sequence.routes, np.int16).reshape(-1, *self.prompt_routes.shape[1:])
            self.finished_routes[sequence.index] = routes

    def _tape(self) -> RouteTape | None:
        if self.prompt_routes is None:
            return None
        return RouteTape(self.prompt_routes, tuple(self.finished_routes[i] for i in range(self.item.num_samples)))

    @property
    def num_sampled(self) -> int:
        """Tokens of the sequences that have finished."""
        return sum(len(sequence.tokens) for sequence in self.finished.values())


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample under way. tokens and logprobs: what was sampled; the last token has not entered the KV yet.

    tops: the likeliest tokens of each position, if they were asked for. matcher: holds the text to a schema, if the
    request has one.
    routes: of the tokens that entered the KV since the prompt, int16 [L, K] each, where they are recorded.
    num_blocks: the blocks of its KV; 0 while it has no KV of its own. num_preempted: how often it lost them.
    most_tokens: as many as it had when it started again.
    """

    request: Request
    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[Top] = field(default_factory=list)
    matcher: Matcher | None = None
    routes: list[RouteArray] = field(default_factory=list)
    num_blocks: int = 0
    num_preempted: int = 0
    most_tokens: int = 0

    @property
    def age(self) -> tuple[int, int]:
        return self.request.arrival, self.index

    @property
    def num_sampled(self) -> int:
        """Tokens, each counted once: those that are sampled again were told, it may be."""
        return max(len(self.tokens), self.most_tokens)

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def offset(self) -> int:
        """What the rotary position of a sampled token exceeds its place by."""
        return 0 if self.request.scene is None else self.request.scene.offset

    @property
    def num_kv(self) -> int:
        """Positions of the KV that are filled."""
        return self.request.num_prompt + len(self.tokens) - 1

    @property
    def kv_tokens(self) -> TokenArray:
        """The tokens whose keys and values are in the KV: the prompt and what was sampled, but for the last."""
        prompt = self.request.item.prompt
        return np.concatenate([prompt, np.array(self.tokens[:-1], prompt.dtype)])

    @property
    def must_grow(self) -> bool:
        """The next token's keys and values have no room."""
        return num_blocks(self.num_kv + 1) > self.num_blocks

    @property
    def pending(self) -> tuple[int, int]:
        """The token that enters the KV next, and its position."""
        return self.tokens[-1], self.num_kv

    def start_again(self) -> None:
        """Forget all that was sampled but the first token, after which nothing but the prompt is in the KV."""
        self.most_tokens = self.num_sampled
        del self.tokens[1:], self.logprobs[1:], self.tops[1:], self.routes[:]
        if self.request.grammar is not None:
            self.matcher = self.request.grammar.matcher()
            self.matcher.accept(self.tokens[0])

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
        tops = self.tops[start:]
        return replace(
            sequence,
            topk_tokens=np.array([ids for ids, _ in tops], np.int32).reshape(-1, k),
            topk_logprobs=np.array([logprobs for _, logprobs in tops], np.float32).reshape(-1, k),
        )


@dataclass(slots=True, eq=False)
class Recompute:
    """The KV of a preempted sequence, computed again: its prompt and what was sampled, but for the last token.

    What was drawn stands; only keys and values are made anew. What a step of its own made before may differ from that
    in the last bits; a prompt doesn't.
    """

    sequence: Sequence
    tokens: TokenArray
    num_prefilled: int = 0
    prompt_kv: PromptKV | PagedPrompt | None = None

    @classmethod
    def of(cls, sequence: Sequence) -> Recompute:
        return cls(sequence, sequence.kv_tokens)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Among the prompt's tokens, which are the first."""
        return self.sequence.request.item.pictures

    @property
    def age(self) -> tuple[int, int]:
        return self.sequence.age

    @property
    def adapter(self) -> Adapter | None:
        return self.sequence.request.adapter

    @property
    def scene(self) -> Scene | None:
        return self.sequence.request.scene

    @property
    def tenant(self) -> str:
        return self.sequence.request.tenant

    @property
    def line(self) -> tuple[str, str | None]:
        return self.sequence.request.line

    @property
    def num_prompt(self) -> int:
        return len(self.tokens)

    @property
    def num_skippable(self) -> int:
        """All: nothing is read off but keys and values. The last is computed, so that every chunk has a row."""
        return len(self.tokens) - 1

    @property
    def is_prefilled(self) -> bool:
        return self.num_prefilled == len(self.tokens)

    @property
    def prompt_blocks(self) -> int:
        """Room for the next token too, so that the sequence finds its place."""
        return num_blocks(len(self.tokens) + 1)


Prompt = Request | Recompute
