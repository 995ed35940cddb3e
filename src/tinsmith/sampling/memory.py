"""KV memory as the sampler sees it: prompts open, sequences are seated, grow and leave.

Joins the ledger of blocks and the tensors. Each call that takes memory says whether it was granted; a refusal changes
nothing. A tenant leaves some for others, unless one of its requests needs all.
"""

from __future__ import annotations

from tinsmith.sampling.blocks import BlockManager, num_blocks
from tinsmith.sampling.kv import KVCache
from tinsmith.sampling.seats import fair_share
from tinsmith.sampling.sequence import Request, Sequence


class Memory:
    def __init__(self, kv: KVCache[Sequence], max_need: int) -> None:
        """`max_need`: blocks of the largest request that may be asked for, which a tenant can have in any case."""
        self.kv = kv
        self._blocks = BlockManager(kv.total, min(kv.total, max(max_need, fair_share(kv.total))))

    @property
    def num_held_blocks(self) -> int:
        return self._blocks.num_held

    def held_by(self, tenant: str) -> int:
        """Blocks."""
        return self._blocks.held_by(tenant)

    def open_prompt(self, request: Request) -> bool:
        """Memory for all of a prompt, before its first chunk is computed."""
        if not self._blocks.try_update({request: request.claim()}, request.tenant):
            return False
        request.prompt_kv = self.kv.open_prompt(request, request.num_prompt)
        return True

    def close_prompt(self, request: Request) -> None:
        self.kv.close_prompt(request)
        self._blocks.release(request, request.tenant)
        request.prompt_kv = None

    def seat(self, sequence: Sequence) -> bool:
        """Give a new sequence, counted in `num_started`, its copy of the prompt and room for the first decode step.

        The last one takes over the prompt's memory.
        """
        request = sequence.request
        size = num_blocks(request.num_prompt + 1)
        claims = {request: request.claim(), sequence: sequence.claim(size)}
        if not self._blocks.try_update(claims, request.tenant):
            return False
        assert request.prompt_kv is not None, "a computed prompt keeps its memory until all its sequences started"
        self.kv.place(sequence, request.prompt_kv, size)
        sequence.num_blocks = size
        if not request.num_unstarted:
            self.close_prompt(request)
        return True

    def grow(self, sequence: Sequence) -> bool:
        """One more block."""
        size = sequence.num_blocks + 1
        if not self._blocks.try_update({sequence: sequence.claim(size)}, sequence.request.tenant):
            return False
        self.kv.move(sequence, sequence.num_blocks, size, sequence.num_kv)
        sequence.num_blocks = size
        return True

    def leave(self, sequence: Sequence) -> None:
        """Free a sequence's memory, if it has any."""
        if sequence.num_blocks:
            self.kv.release(sequence, sequence.num_blocks)
            sequence.num_blocks = 0
        self._blocks.release(sequence, sequence.request.tenant)
