"""How far each request and each sequence has come, and the way back when memory runs out.

    waiting ▸ begun (in prefill) ▸ ready (some sequences not started) ▸ running
                   ▴                                                       │ preempted: memory given back, tokens kept
                   └──────────────────── preempted ◂───────────────────────┘

Owns these lists and moves things between them together with their memory. Who moves when is the sampler's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice

from tinsmith.sampling.memory import Memory
from tinsmith.sampling.preemption import Holder, PreemptionCounts, choose_victim
from tinsmith.sampling.prefix import PrefixCache
from tinsmith.sampling.sequence import Prompt, Recompute, Request, Sequence

MAX_ASKING = 64  # of one line, of whom it is looked whether they may begin in this step; more where more would fit
ASKING_TOKENS = 8  # of a step's prompt tokens, for each of which one of a line is looked at
MAX_LINES = 256  # likewise; a line whose turn it was goes to the end


class Stages:
    """running: oldest first, but for those that came back. refused: tenants to whom memory was refused since the last
    prefill.

    is_exact: what gave its memory back must come to the same bits. Only the steps that made its tokens give those
    again, so it starts again from its first token, and what steps made is not kept for others.
    """

    def __init__(self, memory: Memory, prefixes: PrefixCache, *, is_exact: bool = False) -> None:
        self.memory = memory
        self.counts = PreemptionCounts()
        self.begun: dict[Prompt, None] = {}
        self.ready: dict[Request, None] = {}
        self.running: dict[Sequence, None] = {}
        self.preempted: dict[Sequence, Recompute] = {}
        self.refused: set[str] = set()
        self._waiting: dict[tuple[str, str | None], dict[Request, None]] = {}
        self._prefixes = prefixes
        self._is_exact = is_exact

    @property
    def num_waiting(self) -> int:
        return sum(len(line) for line in self._waiting.values())

    @property
    def num_lines(self) -> int:
        """Lines in which anybody waits."""
        return len(self._waiting)

    @property
    def recomputes(self) -> list[Recompute]:
        """Those that don't compute yet, oldest first."""
        return sorted((r for r in self.preempted.values() if r not in self.begun), key=lambda r: r.age)

    def wait(self, request: Request) -> None:
        self._waiting.setdefault(request.line, {})[request] = None

    def asking(self, max_tokens: int) -> Iterator[Request]:
        """The first that wait in each of the first lines, for a step that computes so many tokens of prompts."""
        lines = islice(self._waiting.values(), MAX_LINES)
        most = max(MAX_ASKING, max_tokens // ASKING_TOKENS)
        return chain.from_iterable(islice(line, most) for line in lines)

    def begin(self, prompt: Prompt) -> None:
        """Its memory is open: prefill may compute it, from where nothing is known of it."""
        assert prompt.prompt_kv is not None, "memory is opened first"
        may_cut = {} if prompt.scene is None else {"may_cut": prompt.scene.may_cut}
        skippable = 0 if isinstance(prompt, Request) and prompt.item.records_routes else prompt.num_skippable
        known = self._prefixes.fill(
            prompt.line, prompt.tokens, prompt.prompt_kv.load, skippable, prompt.pictures, **may_cut
        )
        prompt.num_prefilled = known
        self.begun[prompt] = None
        if isinstance(prompt, Request):
            self._unwait(prompt)
            if not prompt.num_preempted:
                prompt.num_cached = known
        else:
            self.counts.num_recomputed += prompt.num_prompt - known

    def computed(self, prompt: Prompt, start: int, end: int) -> None:
        """Positions start..end-1 of a prompt that has begun were computed."""
        assert prompt.prompt_kv is not None, "a prompt in prefill has its memory"
        self._prefixes.keep(prompt.line, prompt.tokens, prompt.prompt_kv.save, start, end, prompt.pictures)
        if not prompt.is_prefilled:
            return
        del self.begun[prompt]
        if isinstance(prompt, Request):
            self.ready[prompt] = None
        else:
            self.memory.reseat(prompt)
            del self.preempted[prompt.sequence]
            self.running[prompt.sequence] = None

    def run(self, sequence: Sequence) -> None:
        """It has its KV."""
        self.running[sequence] = None

    def make_room(self, holder: Holder, take: Callable[[], bool]) -> bool:
        """Have others give back until `take` succeeds. False: it was `holder`'s own turn to give back."""
        while not take():
            bound = holder.tenant if self.memory.is_at_bound(holder.tenant) else None
            victim = choose_victim(self._holders(), self.memory.held_by, bound)
            assert victim is not None, "what one sequence can need is never more than there is"
            self._preempt(victim)
            if victim is holder:
                return False
        return True

    def is_oldest(self, holder: Holder) -> bool:
        return holder.age <= min(other.age for other in self._holders())

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence, which ended or isn't wanted any more."""
        if sequence.num_blocks:
            self._keep_prefix(sequence)
        self.running.pop(sequence, None)
        self.memory.leave(sequence)
        sequence.request.sequences.pop(sequence, None)
        recompute = self.preempted.pop(sequence, None)
        if recompute is not None:
            self.memory.close_prompt(recompute)
            self.begun.pop(recompute, None)

    def drop(self, request: Request) -> None:
        """Forget a request and all that it holds."""
        for sequence in list(request.sequences):
            self.leave(sequence)
        self.memory.close_prompt(request)
        self._unwait(request)
        self.begun.pop(request, None)
        self.ready.pop(request, None)

    def _unwait(self, request: Request) -> None:
        line = self._waiting.get(request.line)
        if line is None or request not in line:
            return
        del line[request], self._waiting[request.line]
        if line:
            self._waiting[request.line] = line

    def _holders(self) -> list[Holder]:
        return [*self.running, *self.begun, *self.ready]

    def _preempt(self, holder: Holder) -> None:
        self.counts.num_preempted += 1
        if isinstance(holder, Sequence):
            self._keep_prefix(holder)
            del self.running[holder]
            self.memory.leave(holder)
            holder.num_preempted += 1
            if self._is_exact:
                self.counts.num_recomputed += len(holder.tokens) - 1
                holder.start_again()
            self.preempted[holder] = Recompute.of(holder)
            return
        self.begun.pop(holder, None)
        self.memory.close_prompt(holder)
        holder.num_prefilled = 0
        if isinstance(holder, Request):
            holder.num_preempted += 1
            self.ready.pop(holder, None)
            holder.first_logits_V = None
            line = self._waiting.get(holder.line, {})
            self._waiting[holder.line] = {holder: None, **line}

    def _keep_prefix(self, sequence: Sequence) -> None:
        """Of a model with states only prompts are kept: what a sequence wrote after them has its states at its end."""
        if self._is_exact or self.memory.kv.states is not None:
            return
        request, save = sequence.request, partial(self.memory.kv.save, sequence, sequence.num_blocks)
        self._prefixes.keep(
            request.line, sequence.kv_tokens, save, request.num_prompt, sequence.num_kv, request.pictures
        )
