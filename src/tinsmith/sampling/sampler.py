"""Continuous batching over one base: requests come in, each step moves all of them on, results come out.

Owns the queues and the order of things in a step; memory is decided by `blocks` and laid out by `kv`, prompts are
chosen by `admission`, the arithmetic is in `prefill` and `decode`. What stays true: a sequence's tokens and logprobs
are a function of its request, its adapter and the base, never of what else is running; a request leaves nothing behind
when it ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from functools import partial

import structlog
import torch

from tinsmith.config import Settings
from tinsmith.errors import ConfigError, TinsmithError
from tinsmith.model import BaseModel
from tinsmith.sampling.adapters import AdapterCache
from tinsmith.sampling.admission import Chunk, Turns, plan_prefill
from tinsmith.sampling.contexts import probe_kv_shape
from tinsmith.sampling.decode import Decoder, Drawn
from tinsmith.sampling.grammar import Grammars
from tinsmith.sampling.kv import KVCache
from tinsmith.sampling.limits import SampleLimits
from tinsmith.sampling.memory import Memory
from tinsmith.sampling.prefill import run_prefill
from tinsmith.sampling.prefix import PrefixCache
from tinsmith.sampling.rng import streams
from tinsmith.sampling.scores import PromptScores
from tinsmith.sampling.seats import Seats
from tinsmith.sampling.sequence import Request, Sequence
from tinsmith.sampling.stop import Detokenizer, StopRule
from tinsmith.training.runs import Weights
from tinsmith.types import Failure, OpId, RunState, SampleCost, SampleItem, SamplePiece, SampleResult

log = structlog.get_logger("tinsmith.worker")

GRAMMAR_WAIT_S = 0.02  # a step lasts so long where there is nothing but schemas to be compiled

Ended = list[tuple[OpId, SampleResult | Failure]]

NON_FINITE = Failure(
    "non_finite_logits",
    "user",
    "the model gives no finite probabilities with these weights: they diverged in training; sample from an earlier "
    "checkpoint, or train with a lower learning rate",
)
NO_FORM = Failure(
    "unsupported",
    "user",
    "the answer could not be held to json_schema: it is too complex, or the model has no tokens for it; simplify it",
)
INTERNAL = Failure("internal", "server", "the server failed on this request; its log has the details. Send it again")


class Sampler:
    """All sample requests of one base model. Not thread-safe.

    memory: what the requests hold; to be looked at, not changed.
    """

    def __init__(self, base: BaseModel, settings: Settings, tokenizer: Detokenizer) -> None:
        """Raises: ConfigError: the KV memory holds not even one block."""
        self._base = base
        self._settings = settings
        self._tokenizer = tokenizer
        with torch.inference_mode():
            shape = probe_kv_shape(base)
        total = settings.kv_cache_mib * 2**20 // shape.block_bytes
        self._limits = SampleLimits(base.info, total, shape.block_bytes)
        if total < 1:
            raise ConfigError(f"--kv-cache-mib must be at least {self._limits.mib(1)} for {base.info.name}")
        self.memory = Memory(KVCache(shape, total), self._limits.max_need)
        self._prefixes = PrefixCache(settings.prefill_chunk_tokens, settings.prefix_cache_mib * 2**20)
        self._grammars = Grammars(base.info)
        self._adapters = AdapterCache(base, settings.max_resident_adapters, settings.resident_adapters_mib * 2**20)
        self._decoder = Decoder(base, self.memory.kv)
        self._requests: dict[OpId, Request] = {}
        self._schemed: list[Request] = []  # their schema isn't compiled yet
        self._waiting: list[Request] = []  # nothing computed yet
        self._begun: list[Request] = []  # in prefill
        self._ready: list[Request] = []  # prompt computed, some sequences not started
        self._running: dict[Sequence, None] = {}  # decoding, oldest first
        self._paused: set[Sequence] = set()  # running ones that wait for memory
        self._short: set[str] = set()  # tenants to whom memory was refused in this step
        self._turns = Turns()

    def has_adapter(self, key: str) -> bool:
        return key in self._adapters

    def add_adapter(self, key: str, state: RunState, *, may_keep: bool = False) -> None:
        """Freeze a copy of the state's `param` part under `key`; the least recently used that nobody needs may go.

        may_keep: the state's own arrays may be what is frozen.

        Raises:
            UserError: the state's layers or shapes aren't those of this base.
        """
        self._adapters.add(key, state, may_keep=may_keep)

    def add_weights(self, key: str, weights: Weights) -> None:
        """The same of a copy that the trainer made for this."""
        self._adapters.put(key, weights.spec, weights.row_P)

    def has_adapter_room(self, num_bytes: int) -> bool:
        """Whether the memory for adapters allows one more whose file is so large."""
        return self._adapters.has_room(num_bytes)

    @property
    def num_samples(self) -> int:
        """Requests submitted and not yet returned by `step`."""
        return len(self._requests)

    def submit(self, item: SampleItem) -> None:
        """Queue a request.

        Raises:
            UserError: it can never be carried out: beyond the context or the KV memory, or its adapter isn't loaded.
        """
        max_tokens = self._limits.max_tokens(item)
        adapter = None if item.adapter is None else self._adapters.acquire(item.adapter)
        request = Request(
            item=item,
            adapter=adapter,
            stop=StopRule.of(item.params, self._base.info.eos_tokens, self._tokenizer),
            max_tokens=max_tokens,
            streams=streams(item.seed, item.num_samples),
            scores=PromptScores(item),
        )
        self._requests[item.op_id] = request
        (self._waiting if item.params.json_schema is None else self._schemed).append(request)

    def cancel(self, op_id: OpId) -> SampleCost:
        """Forget a request and free what it holds; what was computed for it until now. Unknown ids are ignored."""
        request = self._requests.get(op_id)
        if request is None:
            return SampleCost()
        num_sampled = request.num_sampled + sum(len(s.tokens) for s in self._running if s.request is request)
        with torch.inference_mode():
            self._drop(request)
        return SampleCost(request.num_prefilled - request.num_cached, request.num_cached, num_sampled)

    def step(self) -> Ended:
        """Move every running sequence on by one token, compute some prompts, start sequences; return what ended."""
        ended: Ended = []
        self._await_grammars(ended)
        with torch.inference_mode():
            self._grow()
            if self._running:
                self._take(self._decoder.step(self._paused), ended)
            self._prefill(ended)
            self._start(ended)
        return ended

    def progress(self, since: Mapping[OpId, Mapping[int, int]]) -> list[SamplePiece]:
        """See `engine.Engine.progress`."""
        pieces: list[SamplePiece] = []
        for sequence in self._running:
            op_id = sequence.request.item.op_id
            start = since[op_id].get(sequence.index, 0) if op_id in since else len(sequence.tokens)
            if start < len(sequence.tokens):
                pieces.append(SamplePiece(op_id, sequence.index, start, sequence.result(False, start)))
        return pieces

    def _await_grammars(self, ended: Ended) -> None:
        """Requests whose schema has been compiled begin to wait with the others."""
        if self._schemed and len(self._schemed) == len(self._requests):
            self._grammars.wait(GRAMMAR_WAIT_S)
        for request in list(self._schemed):
            found = self._grammars.find(request.item.params.json_schema or "", request.item.scope)
            if isinstance(found, TinsmithError):
                self._drop(request)
                ended.append((request.item.op_id, found.as_failure()))
            elif found is not None:
                request.grammar = found
                self._schemed.remove(request)
                self._waiting.append(request)

    def _grow(self) -> None:
        """Sequences at the end of their blocks get one more, oldest first; those that can't have it pause."""
        self._paused = {s for s in self._running if s.must_grow and not self.memory.grow(s)}
        self._short |= {s.request.tenant for s in self._paused}

    def _prefill(self, ended: Ended) -> None:
        may_begin = partial(self._may_begin, self._seats())
        asking = self._turns.sorted([*self._begun, *self._waiting])
        chunks = plan_prefill(asking, set(self._begun), self._settings.prefill_chunk_tokens, may_begin)
        self._short.clear()
        if not chunks:
            return
        self._turns.serve(chunk.request for chunk in chunks)
        for chunk in self._compute(chunks, ended):
            if chunk.request.prompt_kv is not None:
                self._prefixes.keep(chunk.request.item, chunk.request.prompt_kv, chunk.start, chunk.end)
        self._ready += [request for request in self._begun if request.is_prefilled]
        self._begun = [request for request in self._begun if not request.is_prefilled]

    def _compute(self, chunks: Seq[Chunk], ended: Ended) -> Seq[Chunk]:
        """The chunks that could be computed; where not all can be at once, one by one, and requests to blame fail."""
        try:
            run_prefill(self._base, chunks)
        except Exception as error:
            if len(chunks) > 1:
                return [done for chunk in chunks for done in self._compute([chunk], ended)]
            self._fail(chunks[0].request, error, ended)
            return []
        return chunks

    def _may_begin(self, seats: Seats, request: Request) -> bool:
        """Whether seats and memory allow a prompt to be computed; takes its memory if so, and what is known of it.

        While those that came before lack memory, nobody new begins; of another tenant, those who hold less may.
        """
        coming = [r for r in (*self._begun, *self._ready) if r.tenant == request.tenant]
        room = seats.room(request.tenant)
        is_next_of_line = room > 0 and all(r.line != request.line for r in coming)
        if room <= sum(r.num_unstarted for r in coming) and not is_next_of_line:
            return False
        held = self.memory.held_by(request.tenant)
        if any(self.memory.held_by(tenant) <= held for tenant in self._short):
            return False
        if not self.memory.open_prompt(request) or request.prompt_kv is None:
            return False
        request.num_cached = self._prefixes.fill(request.item, request.prompt_kv, request.num_skippable)
        request.num_prefilled = request.num_cached
        self._waiting.remove(request)
        self._begun.append(request)
        return True

    def _start(self, ended: Ended) -> None:
        """Begin sequences of computed prompts, where seats and memory allow: each gets its first token."""
        started: list[Sequence] = []
        seats = self._seats()
        ready = [request for request in self._ready if not request.is_one_step]
        for request in self._ready:
            while request.is_one_step and request.num_unstarted:
                started.append(self._begin(request))
        while (chosen := seats.next_of(ready)) is not None:
            sequence = self._begin(chosen)
            if self.memory.seat(sequence):
                seats.take(chosen)
                self._running[sequence] = None
                started.append(sequence)
            else:
                chosen.num_started -= 1
                self._short.add(chosen.tenant)
                ready.remove(chosen)
        self._take(self._decoder.draw_first(started), ended)
        for request in self._ready:
            if not request.num_unstarted:
                request.first_logits_V = None
        self._ready = [request for request in self._ready if request.num_unstarted]

    def _begin(self, request: Request) -> Sequence:
        sequence = Sequence(request, request.num_started)
        sequence.matcher = None if request.grammar is None else request.grammar.matcher()
        request.num_started += 1
        return sequence

    def _seats(self) -> Seats:
        """Paused sequences take none: the one that is seated now may be the one that frees memory for them."""
        return Seats(self._settings.max_resident_samples, (s for s in self._running if s not in self._paused))

    def _take(self, drawn: Seq[Drawn], ended: Ended) -> None:
        """What goes wrong with one sequence fails its request alone."""
        for each in drawn:
            request = each.sequence.request
            if request.item.op_id not in self._requests:
                continue
            try:
                if each.error is not None:
                    raise each.error
                self._accept(each, ended)
            except Exception as error:
                self._fail(request, error, ended)

    def _fail(self, request: Request, error: Exception, ended: Ended) -> None:
        log.error("sample failed", op_id=request.item.op_id, exc_info=error)
        self._drop(request)
        ended.append((request.item.op_id, INTERNAL))

    def _accept(self, drawn: Drawn, ended: Ended) -> None:
        """Append a drawn token to its sequence, and end the sequence and its request where that is due."""
        sequence, logprob = drawn.sequence, drawn.logprob
        request = sequence.request
        op_id = request.item.op_id
        if not math.isfinite(logprob):
            self._drop(request)
            ended.append((op_id, NON_FINITE))
            return
        sequence.tokens.append(drawn.token)
        sequence.logprobs.append(logprob)
        if drawn.top is not None:
            sequence.tops.append(drawn.top)
        is_stopped = request.stop.ends(sequence.tokens)
        if sequence.matcher is not None and not is_stopped and not sequence.matcher.accept(drawn.token):
            self._drop(request)
            ended.append((op_id, NO_FORM))
            return
        if not is_stopped and len(sequence.tokens) < request.max_tokens:
            return
        self._leave(sequence)
        request.finished[sequence.index] = sequence.result(is_stopped)
        if request.is_finished:
            result = request.result()
            self._drop(request)
            ended.append((op_id, result))

    def _leave(self, sequence: Sequence) -> None:
        self._running.pop(sequence, None)
        self._paused.discard(sequence)
        self.memory.leave(sequence)

    def _drop(self, request: Request) -> None:
        del self._requests[request.item.op_id]
        for sequence in [s for s in self._running if s.request is request]:
            self._leave(sequence)
        self.memory.close_prompt(request)
        if request in self._schemed:
            self._grammars.forget(request.item.params.json_schema or "", request.item.scope)
        for queue in (self._schemed, self._waiting, self._begun, self._ready):
            if request in queue:
                queue.remove(request)
        if request.item.adapter is not None:
            self._adapters.release(request.item.adapter)
