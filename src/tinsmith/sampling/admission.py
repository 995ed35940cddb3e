"""Which prompts are computed in this step. Pure: a function of the requests and of what may start.

First come, first served; fairness between tenants is the scheduler's business. A prompt is cut at multiples of the
chunk size, counted from its own start, so where it is cut doesn't depend on what else is in the pass. A step carries
at most one chunk's worth of tokens, hence at most one chunk of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tinsmith.sampling.sequence import Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions start..end-1 of a request's prompt."""

    request: Request
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def is_last(self) -> bool:
        return self.end == self.request.num_prompt


def plan_prefill(
    begun: Iterable[Request], waiting: Iterable[Request], chunk_tokens: int, may_begin: Callable[[Request], bool]
) -> list[Chunk]:
    """The chunks of this step, at most `chunk_tokens` in all, requests in order.

    Args:
        begun: requests in prefill, oldest first.
        waiting: requests not begun, oldest first; the first that may not begin holds back those behind it.
        may_begin: asked just before a request would begin; a True is acted on. It may move `num_prefilled` on by whole
            chunks.
    """
    chunks: list[Chunk] = []
    left = chunk_tokens
    for request in begun:
        chunk = next_chunk(request, chunk_tokens)
        if chunk.num_tokens > left:
            return chunks
        chunks.append(chunk)
        left -= chunk.num_tokens
    for request in waiting:
        chunk = next_chunk(request, chunk_tokens)
        if chunk.num_tokens > left or not may_begin(request):
            return chunks
        chunk = next_chunk(request, chunk_tokens)  # where it begins may be cached; then its first chunk was a whole one
        chunks.append(chunk)
        left -= chunk.num_tokens
    return chunks


def next_chunk(request: Request, chunk_tokens: int) -> Chunk:
    """The part of the prompt up to the next multiple of `chunk_tokens`."""
    start = request.num_prefilled
    return Chunk(request, start, min(request.num_prompt, (start // chunk_tokens + 1) * chunk_tokens))
