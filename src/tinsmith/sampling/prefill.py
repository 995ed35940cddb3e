"""One prefill pass: chunks of prompts in, keys and values, prompt logprobs and the logits after the prompt out.

Shape letters: T rows, D hidden size, V vocabulary, F prompts that end in this pass.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from tinsmith.model import HEAD, BaseModel, padded_rows
from tinsmith.sampling.admission import Chunk
from tinsmith.sampling.contexts import PrefillContext, Segment, adapter_logits, head_logits, pad_rows

HEAD_ROWS = 128  # rows whose logits are held at once


def run_prefill(base: BaseModel, chunks: Seq[Chunk]) -> None:
    """Compute the chunks and move their requests on; each request's `prompt_kv` is open."""
    segments = _segments(chunks)
    num_rows = padded_rows(segments[-1].last)
    tokens = np.zeros(num_rows, np.int64)
    positions = np.zeros(num_rows, np.int64)
    for chunk, segment in zip(chunks, segments, strict=True):
        tokens[segment.first : segment.last] = chunk.request.item.prompt[chunk.start : chunk.end]
        positions[segment.first : segment.last] = np.arange(chunk.start, chunk.end)
    hidden_TD = base.hidden(
        torch.from_numpy(tokens).to(base.device),
        torch.from_numpy(positions).to(base.device),
        PrefillContext(segments, base.device),
    )
    for chunk, segment in zip(chunks, segments, strict=True):
        chunk.request.num_prefilled = chunk.end
        if chunk.request.scores.wanted:
            _score(base, chunk, hidden_TD[segment.first : segment.last])
    _first_logits(base, [(c, s) for c, s in zip(chunks, segments, strict=True) if c.is_last], hidden_TD)


def _segments(chunks: Seq[Chunk]) -> list[Segment]:
    segments: list[Segment] = []
    first = 0
    for chunk in chunks:
        request = chunk.request
        assert request.prompt_kv is not None, "the prompt's memory is opened before its first chunk"
        last = first + chunk.num_tokens
        segments.append(Segment(first, last, chunk.start, request.adapter, request.prompt_kv))
        first = last
    return segments


def _score(base: BaseModel, chunk: Chunk, hidden_ND: Tensor) -> None:
    """What the request wants to know of its prompt, as far as the chunk's positions say."""
    request = chunk.request
    wanted = request.scores.wanted
    end = min(chunk.end, wanted.stop)
    for start in range(max(chunk.start, wanted.start), end, HEAD_ROWS):
        stop = min(start + HEAD_ROWS, end)
        logits_NV = adapter_logits(base, hidden_ND[start - chunk.start : stop - chunk.start], request.adapter)
        request.scores.take(start, logits_NV)


def _first_logits(base: BaseModel, ended: Seq[tuple[Chunk, Segment]], hidden_TD: Tensor) -> None:
    """The distribution of the first sampled token of each prompt that ends in this pass."""
    if not ended:
        return
    rows = torch.tensor([segment.last - 1 for _, segment in ended], device=base.device)
    last_FD = pad_rows(hidden_TD[rows])
    logits_FV = head_logits(base, last_FD)
    for row, (chunk, segment) in enumerate(ended):
        if segment.adapter is not None:
            segment.adapter.add(HEAD, last_FD[row : row + 1], logits_FV[row : row + 1])
        chunk.request.first_logits_V = logits_FV[row].float().clone()
