"""The sample requests that this worker has taken into the engine, and the snapshots that they sample from."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

import structlog
from google.protobuf.message import EncodeError

from tinsmith.crashpoints import crash_point
from tinsmith.engine import Engine
from tinsmith.errors import CorruptError, TinsmithError, UserError
from tinsmith.files.blobs import Blobs, stem
from tinsmith.observe import series
from tinsmith.observe.about import about
from tinsmith.store import Store
from tinsmith.store.rows import OpRow, SamplerWeights
from tinsmith.store.usage_rows import Usage
from tinsmith.types import Array, BlobKey, Failure, OpId, SampleResult, SamplerId, TenantId
from tinsmith.wire.media import PROTOBUF
from tinsmith.wire.meta import SampleMeta, read_meta
from tinsmith.wire.sampling import encode_sample_result
from tinsmith.worker.accounts import Accounts
from tinsmith.worker.decode import Payloads
from tinsmith.worker.full_turns import FullTurns
from tinsmith.worker.outcomes import Outcome, computed, failed
from tinsmith.worker.publishing import Publisher
from tinsmith.worker.readahead import ReadAhead
from tinsmith.worker.telling import Telling

log = structlog.get_logger("tinsmith.worker")

RATIO = 7  # a tenant's bytes to those that stay free
MAX_BYTES = 256 * 2**20  # of the payloads of what is in the engine; a prompt takes at most twice its bytes there


class Samples:
    def __init__(
        self,
        engine: Engine,
        store: Store,
        blobs: Blobs,
        payloads: Payloads,
        publisher: Publisher,
        ahead: ReadAhead,
        accounts: Accounts,
        telling: Telling,
        use: Callable[[TenantId, Usage], None],
    ) -> None:
        """accounts: charged with what a request may cost at its start, corrected at its end. `use` is told what was
        computed for a cancelled one."""
        self._engine = engine
        self._store = store
        self._blobs = blobs
        self._payloads = payloads
        self._publisher = publisher
        self._ahead = ahead
        self._accounts = accounts
        self.num_coming = 0
        self._telling = telling
        self._use = use
        self._resident: dict[OpId, OpRow] = {}
        self._prompt_tokens: dict[OpId, int] = {}
        self._held_bytes: Counter[TenantId] = Counter()  # of their payloads
        self._full_turns = FullTurns()

    @property
    def resident(self) -> Collection[OpRow]:
        return self._resident.values()

    @property
    def tenants(self) -> frozenset[TenantId]:
        """Whose requests these are."""
        return frozenset(op.tenant_id for op in self._resident.values())

    def ready(self, ops: Sequence[OpRow]) -> list[OpRow]:
        """Those of the waiting requests whose weights are here, or can be taken in without waiting for a disk.

        Together with those that are there they stay within `MAX_BYTES`, and no tenant takes all of it.
        The others' weights are read meanwhile, each tenant's oldest first; for unwritten ones, their run is computed.
        """
        if not ops:
            self._full_turns.choose((), self._engine.full_snapshots, 0, time.monotonic())
            self.num_coming = 0
            return []
        weights = self._store.samplers.weights({op.sampler_id for op in ops if op.sampler_id is not None})
        counts: Counter[TenantId] = Counter()
        turns: list[tuple[int, int]] = []
        for index, op in enumerate(ops):
            turns.append((counts[op.tenant_id], index))
            counts[op.tenant_id] += 1
        chosen: set[int] = set()
        new_bytes: dict[BlobKey, int] = {}
        turns.sort()
        held = self._held_bytes.copy()
        wanted = [(ops[i].tenant_id, stem(blob)) for _, i in turns if (blob := _full_blob(ops[i], weights))]
        num_places = self._engine.num_full_places if wanted else 0
        full = self._full_turns.choose(wanted, self._engine.full_snapshots, num_places, time.monotonic())
        for _, index in turns:
            op = ops[index]
            if not _has_room(held, op):
                continue
            sampler_id = op.sampler_id
            found = weights.get(sampler_id) if sampler_id is not None else None
            if found is None or self._is_ready(found, new_bytes, full):
                chosen.add(index)
                held[op.tenant_id] += op.payload_bytes
        self.num_coming = len(ops) - len(chosen)
        return [op for index, op in enumerate(ops) if index in chosen]

    def _is_ready(self, found: SamplerWeights, new_bytes: dict[BlobKey, int], full: Collection[str]) -> bool:
        """new_bytes: the files that are to be taken in with the requests chosen so far; this one's is added. full: the
        snapshots of full runs that may be sampled from now."""
        if found.is_full and found.blob is not None and stem(found.blob) not in full and not found.is_lost:
            return False
        if found.blob is None or self._engine.has_adapter(stem(found.blob)) or found.blob in new_bytes:
            return True
        if found.is_promised:
            return found.is_lost or self._publisher.holds(found.blob)
        if not self._ahead.want(found.blob):
            return False
        if found.is_full:
            return True
        try:
            size = self._blobs.size(found.blob)
        except TinsmithError:
            return True  # `admit` says what is wrong
        if not self._engine.has_adapter_room(size + sum(new_bytes.values())):
            return False
        new_bytes[found.blob] = size
        return True

    def admit(self, op: OpRow) -> Outcome | None:
        """Hand a claimed request to the engine; its outcome, if it is refused."""
        try:
            item = replace(
                self._payloads.sample_item(op, self._adapter(op)), weight=self._accounts.weight(op.tenant_id)
            )
            self._engine.submit_sample(item)
        except TinsmithError as error:
            return failed(op, error.as_failure())
        self._resident[op.id] = op
        self._held_bytes[op.tenant_id] += op.payload_bytes
        self._prompt_tokens[op.id] = int(item.prompt.size)
        self._accounts.charge_sample(op, op.cost_tokens)
        if read_meta(op.meta, SampleMeta).stream:
            self._telling.begin(op.id)
        return None

    def step(self) -> list[Outcome]:
        """Advance all resident sequences; the outcomes of the requests that ended."""
        outcomes: list[Outcome] = []
        started = time.perf_counter()
        ended = self._engine.step_samples()
        series.SAMPLE_STEP.observe(time.perf_counter() - started)
        for op_id in self._engine.begun_samples():
            series.SAMPLE_FIRST.observe(max(0.0, time.time() - self._resident[op_id].created_at))
        for op_id, result in ended:
            op = self._resident.pop(op_id)
            self._let_go(op)
            self._telling.end(op_id)
            num_prompt = self._prompt_tokens.pop(op_id)
            if isinstance(result, Failure):
                outcomes.append(failed(op, result))
            else:
                usage = _usage(num_prompt, result)
                encode = partial(_encoded, op, result)
                outcomes.append(computed(op, encode, _num_bytes(result), PROTOBUF, usage, result.routes))
                self._accounts.charge_sample(op, min(0, usage.sampled_tokens - op.cost_tokens))
        self._telling.tell()
        if outcomes:
            crash_point("sample.before_record")
        return outcomes

    def drop_cancelled(self) -> list[tuple[OpRow, Usage]]:
        """Free what requests hold that were cancelled meanwhile; what was computed for each, which its tenant is
        charged."""
        used: list[tuple[OpRow, Usage]] = []
        for op_id in self._store.ops.final_among(self._resident):
            op = self._resident.pop(op_id)
            self._let_go(op)
            del self._prompt_tokens[op_id]
            self._telling.end(op_id)
            cost = self._engine.cancel_sample(op_id)
            self._accounts.charge_sample(op, min(0, cost.num_sampled - op.cost_tokens))
            usage = Usage(
                prefill_tokens=cost.num_prefilled, cached_tokens=cost.num_cached, sampled_tokens=cost.num_sampled
            )
            used.append((op, usage))
            self._use(op.tenant_id, usage)
        return used

    def abandon(self) -> list[OpRow]:
        """Forget all resident requests; sampled again, with the same seeds, they give the same."""
        abandoned = list(self._resident.values())
        for op in abandoned:
            self._engine.cancel_sample(op.id)
            self._telling.end(op.id)
            self._accounts.charge_sample(op, -op.cost_tokens)
        self._resident.clear()
        self._held_bytes.clear()
        self._prompt_tokens.clear()
        return abandoned

    def _let_go(self, op: OpRow) -> None:
        self._held_bytes[op.tenant_id] -= op.payload_bytes
        if not self._held_bytes[op.tenant_id]:
            del self._held_bytes[op.tenant_id]

    def _adapter(self, op: OpRow) -> str | None:
        if op.sampler_id is None:
            raise UserError("this request needs a sampler")
        sampler = self._store.samplers.get_any(op.sampler_id)
        if sampler.blob is None:
            return None
        key = stem(sampler.blob)
        if not self._engine.has_adapter(key) and not self._publisher.restore(key):
            if sampler.promised_seq is not None:
                raise CorruptError(
                    f"the weights of the sampler {sampler.sampler_id} are lost with the state of its run: restore the "
                    "data directory from a backup, or make a new sampler"
                )
            self._engine.add_adapter(key, self._ahead.take(sampler.blob), may_keep=True)
        return key


def _full_blob(op: OpRow, weights: Mapping[SamplerId, SamplerWeights]) -> BlobKey | None:
    """The snapshot of a full run that a request is for."""
    found = None if op.sampler_id is None else weights.get(op.sampler_id)
    return found.blob if found is not None and found.is_full else None


def _has_room(held: Counter[TenantId], op: OpRow) -> bool:
    """Whether a request's payload fits beside what tenants hold: alone always, else as seats are shared
    (`sampling.seats`), so that whoever comes finds some room."""
    free = MAX_BYTES - held.total() - op.payload_bytes
    own = held[op.tenant_id]
    return not held or (free >= 0 and (not own or own + op.payload_bytes <= RATIO * free))


def _encoded(op: OpRow, result: SampleResult) -> bytes | Failure:
    """The result's bytes; a failure of this request alone, if it can't be written."""
    try:
        return encode_sample_result(result)
    except (EncodeError, MemoryError, ValueError) as error:
        log.error("a sample's result could not be written", **about([op]), exc_info=error)
        message = "the result of this request could not be written: send it as several smaller ones"
        return Failure(code="internal", category="server", message=message)


def _num_bytes(result: SampleResult) -> int:
    """Of the arrays of a result."""
    arrays: list[Array | None] = [
        array
        for sequence in result.sequences
        for array in (sequence.tokens, sequence.logprobs, sequence.topk_tokens, sequence.topk_logprobs)
    ]
    arrays += [result.prompt_logprobs, result.topk_prompt_tokens, result.topk_prompt_logprobs]
    arrays += [result.prompt_target_logprobs, result.prompt_alt_tokens, result.prompt_alt_logprobs]
    return sum(array.nbytes for array in arrays if array is not None)


def _usage(num_prompt: int, result: SampleResult) -> Usage:
    """The prompt counts once, however many samples were drawn from it."""
    num_cached = min(num_prompt, result.prompt_cache_hit_tokens)
    return Usage(
        prefill_tokens=num_prompt - num_cached,
        cached_tokens=num_cached,
        sampled_tokens=sum(len(sequence.tokens) for sequence in result.sequences),
    )
