"""Which prompts are computed in this step. Pure: a function of the requests and of what may start.

Tenants take turns, then the snapshots of a tenant; what is asked of one snapshot goes first come, first served. A
prompt is cut at multiples of the chunk size, counted from its own start, so where it is cut doesn't depend on what else
is in the pass. A step carries at most one chunk's worth of tokens, hence at most one chunk of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
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


class Turns:
    """When tenants and their lines were last served, in steps; whoever was never served was served long ago."""

    def __init__(self) -> None:
        self._step = 0
        self._served: dict[object, int] = {}

    def sorted(self, requests: Iterable[Request]) -> list[Request]:
        """Those first whose turn it is; requests of a line stay in their order."""
        asking = list(requests)
        keys: set[object] = {key for request in asking for key in (request.tenant, request.line)}
        self._served = {key: step for key, step in self._served.items() if key in keys}
        return sorted(asking, key=lambda r: (self._served.get(r.tenant, 0), self._served.get(r.line, 0)))

    def serve(self, requests: Iterable[Request]) -> None:
        self._step += 1
        for request in requests:
            self._served[request.tenant] = self._served[request.line] = self._step


def plan_prefill(
    requests: Iterable[Request],
    has_begun: Container[Request],
    chunk_tokens: int,
    may_begin: Callable[[Request], bool],
) -> list[Chunk]:
    """The chunks of this step, at most `chunk_tokens` in all.

    Args:
        requests: in the order in which they should be served; the first of a line that has to wait holds back those
            of the line behind it.
        has_begun: those in prefill.
        may_begin: asked just before a request would begin; a True is acted on. It may move `num_prefilled` on by whole
            chunks.
    """
    chunks: list[Chunk] = []
    left = chunk_tokens
    held_back: set[object] = set()
    for request in requests:
        if not left:
            break
        if request.line in held_back:
            continue
        fits = next_chunk(request, chunk_tokens).num_tokens <= left
        if not fits or (request not in has_begun and not may_begin(request)):
            held_back.add(request.line)
            continue
        chunk = next_chunk(request, chunk_tokens)  # where it begins may be cached; then its first chunk was a whole one
        chunks.append(chunk)
        left -= chunk.num_tokens
    return chunks


def next_chunk(request: Request, chunk_tokens: int) -> Chunk:
    """The part of the prompt up to the next multiple of `chunk_tokens`."""
    start = request.num_prefilled
    return Chunk(request, start, min(request.num_prompt, (start // chunk_tokens + 1) * chunk_tokens))
