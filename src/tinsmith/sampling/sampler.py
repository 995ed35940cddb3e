"""Continuous batching over one base: requests come in, each step moves all of them on, results come out.

Owns the order of things in a step; `stages` says how far each has come, memory is decided by `blocks` and laid out by
`kv`, prompts are chosen by `admission`, who gives memory back by `preemption`, the arithmetic is in `walk`. What stays
true: a sequence's tokens and logprobs are a function of its request, its adapter and the base, not of what else is
running: to the bit in deterministic mode; otherwise keys and values may be computed once more, or be found in the
prefix cache, which changes them in the last bits. A request leaves nothing behind when it ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial

import structlog
import torch

from tinsmith.config import Settings
from tinsmith.errors import ConfigError, TinsmithError, UserError
from tinsmith.model import BaseModel
from tinsmith.sampling.adapters import AdapterCache
from tinsmith.sampling.admission import Chunk
from tinsmith.sampling.blocks import BLOCK_TOKENS
from tinsmith.sampling.contexts import probe_kv_shape
from tinsmith.sampling.decode import Drawn
from tinsmith.sampling.grammar import Grammars
from tinsmith.sampling.graphs import Capture
from tinsmith.sampling.intake import Intake
from tinsmith.sampling.kv import KVCache
from tinsmith.sampling.limits import SampleLimits
from tinsmith.sampling.memory import Memory
from tinsmith.sampling.paged import PagedKV
from tinsmith.sampling.preemption import PreemptionCounts, spare_blocks
from tinsmith.sampling.prefix import PrefixCache
from tinsmith.sampling.rng import streams
from tinsmith.sampling.scores import PromptScores
from tinsmith.sampling.sequence import Request, Sequence
from tinsmith.sampling.stages import Stages
from tinsmith.sampling.stop import Detokenizer, StopRule
from tinsmith.sampling.walk import Walker
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

    memory: what the requests hold; to be looked at, not changed. begun: requests whose first token the last step gave.
    """

    def __init__(
        self,
        base: BaseModel,
        settings: Settings,
        tokenizer: Detokenizer,
        kv_blocks: int | None = None,
        is_paged: bool | None = None,
        capture: Capture | None = None,
    ) -> None:
        """`kv_blocks`: instead of what the setting comes to. `is_paged`, `capture`: instead of what suits the device.

        Raises:
            ConfigError: the KV memory holds not even one block.
            UnsupportedError: see `graphs.decode_graphs`.
        """
        self._base = base
        self._settings = settings
        self._tokenizer = tokenizer
        with torch.inference_mode():
            shape = probe_kv_shape(base)
        max_prefix_bytes = settings.prefix_cache_mib * 2**20
        grid = settings.prefill_chunk_tokens if settings.deterministic else BLOCK_TOKENS
        shape = replace(shape, grid=grid if max_prefix_bytes else 0)
        is_paged = base.device.type == "cuda" if is_paged is None else is_paged
        total = settings.kv_cache_mib * 2**20 // shape.block_bytes if kv_blocks is None else kv_blocks
        if is_paged and shape.states and kv_blocks is None:
            total //= 2  # pages are taken at once, and states come beside them
        self._limits = SampleLimits(base.info, total, shape.block_bytes, shape.state_blocks)
        if total < 1 + shape.state_blocks:
            least = self._limits.mib((1 + shape.state_blocks) * (2 if is_paged and shape.states else 1))
            raise ConfigError(f"--kv-cache-mib must be at least {least} for {base.info.name}")
        kv: PagedKV[Sequence] | KVCache[Sequence] = KVCache(shape, total)
        if is_paged:
            kv = PagedKV(shape, total, max_prefix_bytes)
        self.memory = Memory(kv, self._limits.max_need)
        self._prefixes = PrefixCache(grid, max_prefix_bytes, has_states=bool(shape.states))
        self._stages = Stages(self.memory, self._prefixes, is_exact=settings.deterministic)
        self._grammars = Grammars(base.info)
        self._adapters = AdapterCache(base, settings.max_resident_adapters, settings.resident_adapters_mib * 2**20)
        may_compile = settings.compiled_adapters
        self._walker = Walker(
            base, self.memory.kv, settings.deterministic, settings.cuda_graphs, capture, may_compile=may_compile
        )
        self._num_submitted = 0
        self._requests: dict[OpId, Request] = {}
        self._schemed: dict[Request, None] = {}  # their schema isn't compiled yet
        self._intake = Intake(self._stages, settings)
        self._num_seats = settings.max_resident_samples
        self.begun: list[OpId] = []

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

    @property
    def num_running(self) -> int:
        """Sequences that the next step decodes."""
        return len(self._stages.running)

    @property
    def seats(self) -> tuple[int, int]:
        """(sequences that the next step decodes, the most that it may)."""
        return self.num_running, self._num_seats

    @property
    def kv_bytes(self) -> tuple[int, int]:
        """(held by requests, all)."""
        block_bytes = self.memory.kv.shape.block_bytes
        return self.memory.num_held_blocks * block_bytes, self.memory.kv.total * block_bytes

    @property
    def preemptions(self) -> PreemptionCounts:
        """Since the start."""
        return self._stages.counts

    def submit(self, item: SampleItem) -> None:
        """Queue a request.

        Raises:
            UserError: it can never be carried out: beyond the context or the KV memory, or its adapter isn't loaded.
        """
        max_tokens = self._limits.max_tokens(item)
        scene = self._base.scene(item.prompt, item.pictures)
        adapter = None if item.adapter is None else self._adapters.acquire(item.adapter)
        self._num_submitted += 1
        request = Request(
            item=item,
            adapter=adapter,
            stop=StopRule.of(item.params, self._base.info.eos_tokens, self._tokenizer),
            max_tokens=max_tokens,
            streams=streams(item.seed, item.num_samples),
            scores=PromptScores(item),
            arrival=self._num_submitted,
            scene=scene,
        )
        self._requests[item.op_id] = request
        if item.params.json_schema is None:
            self._stages.wait(request)
        else:
            self._schemed[request] = None

    def cancel(self, op_id: OpId) -> SampleCost:
        """Forget a request and free what it holds; what was computed for it until now. Unknown ids are ignored."""
        request = self._requests.get(op_id)
        if request is None:
            return SampleCost()
        num_sampled = request.num_sampled + sum(sequence.num_sampled for sequence in request.sequences)
        num_prefilled = max(request.num_prefilled, request.num_prompt if request.num_started else 0)
        with torch.inference_mode():
            self._drop(request)
        return SampleCost(max(0, num_prefilled - request.num_cached), request.num_cached, num_sampled)

    def step(self) -> Ended:
        """Move every running sequence on by one token, compute some prompts, start sequences; return what ended."""
        ended: Ended = []
        self.begun = []
        self._await_grammars(ended)
        with torch.inference_mode():
            self._grow()
            chunks = self._intake.plan()
            self._take(self._walk(chunks, ended), ended)
            self._start(ended)
        return ended

    def progress(self, since: Mapping[OpId, Mapping[int, int]]) -> list[SamplePiece]:
        """See `engine.Engine.progress`."""
        pieces: list[SamplePiece] = []
        for op_id, known in since.items():
            request = self._requests.get(op_id)
            for sequence in () if request is None else request.sequences:
                start = known.get(sequence.index, 0)
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
                del self._schemed[request]
                self._stages.wait(request)

    def _grow(self) -> None:
        """Sequences at the end of their blocks get more, oldest first. Where there is none, somebody gives back."""
        stages = self._stages
        for sequence in sorted((s for s in stages.running if s.must_grow), key=lambda s: s.age):
            if sequence in stages.running:  # it may have given back itself by now
                stages.make_room(sequence, partial(self.memory.grow, sequence))

    def _walk(self, chunks: Seq[Chunk], ended: Ended) -> Seq[Drawn]:
        """Compute the step. Where all together fails, prompts are computed one by one; those to blame fail."""
        stages = self._stages
        if not chunks and not stages.running:
            return []
        try:
            drawn = self._walker.walk(chunks)
            done = chunks
        except Exception:
            if not chunks:
                raise
            drawn = self._walker.walk(()) if stages.running else []
            done = [chunk for chunk in chunks if self._is_computed(chunk, ended)]
        for chunk in done:
            if chunk.prompt in stages.begun:
                stages.computed(chunk.prompt, chunk.start, chunk.end)
        return drawn

    def _is_computed(self, chunk: Chunk, ended: Ended) -> bool:
        """Compute a chunk by itself; if that can't be done, its request fails."""
        prompt = chunk.prompt
        request = prompt if isinstance(prompt, Request) else prompt.sequence.request
        if request.item.op_id not in self._requests:
            return False  # another chunk of the same request failed
        try:
            self._walker.prefill([chunk])
        except UserError as error:
            self._drop(request)
            ended.append((request.item.op_id, error.as_failure()))
            return False
        except Exception as error:
            self._fail(request, error, ended)
            return False
        return True

    def _start(self, ended: Ended) -> None:
        """Begin sequences of computed prompts, where seats and memory allow: each gets its first token."""
        stages = self._stages
        if not stages.ready:
            return
        started: list[Sequence] = []
        seats = self._intake.seats()
        for request in stages.ready:
            while request.is_one_step and request.num_unstarted:
                started.append(self._begin(request))
        for chosen in seats.in_turn([request for request in stages.ready if not request.is_one_step]):
            if chosen not in stages.ready:
                seats.refuse(chosen)  # it ended, or gave its memory back
                continue
            sequence = self._begin(chosen)
            is_seated = self.memory.seat(sequence, spare_blocks(self.memory.kv.total, len(stages.running)))
            if not is_seated and stages.is_oldest(chosen):
                self._draw_first(started, ended)  # so that all who may have to give back have a token
                is_seated = chosen in stages.ready and stages.make_room(chosen, partial(self.memory.seat, sequence))
            if is_seated:
                seats.take(chosen)
                stages.run(sequence)
                started.append(sequence)
            else:
                chosen.num_started -= 1
                chosen.sequences.pop(sequence, None)
                seats.refuse(chosen)
                stages.refused.add(chosen.tenant)
        self._draw_first(started, ended)
        for request in [request for request in stages.ready if not request.num_unstarted]:
            request.first_logits_V = None
            del stages.ready[request]

    def _draw_first(self, started: list[Sequence], ended: Ended) -> None:
        """And forget the list."""
        self._take(self._walker.decoder.draw_first(started), ended)
        started.clear()

    def _begin(self, request: Request) -> Sequence:
        sequence = Sequence(request, request.num_started)
        sequence.matcher = None if request.grammar is None else request.grammar.matcher()
        request.num_started += 1
        request.sequences[sequence] = None
        return sequence

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
        log.error("sample failed", op_id=request.item.op_id, tenant_id=request.tenant, exc_info=error)
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
        if not request.has_begun:
            request.has_begun = True
            self.begun.append(op_id)
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
        self._stages.leave(sequence)
        request.finish(sequence, is_stopped)
        if request.is_finished:
            result = request.result()
            self._drop(request)
            ended.append((op_id, result))

    def _drop(self, request: Request) -> None:
        del self._requests[request.item.op_id]
        self._stages.drop(request)
        if request in self._schemed:
            del self._schemed[request]
            self._grammars.forget(request.item.params.json_schema or "", request.item.scope)
        if request.item.adapter is not None:
            self._adapters.release(request.item.adapter)
        counts = self._stages.counts
        if not self._requests and counts.num_preempted:
            log.info("KV memory ran out", preempted=counts.num_preempted, recomputed_tokens=counts.num_recomputed)
