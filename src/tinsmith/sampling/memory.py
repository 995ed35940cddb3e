"""KV memory as the sampler sees it: prompts open, sequences are seated, grow and leave.

Joins the ledger of blocks and the tensors. Each call that takes memory says whether it was granted; a refusal changes
nothing. A tenant leaves some for others, unless one of its requests needs all.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from tinsmith.sampling.blocks import FreeBlocks, num_blocks
from tinsmith.sampling.kv import KVCache, wider
from tinsmith.sampling.paged import PagedKV
from tinsmith.sampling.seats import fair_share
from tinsmith.sampling.sequence import Prompt, Recompute, Sequence


@dataclass(slots=True, eq=False)
class Shared:
    """Blocks that sequences of a prompt have in common. is_counted: their prompt is closed, they count themselves."""

    num_blocks: int
    num_users: int = 0
    is_counted: bool = False


class Memory:
    def __init__(self, kv: KVCache[Sequence] | PagedKV[Sequence], max_need: int) -> None:
        """`max_need`: blocks of the largest request that may be asked for, which a tenant can have in any case."""
        self.kv = kv
        self._state_blocks = kv.shape.state_blocks
        self._shared: dict[Prompt, Shared] = {}  # of open prompts
        self._uses: dict[Sequence, Shared] = {}
        self._blocks = FreeBlocks(kv.total, min(kv.total, max(max_need, fair_share(kv.total))))

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
        if not self._blocks.try_update({prompt: self._prompt_blocks(prompt)}, prompt.tenant, spare):
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
        is_granted = self._blocks.try_update({prompt: None, shared: shared.num_blocks}, prompt.tenant)
        assert is_granted, "what is shared is a part of the prompt"
        shared.is_counted = True

    def seat(self, sequence: Sequence, spare: int = 0) -> bool:
        """Give a new sequence, counted in `num_started`, its copy of the prompt and room for the first decode step.

        What sequences of a prompt have in common counts once. The last one takes over the prompt's memory.
        """
        request = sequence.request
        size = num_blocks(request.num_prompt + 1)
        num_shared = self.kv.num_shared(request.num_prompt)
        shared = self._shared.get(request) or Shared(num_shared)
        is_last = not request.num_unstarted
        held: dict[Hashable, int | None] = {
            request: self._prompt_blocks(request), sequence: size - num_shared + self._state_blocks,
        }  # fmt: skip
        if is_last and num_shared:
            held[shared] = num_shared
        if not self._blocks.try_update(held, request.tenant, 0 if is_last else spare):
            return False
        self.kv.place(sequence, request, size)
        sequence.num_blocks = size
        if num_shared:
            shared.num_users += 1
            self._shared[request] = self._uses[sequence] = shared
        if is_last:
            self._shared.pop(request, None)
            shared.is_counted = True
            self.close_prompt(request)
        return True

    def reseat(self, recompute: Recompute) -> None:
        """Give a sequence its KV back, which has been computed again; it takes over that memory."""
        sequence = recompute.sequence
        size = num_blocks(recompute.num_prompt + 1)
        is_granted = self._blocks.try_update({recompute: None, sequence: size + self._state_blocks}, sequence.tenant)
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
            if self._blocks.try_update({sequence: size - num_shared + self._state_blocks}, sequence.tenant):
                self.kv.move(sequence, sequence.num_blocks, size, sequence.num_kv)
                sequence.num_blocks = size
                return True
        return False

    def _prompt_blocks(self, prompt: Prompt) -> int | None:
        """With its states; None once its last sequence has taken it over."""
        held = prompt.prompt_blocks
        return None if held is None else held + self._state_blocks

    def leave(self, sequence: Sequence) -> None:
        """Free a sequence's memory, if it has any."""
        if sequence.num_blocks:
            self.kv.release(sequence, sequence.num_blocks)
            sequence.num_blocks = 0
        self._blocks.release(sequence, sequence.tenant)
        shared = self._uses.pop(sequence, None)
        if shared is not None:
            shared.num_users -= 1
            if shared.is_counted and not shared.num_users:
                self._blocks.release(shared, sequence.tenant)
