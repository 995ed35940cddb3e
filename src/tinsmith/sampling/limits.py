"""What a request may ask for: the context of the base and the KV memory bound it. Pure arithmetic on sizes."""

from __future__ import annotations

from dataclasses import dataclass

from tinsmith.errors import UserError
from tinsmith.sampling.blocks import BLOCK_TOKENS, num_blocks
from tinsmith.types import BaseInfo, SampleItem


@dataclass(frozen=True, slots=True)
class SampleLimits:
    """kv_blocks: all blocks of the KV memory, each of `block_bytes`. state_blocks: how many the states of a sequence
    take, and those of a prompt."""

    info: BaseInfo
    kv_blocks: int
    block_bytes: int
    state_blocks: int = 0

    @property
    def max_need(self) -> int:
        """Blocks of the largest request: a sequence of the whole context, and its prompt beside it."""
        return 2 * (num_blocks(self.info.max_context) + self.state_blocks)

    def mib(self, blocks: int) -> int:
        """The value of --kv-cache-mib that holds so many blocks."""
        return -(-blocks * self.block_bytes // 2**20)

    def max_tokens(self, item: SampleItem) -> int:
        """The most tokens a sequence of this request may get: what it asks for, else as far as there is room.

        Raises:
            UserError: it can never be carried out; the message names the cure.
        """
        num_prompt = int(item.prompt.shape[0])
        asked = item.params.max_tokens
        room = self.info.max_context - num_prompt
        if num_prompt == 0:
            raise UserError("the prompt is empty: give at least one token")
        if room < 1:
            raise UserError(
                f"the prompt has {num_prompt} tokens; {self.info.name} holds {self.info.max_context}, with at least "
                "one to sample: shorten it"
            )
        if asked is not None and not 1 <= asked <= room:
            raise UserError(
                f"prompt ({num_prompt}) plus max_tokens ({asked}) must fit the context of {self.info.name}, "
                f"{self.info.max_context}: ask for 1 to {room} tokens"
            )
        reach = self._reach(item)
        if (asked or 1) > reach:
            need_mib = self.mib(self._need(item, asked or 1))
            raise UserError(
                f"prompt ({num_prompt}) and max_tokens ({asked or 1}) need {need_mib} MiB for keys and values, the "
                f"sampler has {self.mib(self.kv_blocks)}: shorten them, or start the server with "
                f"--kv-cache-mib {need_mib}"
            )
        return min(room, reach) if asked is None else asked

    def _need(self, item: SampleItem, max_tokens: int) -> int:
        """Blocks that one sequence of the request takes at its longest, and its prompt if others share that."""
        prompt = num_blocks(item.prompt.shape[0]) + self.state_blocks
        if max_tokens == 1:
            return prompt
        whole = num_blocks(item.prompt.shape[0] + max_tokens - 1) + self.state_blocks
        return whole + (prompt if item.num_samples > 1 else 0)

    def _reach(self, item: SampleItem) -> int:
        """The largest max_tokens whose need the memory holds; 0 if not even the prompt fits."""
        num_prompt = int(item.prompt.shape[0])
        prompt = num_blocks(num_prompt) + self.state_blocks
        if prompt > self.kv_blocks:
            return 0
        shared = prompt if item.num_samples > 1 else 0
        return max(1, (self.kv_blocks - shared - self.state_blocks) * BLOCK_TOKENS - num_prompt + 1)
