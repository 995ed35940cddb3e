"""Which prompts are computed in this step. Pure: a function of the requests and of what may start.

Tenants take turns, then the snapshots of a tenant; what is asked of one snapshot goes first come, first served, after
what has to be computed again. A prompt is cut at multiples of the chunk size, counted from its own start, so where it
is cut doesn't depend on what else is in the pass. A step carries at most one chunk's worth of tokens, and the rest of
a picture that must not be cut; hence at most one chunk of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from tinsmith.sampling.sequence import Prompt


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions start..end-1 of a prompt."""

    prompt: Prompt
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def is_last(self) -> bool:
        return self.end == self.prompt.num_prompt


class Turns:
    """When tenants and their lines were last served, in steps; whoever was never served was served long ago."""

    def __init__(self) -> None:
        self._step = 0
        self._served: dict[object, int] = {}

    def sorted(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """Those first whose turn it is; prompts of a line stay in their order."""
        asking = list(prompts)
        keys: set[object] = {key for prompt in asking for key in (prompt.tenant, prompt.line)}
        self._served = {key: step for key, step in self._served.items() if key in keys}
        return sorted(asking, key=lambda p: (self._served.get(p.tenant, 0), self._served.get(p.line, 0)))

    def serve(self, prompts: Iterable[Prompt]) -> None:
        self._step += 1
        for prompt in prompts:
            self._served[prompt.tenant] = self._served[prompt.line] = self._step


def plan_prefill(
    prompts: Iterable[Prompt],
    has_begun: Container[Prompt],
    chunk_tokens: int,
    may_begin: Callable[[Prompt], bool],
    max_tokens: int | None = None,
) -> list[Chunk]:
    """The chunks of this step.

    Args:
        max_tokens: of all chunks together; as many as one has, unless given.
        prompts: in the order in which they should be served; the first of a line that has to wait holds back those
            of the line behind it.
        has_begun: those in prefill.
        may_begin: asked just before a prompt would begin; a True is acted on. It may move `num_prefilled` on.
    """
    chunks: list[Chunk] = []
    left = max_tokens or chunk_tokens
    held_back: set[object] = set()
    for prompt in prompts:
        if not left:
            break
        if prompt.line in held_back:
            continue
        fits = next_chunk(prompt, chunk_tokens).num_tokens <= left or not chunks
        if not fits or (prompt not in has_begun and not may_begin(prompt)):
            held_back.add(prompt.line)
            continue
        chunk = next_chunk(prompt, chunk_tokens)  # where it begins may be cached; it never gets longer by that
        chunks.append(chunk)
        left = max(0, left - chunk.num_tokens)
    return chunks


def next_chunk(prompt: Prompt, chunk_tokens: int) -> Chunk:
    """The part of the prompt up to the next multiple of `chunk_tokens`; up to the end of a picture that must not be
    cut there."""
    start = prompt.num_prefilled
    end = min(prompt.num_prompt, (start // chunk_tokens + 1) * chunk_tokens)
    return Chunk(prompt, start, end if prompt.scene is None else prompt.scene.end_of_picture(end))
