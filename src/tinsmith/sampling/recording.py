"""The routes of a walk, noted for the requests that want them.

Shape letters: T rows of the walk, L routers, K experts of a row, N rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from tinsmith.model import ExpertAdapters, PassContext, Routes
from tinsmith.model.attention import AttentionKind
from tinsmith.model.delta import DeltaKind
from tinsmith.route_tape import OWN_CHOICE, RouteArray
from tinsmith.sampling.admission import Chunk
from tinsmith.sampling.sequence import Request, Sequence


class RecordedRoutes:
    """A context that notes what each router chooses, and is `inner` in everything else."""

    def __init__(self, inner: PassContext, num_routers: int) -> None:
        self._inner = inner
        self._choices: list[Tensor | None] = [None] * num_routers

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, kind: AttentionKind) -> Tensor:
        return self._inner.attend(layer, q_HTD, k_GTD, v_GTD, kind)

    def mix(self, layer: int, mixed_TC: Tensor, g_TH: Tensor, beta_TH: Tensor, kind: DeltaKind) -> Tensor:
        return self._inner.mix(layer, mixed_TC, g_TH, beta_TH, kind)

    def add_lora(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        return self._inner.add_lora(group, x_TI, y_TO)

    def experts(self, name: str, routes: Routes) -> ExpertAdapters:
        return self._inner.experts(name, routes)

    def choose(self, router: int, experts_TK: Tensor) -> Tensor:
        self._choices[router] = experts_TK
        return experts_TK

    def rows(self) -> RouteArray:
        """int16 [T, L, K]. Waits for the device."""
        choices = [choice for choice in self._choices if choice is not None]
        assert len(choices) == len(self._choices), "each router was asked"
        rows: RouteArray = torch.stack(choices, 1).to(torch.int16).cpu().numpy()
        return rows


def wants_routes(sequences: Seq[Sequence], chunks: Seq[Chunk]) -> bool:
    return any(s.request.item.records_routes for s in sequences) or any(
        isinstance(chunk.prompt, Request) and chunk.prompt.item.records_routes for chunk in chunks
    )


def note_decoded(sequences: Seq[Sequence], rows_TLK: RouteArray) -> None:
    """Row i is that of sequence i's pending token. Noted twice, the later one counts."""
    for sequence, row_LK in zip(sequences, rows_TLK, strict=False):
        if sequence.request.item.records_routes:
            place = len(sequence.tokens) - 1
            del sequence.routes[place:]
            sequence.routes.append(row_LK.copy())


def note_prompts(chunks: Seq[Chunk], rows_NLK: RouteArray) -> None:
    """The rows of the chunks, one after another."""
    first = 0
    for chunk in chunks:
        last = first + chunk.num_tokens
        request = chunk.prompt
        if isinstance(request, Request) and request.item.records_routes:
            if request.prompt_routes is None:
                request.prompt_routes = np.full((request.num_prompt, *rows_NLK.shape[1:]), OWN_CHOICE, np.int16)
            request.prompt_routes[chunk.start : chunk.end] = rows_NLK[first:last]
        first = last
