"""KV memory as the sampler sees it: prompts open, sequences are seated, grow and leave.

Joins the ledger of blocks and the tensors. Each call that takes memory says whether it was granted; a refusal changes
nothing. A tenant leaves some for others, unless one of its requests needs all.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from tinsmith.sampling.blocks import BlockManager, Claim, FreeBlocks, Ledger, num_blocks
from tinsmith.sampling.kv import KVCache, wider
from tinsmith.sampling.paged import PagedKV
from tinsmith.sampling.seats import fair_share
from tinsmith.sampling.sequence import Prompt, Recompute, Request, Sequence


@dataclass(slots=True, eq=False)
class Shared:
    """Blocks that sequences of a prompt have in common. is_claimed: their prompt is closed, they count themselves."""

    num_blocks: int
    num_users: int = 0
    is_claimed: bool = False

    @property
    def claim(self) -> Claim:
        return Claim(self.num_blocks, self.num_blocks)


class Memory:
    """keeps_all: nothing is ever taken back (the banker's ledger); otherwise what is free is granted."""

    def __init__(self, kv: KVCache[Sequence] | PagedKV[Sequence], max_need: int, keeps_all: bool = False) -> None:
        """`max_need`: blocks of the largest request that may be asked for, which a tenant can have in any case."""
        self.kv = kv
        self._state_blocks = kv.shape.state_blocks
        self.keeps_all = keeps_all
        self._shared: dict[Prompt, Shared] = {}  # of open prompts
        self._uses: dict[Sequence, Shared] = {}
        ledger = BlockManager if keeps_all else FreeBlocks
        self._blocks: Ledger = ledger(kv.total, min(kv.total, max(max_need, fair_share(kv.total))))

    @property
    def num_held_blocks(self) -> int:
        return self._blocks.num_held

    def held_by(self, tenant: str) -> int:
        """Blocks."""
        return self._blocks.held_by(tenant)

    def is_at_bound(self, tenant: str) -> bool:
        """Whether the tenant could have no block more even if all were free."""
        return self._blocks.is_at_bound(tenant)

    def open_prompt(self, prompt: Prompt, spare: int = 0) -> bool:
        """Memory for all of a prompt, before its first chunk is computed; `spare` blocks are left free."""
        if not self._blocks.try_update({prompt: self._prompt_claim(prompt)}, prompt.tenant, spare):
            return False
        prompt.prompt_kv = self.kv.open_prompt(prompt, prompt.num_prompt)
        return True

    def close_prompt(self, prompt: Prompt) -> None:
        """Its memory is free again, but for what its sequences have in common."""
        shared = self._shared.pop(prompt, None)
        self.kv.close_prompt(prompt)
        prompt.prompt_kv = None
        if shared is None or not shared.num_users:
            self._blocks.release(prompt, prompt.tenant)
            return
        is_granted = self._blocks.try_update({prompt: None, shared: shared.claim}, prompt.tenant)
        assert is_granted, "what is shared is a part of the prompt"
        shared.is_claimed = True

    def seat(self, sequence: Sequence, spare: int = 0) -> bool:
        """Give a new sequence, counted in `num_started`, its copy of the prompt and room for the first decode step.

        What sequences of a prompt have in common counts once. The last one takes over the prompt's memory.
        """
        request = sequence.request
        size = num_blocks(request.num_prompt + 1)
        num_shared = 0 if self.keeps_all else self.kv.num_shared(request.num_prompt)
        shared = self._shared.get(request) or Shared(num_shared)
        is_last = not request.num_unstarted
        claims: dict[Hashable, Claim | None] = {
            request: self._prompt_claim(request), sequence: self._with_state(sequence.claim(size - num_shared)),
        }  # fmt: skip
        if is_last and num_shared:
            claims[shared] = shared.claim
        if not self._blocks.try_update(claims, request.tenant, 0 if is_last else spare):
            return False
        self.kv.place(sequence, request, size)
        sequence.num_blocks = size
        if num_shared:
            shared.num_users += 1
            self._shared[request] = self._uses[sequence] = shared
        if is_last:
            self._shared.pop(request, None)
            shared.is_claimed = True
            self.close_prompt(request)
        return True

    def reseat(self, recompute: Recompute) -> None:
        """Give a sequence its KV back, which has been computed again; it takes over that memory."""
        sequence = recompute.sequence
        size = num_blocks(recompute.num_prompt + 1)
        is_granted = self._blocks.try_update(
            {recompute: None, sequence: self._with_state(sequence.claim(size))}, sequence.tenant
        )
        assert is_granted, "it was opened with room for its next token"
        self.kv.place(sequence, recompute, size)
        sequence.num_blocks = size
        self.close_prompt(recompute)

    def grow(self, sequence: Sequence) -> bool:
        """Room for one more token: several blocks at once for a long sequence, if there are so many."""
        last = sequence.num_blocks + 1
        shared = self._uses.get(sequence)
        num_shared = shared.num_blocks if shared is not None else 0
        for size in sorted({last, min(wider(last), sequence.request.sequence_need)}, reverse=True):
            claim = self._with_state(sequence.claim(size - num_shared))
            if self._blocks.try_update({sequence: claim}, sequence.tenant):
                self.kv.move(sequence, sequence.num_blocks, size, sequence.num_kv)
                sequence.num_blocks = size
                return True
        return False

    def _with_state(self, claim: Claim, num_owners: int = 1) -> Claim:
        """What it holds, with the states of one, and at most with those of so many."""
        return Claim(claim.held + self._state_blocks, claim.need + num_owners * self._state_blocks)

    def _prompt_claim(self, prompt: Prompt) -> Claim | None:
        claim = prompt.claim()
        if claim is None:
            return None
        shares = isinstance(prompt, Request) and prompt.num_unstarted > 1 and not prompt.is_one_step
        return self._with_state(claim, 2 if shares else 1)

    def leave(self, sequence: Sequence) -> None:
        """Free a sequence's memory, if it has any."""
        if sequence.num_blocks:
            self.kv.release(sequence, sequence.num_blocks)
            sequence.num_blocks = 0
        self._blocks.release(sequence, sequence.tenant)
        shared = self._uses.pop(sequence, None)
        if shared is not None:
            shared.num_users -= 1
            if shared.is_claimed and not shared.num_users:
                self._blocks.release(shared, sequence.tenant)
