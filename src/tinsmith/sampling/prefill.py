"""The prompts' part of a walk: chunks in, keys and values, prompt logprobs and the logits after the prompt out.

Shape letters: T rows, D hidden size, V vocabulary, F prompts that end in this walk.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from tinsmith.model import HEAD, BaseModel
from tinsmith.model.vision import Span, joined, positions_of
from tinsmith.sampling.admission import Chunk
from tinsmith.sampling.contexts import PrefillContext, Segment, adapter_logits, head_logits, pad_rows
from tinsmith.sampling.sequence import Prompt, Request

HEAD_ROWS = 128  # rows whose logits are held at once


class Prefill:
    """Chunks of several prompts, one after another; the `prompt_kv` of each is open. positions: rotary ones. spans: of
    the rows, to be looked at if there are pictures among them."""

    def __init__(self, base: BaseModel, chunks: Seq[Chunk]) -> None:
        self._base = base
        self.chunks = chunks
        self._segments = _segments(chunks)
        self.context = PrefillContext(self._segments, base.device, base.dtype, base.lora)
        self.spans = [
            Span(c.prompt.scene, c.start, c.end, s.first, None if s.adapter is None else s.adapter.lens)
            for c, s in zip(chunks, self._segments, strict=True)
        ]
        self.tokens = np.concatenate([c.prompt.tokens[c.start : c.end] for c in chunks]).astype(np.int64)
        self.positions = joined([positions_of(c.prompt.scene, c.start, c.end) for c in chunks])

    def finish(self, hidden_TD: Tensor) -> None:
        """Take what the walk gave for these rows, and move the prompts on."""
        parts = [(c, hidden_TD[s.first : s.last]) for c, s in zip(self.chunks, self._segments, strict=True)]
        for chunk, hidden_ND in parts:
            if isinstance(chunk.prompt, Request) and chunk.prompt.scores.wanted:
                _score(self._base, chunk.prompt, chunk, hidden_ND)
        _first_logits(self._base, [(c.prompt, h_ND) for c, h_ND in parts if c.is_last])
        for chunk in self.chunks:
            chunk.prompt.num_prefilled = chunk.end
            if chunk.prompt.prompt_kv is not None:
                chunk.prompt.prompt_kv.states.advance(chunk.end)


def _segments(chunks: Seq[Chunk]) -> list[Segment]:
    segments: list[Segment] = []
    first = 0
    for chunk in chunks:
        prompt = chunk.prompt
        assert prompt.prompt_kv is not None, "the prompt's memory is opened before its first chunk"
        last = first + chunk.num_tokens
        last_seen = None if prompt.scene is None else prompt.scene.last_seen(chunk.start, chunk.end)
        segments.append(Segment(first, last, chunk.start, prompt.adapter, prompt.prompt_kv, last_seen))
        first = last
    return segments


def _score(base: BaseModel, request: Request, chunk: Chunk, hidden_ND: Tensor) -> None:
    """What the request wants to know of its prompt, as far as the chunk's positions say."""
    wanted = request.scores.wanted
    end = min(chunk.end, wanted.stop)
    for start in range(max(chunk.start, wanted.start), end, HEAD_ROWS):
        stop = min(start + HEAD_ROWS, end)
        logits_NV = adapter_logits(base, hidden_ND[start - chunk.start : stop - chunk.start], request.adapter)
        request.scores.take(start, logits_NV)


def _first_logits(base: BaseModel, ended: Seq[tuple[Prompt, Tensor]]) -> None:
    """The distribution of the first sampled token of each request whose prompt ends in this walk."""
    requests = [(prompt, hidden_ND) for prompt, hidden_ND in ended if isinstance(prompt, Request)]
    if not requests:
        return
    last_FD = pad_rows(torch.cat([hidden_ND[-1:] for _, hidden_ND in requests]))
    logits_FV = head_logits(base, last_FD)
    for row, (request, _) in enumerate(requests):
        if request.adapter is not None:
            request.adapter.add(HEAD, last_FD[row : row + 1], logits_FV[row : row + 1])
    base.final.apply_(logits_FV)
    for row, (request, _) in enumerate(requests):
        request.first_logits_V = logits_FV[row].float().clone()
