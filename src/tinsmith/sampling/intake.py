"""What comes in: which prompts are computed in a step, and whether a new one may begin.

Joins the turns of tenants (`admission`), the seats and the memory; what is granted is taken at once.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import partial

from tinsmith.config import Settings
from tinsmith.sampling.admission import Chunk, Turns, plan_prefill
from tinsmith.sampling.preemption import spare_blocks
from tinsmith.sampling.seats import Coming, Seats
from tinsmith.sampling.sequence import Prompt, Request
from tinsmith.sampling.stages import Stages

LEAST_CHUNK = 64  # tokens, where chunks are cut finer than set


class Intake:
    def __init__(self, stages: Stages, settings: Settings) -> None:
        self._stages = stages
        self._settings = settings
        self._turns = Turns()

    def seats(self) -> Seats:
        """Who waits for memory takes none: the one that is seated now may be the one that frees it. So those who come
        back may be some too many for a while."""
        return Seats(self._settings.max_resident_samples, self._stages.running)

    def plan(self) -> Seq[Chunk]:
        """The chunks of this step. Memory of prompts that begin is taken."""
        stages = self._stages
        recomputes = stages.recomputes
        asking = [*stages.begun, *recomputes, *stages.asking(self._settings.prefill_chunk_tokens)]
        if not asking:
            stages.refused.clear()
            return []
        seats = self.seats() if stages.num_lines else Seats(0, ())
        coming = Coming(seats, (p for p in (*stages.begun, *stages.ready) if isinstance(p, Request)))
        stages.refused |= {recompute.tenant for recompute in recomputes}
        may_begin = partial(self._may_begin, coming)
        most = chunk_tokens = self._settings.prefill_chunk_tokens
        if stages.running and not self._settings.deterministic:
            chunk_tokens = min(most, max(LEAST_CHUNK, most // 4))  # those who decode wait a quarter as long at a time
        chunks = plan_prefill(self._turns.sorted(asking), set(stages.begun), chunk_tokens, may_begin, most)
        stages.refused.clear()
        self._turns.serve(chunk.prompt for chunk in chunks)
        return chunks

    def _may_begin(self, coming: Coming, prompt: Prompt) -> bool:
        """Whether seats and memory allow a prompt to be computed; takes its memory if so.

        While those that came before lack memory, nobody new begins; of another tenant, those who hold less may.
        """
        memory = self._stages.memory
        held = memory.held_by(prompt.tenant)
        is_new = isinstance(prompt, Request)
        lacking = [t for t in self._stages.refused if is_new or t != prompt.tenant]
        if any(memory.held_by(t) < held + is_new for t in lacking):
            return False
        if isinstance(prompt, Request) and not coming.may_come(prompt):
            return False
        if not memory.open_prompt(prompt, self._spare(prompt)):
            return False
        if isinstance(prompt, Request):
            coming.add(prompt)
        self._stages.begin(prompt)
        return True

    def _spare(self, prompt: Prompt) -> int:
        holder = prompt if isinstance(prompt, Request) else prompt.sequence
        return spare_blocks(self._stages.memory.kv.total, len(self._stages.running), holder.num_preempted)
