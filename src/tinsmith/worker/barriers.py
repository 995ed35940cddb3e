"""Carries out the ops that stand between passes: create, load, save, optimizer steps.

Each touches one run. Creating, loading, stepping and making a sampler without a name act at once; another save copies
the run and leaves the file to the writer, so its outcome comes later, through `settle`. A failed op leaves its run as
it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet

import structlog

from tinsmith.crashpoints import crash_point
from tinsmith.engine import Engine
from tinsmith.errors import NotFoundError, TinsmithError, UserError
from tinsmith.files.adapter_files import pack_external
from tinsmith.files.blobs import BlobInfo, Blobs, checkpoint_key, stem
from tinsmith.files.checkpoint_file import read_state, state_pieces
from tinsmith.observe import series
from tinsmith.observe.about import about
from tinsmith.store import Store
from tinsmith.store.rows import NewCheckpoint, NewSampler, OpRow, RunRow
from tinsmith.types import BlobKey, CheckpointKind, Failure, OpId, OpKind, OptimItem, Role, RunState, SamplerId
from tinsmith.wire import results
from tinsmith.wire.meta import CreateMeta, LoadMeta, SaveExternalMeta, SaveMeta, SaveSamplerMeta, read_meta
from tinsmith.worker.decode import Payloads
from tinsmith.worker.outcomes import Outcome, failed, succeeded
from tinsmith.worker.publishing import Publisher
from tinsmith.worker.runs import HeldRuns
from tinsmith.worker.unwritten import Unwritten
from tinsmith.worker.writer import Writer

log = structlog.get_logger("tinsmith.worker")


class Barriers:
    def __init__(
        self,
        engine: Engine,
        store: Store,
        blobs: Blobs,
        payloads: Payloads,
        runs: HeldRuns,
        writer: Writer,
        publisher: Publisher,
        unwritten: Unwritten,
        settle: Callable[[Outcome], None],
        role: Role,
    ) -> None:
        """`settle` is called from the loop's thread with the outcome of each save, once its file is on disk.

        A worker whose role is to train alone has samplers settled like that too: another process is to read the file.
        """
        self._engine = engine
        self._store = store
        self._blobs = blobs
        self._payloads = payloads
        self._runs = runs
        self._writer = writer
        self._publisher = publisher
        self._unwritten = unwritten
        self._settle = settle
        self._role = role

    def carry_out(self, ops: Sequence[OpRow], replays: AbstractSet[OpId]) -> list[Outcome]:
        """The outcomes of all ops but those saves that are settled later. At most one op a run."""
        finished: list[Outcome] = []
        steps = [op for op in ops if op.kind is OpKind.OPTIM_STEP]
        for op in ops:
            if op.kind is OpKind.OPTIM_STEP:
                continue
            try:
                outcome = self._carry_out_one(op, is_replay=op.id in replays)
            except TinsmithError as error:
                outcome = failed(op, error.as_failure())
            if outcome is not None:
                finished.append(outcome)
        return finished + self._step(steps)

    def _carry_out_one(self, op: OpRow, *, is_replay: bool) -> Outcome | None:
        if op.kind is OpKind.CREATE and op.run_id is not None:
            return self._create(op, self._runs[op.run_id].row)
        run = self._runs.need(op.run_id).row
        if op.kind is OpKind.LOAD:
            load = read_meta(op.meta, LoadMeta)
            self._import(run, load.blob, with_optimizer=load.optimizer)
            crash_point("load.after_import")
            return succeeded(op, results.load_result(run.run_id, load.path))
        if op.kind is OpKind.SAVE:
            self._save(op, run)
            return None
        if op.kind is OpKind.SAVE_SAMPLER:
            return self._save_sampler(op, run, is_replay=is_replay)
        if op.kind is OpKind.SAVE_EXTERNAL:
            self._save_external(op, run)
            return None
        raise UserError(f"{op.kind} is not a request of a run")

    def _create(self, op: OpRow, run: RunRow) -> Outcome:
        create = read_meta(op.meta, CreateMeta)
        if create.blob is None:
            self._engine.create_run(run.spec)
            return succeeded(op, results.create_result(run.run_id))
        self._import(run, create.blob, with_optimizer=create.optimizer)
        return succeeded(op, results.load_result(run.run_id, create.path or ""))

    def _import(self, run: RunRow, blob: BlobKey, *, with_optimizer: bool) -> None:
        state = self._blobs.load(blob, read_state)
        keep = ("param/", "m/", "v/") if with_optimizer else ("param/",)
        tensors = {name: tensor for name, tensor in state.tensors.items() if name.startswith(keep)}
        step = state.step if with_optimizer else 0
        self._engine.import_run(run.spec, RunState(spec=state.spec, step=step, tensors=tensors))

    def _step(self, ops: Sequence[OpRow]) -> list[Outcome]:
        finished: list[Outcome] = []
        ready: list[tuple[OpRow, OptimItem]] = []
        for op in ops:
            try:
                run = self._runs.need(op.run_id).row
                ready.append((op, OptimItem(op.id, run.run_id, self._payloads.adam_params(op))))
            except TinsmithError as error:
                finished.append(failed(op, error.as_failure()))
        started = time.perf_counter()
        outcomes = self._engine.optim_step([item for _, item in ready]) if ready else []
        crash_point("optim.after_step")
        if ready:
            series.OPTIM_SECONDS.observe(time.perf_counter() - started)
        for (op, _), outcome in zip(ready, outcomes, strict=True):
            if isinstance(outcome, Failure):
                finished.append(failed(op, outcome))
            else:
                finished.append(succeeded(op, results.optim_result(outcome)))
        return finished

    def _save(self, op: OpRow, run: RunRow) -> None:
        save = read_meta(op.meta, SaveMeta)
        state = self._engine.export_run(run.run_id, ("param", "m", "v"))
        path = f"tinker://{run.run_id}/{CheckpointKind.TRAINING}/{save.name}"

        def outcome(info: BlobInfo) -> Outcome:
            checkpoint = NewCheckpoint(
                run_id=run.run_id,
                kind=CheckpointKind.TRAINING,
                name=save.name,
                blob=info.key,
                size_bytes=info.size,
                sha256=info.sha256,
                expires_at=_expiry(save.ttl_s),
                user_metadata=save.user_metadata,
                has_optimizer=True,
                overwrite=save.overwrite,
            )
            return succeeded(op, results.save_result(path), checkpoint=checkpoint)

        self._write(op, run, state, outcome)

    def _save_sampler(self, op: OpRow, run: RunRow, *, is_replay: bool) -> Outcome | None:
        save = read_meta(op.meta, SaveSamplerMeta)
        if save.sampler_id is not None and (is_replay or (save.name is None and self._role.samples)):
            return self._publish(op, run, save, save.sampler_id, is_replay=is_replay)
        state = self._engine.export_run(run.run_id, ("param",))

        def outcome(info: BlobInfo) -> Outcome:
            checkpoint = sampler = path = None
            if save.name is not None:
                path = f"tinker://{run.run_id}/{CheckpointKind.SAMPLER}/{save.name}"
                checkpoint = NewCheckpoint(
                    run_id=run.run_id,
                    kind=CheckpointKind.SAMPLER,
                    name=save.name,
                    blob=info.key,
                    size_bytes=info.size,
                    sha256=info.sha256,
                    expires_at=_expiry(save.ttl_s),
                    user_metadata=save.user_metadata,
                    has_optimizer=False,
                    overwrite=True,
                )
            if save.sampler_id is not None:
                sampler = NewSampler(
                    tenant_id=run.tenant_id,
                    session_id=run.session_id,
                    sampler_id=save.sampler_id,
                    base_model=run.spec.base_model,
                    model_path=path,
                    run_id=run.run_id,
                    blob=info.key,
                    spec=run.spec,
                    is_inflight=save.is_inflight,
                )
            body = results.sampler_result(path, save.sampler_id)
            return succeeded(op, body, checkpoint=checkpoint, sampler=sampler)

        self._write(op, run, state, outcome)
        return None

    def _publish(
        self, op: OpRow, run: RunRow, save: SaveSamplerMeta, sampler_id: SamplerId, *, is_replay: bool
    ) -> Outcome:
        """A sampler without a name can be used at once; again under the same key, if this was done before."""
        key = self._promised(op, sampler_id) if is_replay else checkpoint_key(run.tenant_id)
        if key is not None:
            self._publisher.publish(self._runs[run.run_id], key)
        sampler = NewSampler(
            tenant_id=run.tenant_id,
            session_id=run.session_id,
            sampler_id=sampler_id,
            base_model=run.spec.base_model,
            run_id=run.run_id,
            blob=key,
            spec=run.spec,
            is_inflight=save.is_inflight,
            promised_seq=op.seq_id,
        )
        return succeeded(op, results.sampler_result(None, sampler_id), sampler=sampler)

    def _promised(self, op: OpRow, sampler_id: SamplerId) -> BlobKey | None:
        """The key under which the op's file is still to come; None if nobody waits for it any more."""
        try:
            sampler = self._store.samplers.get_any(sampler_id)
        except NotFoundError:
            return None
        return sampler.blob if sampler.promised_seq == op.seq_id else None

    def _save_external(self, op: OpRow, run: RunRow) -> None:
        save = read_meta(op.meta, SaveExternalMeta)
        state = self._engine.export_run(run.run_id, ("param",))
        path = f"tinker://{run.run_id}/{CheckpointKind.EXTERNAL}/{save.name}"

        def dump(state: RunState) -> Iterator[memoryview]:
            return pack_external(state, self._engine.info, save.recipients, op.created_at)

        def outcome(info: BlobInfo) -> Outcome:
            checkpoint = NewCheckpoint(
                run_id=run.run_id,
                kind=CheckpointKind.EXTERNAL,
                name=save.name,
                blob=info.key,
                size_bytes=info.size,
                sha256=info.sha256,
                expires_at=_expiry(save.ttl_s),
                has_optimizer=False,
                overwrite=True,
            )
            return succeeded(op, results.external_result(path, info.size), checkpoint=checkpoint)

        self._write(op, run, state, outcome, dump)

    def _write(
        self,
        op: OpRow,
        run: RunRow,
        state: RunState,
        outcome: Callable[[BlobInfo], Outcome],
        dump: Callable[[RunState], Iterator[memoryview]] = state_pieces,
    ) -> None:
        key = checkpoint_key(run.tenant_id)
        held = self._runs[run.run_id]
        held.num_saves += 1
        num_bytes = sum(tensor.nbytes for tensor in state.tensors.values())
        self._unwritten.add(num_bytes)

        def write() -> BlobInfo:
            crash_point("save.before_file")
            stored = self._blobs.put(key, dump(state))
            crash_point("save.after_file")
            return stored

        def written(info: BlobInfo | BaseException) -> None:
            held.num_saves -= 1
            self._unwritten.remove(num_bytes)
            if isinstance(info, BaseException):
                log.error("checkpoint not written", **about([op]), error=str(info))
                message = f"the checkpoint could not be written ({type(info).__name__}): mend the disk, save again"
                self._settle(failed(op, Failure("storage", "server", message)))
                return
            if op.kind is OpKind.SAVE_SAMPLER and not run.spec.is_full:
                self._engine.add_adapter(stem(info.key), state)
            self._settle(outcome(info))

        self._writer.submit(write, written)


def _expiry(ttl_s: int | None) -> float | None:
    """A checkpoint's lifetime begins when it is written."""
    return None if ttl_s is None else time.time() + ttl_s
