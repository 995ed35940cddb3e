"""What a request wants to know of its prompt, gathered row by row while the prompt is computed.

Row i is the model's distribution after prompt token i, hence about prompt position i + 1. All logprobs here are at
temperature 1; only the draws are made at the request's own. What is found in a row depends on that row alone.
Shape letters: P prompt tokens, N rows at hand, V vocabulary, K tokens a row, B rows of a decode step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tinsmith.sampling.logits import draw_many
from tinsmith.sampling.rng import ALT_STREAMS, streams, uniforms
from tinsmith.types import FloatArray, IntArray, PromptTargets, SampleItem, SampleResult, TokenArray

NO_LOGPROB = -99999.0  # what the wire has for a position without a distribution

Top = tuple[TokenArray, FloatArray]  # ids [k] and logprobs [k], the likeliest first


class PromptScores:
    """wanted: the rows whose logits are needed, empty if nothing was asked for."""

    def __init__(self, item: SampleItem) -> None:
        self._item = item
        num_prompt = int(item.prompt.shape[0])
        is_scored = item.prompt_logprobs or item.topk_prompt_logprobs > 0
        num_scored = min(item.prompt_logprobs_last_n or num_prompt, num_prompt - 1) if is_scored else 0
        self._suffix = num_prompt - 1 - num_scored  # its first row
        self._logprobs: FloatArray = np.full(num_prompt, np.nan, np.float32)
        shape = (num_prompt, item.topk_prompt_logprobs)
        self._top_tokens: TokenArray = np.zeros(shape, np.int32)
        self._top_logprobs: FloatArray = np.full(shape, NO_LOGPROB, np.float32)
        self._targets = _Targets(item.prompt_targets) if item.prompt_targets is not None else None
        shape = (num_prompt - 1, item.prompt_alt_tokens_k)
        self._alt_tokens: IntArray = np.zeros(shape, np.int64)
        self._alt_logprobs: FloatArray = np.zeros(shape, np.float32)
        self._alt_streams = streams(item.seed, item.prompt_alt_tokens_k, first=ALT_STREAMS)
        first = min(self._suffix, self._targets.first_row if self._targets is not None else num_prompt)
        self.wanted = range(0 if item.prompt_alt_tokens_k else first, num_prompt - 1)

    def take(self, first: int, logits_NV: Tensor) -> None:
        """Rows first..first+N-1, float32."""
        logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
        skipped = max(0, self._suffix - first)
        if skipped < len(logprobs_NV):
            self._score(first + skipped, logprobs_NV[skipped:])
        if self._targets is not None:
            self._targets.score(first, logprobs_NV)
        if self._item.prompt_alt_tokens_k:
            self._draw(first, logits_NV, logprobs_NV)

    def add_to(self, result: SampleResult) -> SampleResult:
        """The result with what was asked for."""
        item = self._item
        if item.prompt_logprobs:
            result = replace(result, prompt_logprobs=self._logprobs)
        if item.topk_prompt_logprobs:
            result = replace(result, topk_prompt_tokens=self._top_tokens, topk_prompt_logprobs=self._top_logprobs)
        if self._targets is not None:
            result = replace(result, prompt_targets=item.prompt_targets, prompt_target_logprobs=self._targets.logprobs)
        if item.prompt_alt_tokens_k:
            result = replace(result, prompt_alt_tokens=self._alt_tokens, prompt_alt_logprobs=self._alt_logprobs)
        return result

    def _score(self, first: int, logprobs_NV: Tensor) -> None:
        """The prompt's own tokens, and the likeliest ones."""
        about = slice(first + 1, first + 1 + len(logprobs_NV))
        own_N = torch.from_numpy(self._item.prompt[about].astype(np.int64)).to(logprobs_NV.device)
        self._logprobs[about] = logprobs_NV.gather(1, own_N[:, None])[:, 0].cpu().numpy()
        if self._item.topk_prompt_logprobs:
            top = logprobs_NV.topk(self._item.topk_prompt_logprobs, dim=-1)
            self._top_tokens[about] = top.indices.cpu().numpy()
            self._top_logprobs[about] = top.values.cpu().numpy()

    def _draw(self, first: int, logits_NV: Tensor, logprobs_NV: Tensor) -> None:
        num = len(logits_NV)
        rows_N = np.arange(first, first + num)
        uniforms_NK = np.stack([uniforms(np.repeat(stream, num), rows_N) for stream in self._alt_streams], axis=1)
        drawn_NK = draw_many(
            logits_NV, self._item.params.temperature, torch.from_numpy(uniforms_NK).to(logits_NV.device)
        )
        self._alt_tokens[first : first + num] = drawn_NK.cpu().numpy()
        self._alt_logprobs[first : first + num] = logprobs_NV.gather(1, drawn_NK).cpu().numpy()


class _Targets:
    """Chosen ids in chosen rows. logprobs: one a cell of the request, 0 where it asked for nothing."""

    def __init__(self, targets: PromptTargets) -> None:
        self._ids = targets.ids
        self._cells = np.flatnonzero(targets.ids >= 0)
        self._rows = targets.rows[self._cells]  # ascending
        self.first_row = int(self._rows[0]) if len(self._rows) else targets.shape[0]
        self.logprobs: FloatArray = np.zeros(len(targets.ids), np.float32)

    def score(self, first: int, logprobs_NV: Tensor) -> None:
        start, end = np.searchsorted(self._rows, (first, first + len(logprobs_NV)))
        if start == end:
            return
        cells = self._cells[start:end]
        rows = torch.from_numpy(self._rows[start:end] - first).to(logprobs_NV.device)
        ids = torch.from_numpy(self._ids[cells]).to(logprobs_NV.device)
        self.logprobs[cells] = logprobs_NV[rows, ids].cpu().numpy()


def likeliest(logprobs_BV: Tensor, counts: Sequence[int]) -> list[Top | None]:
    """The counts[b] likeliest tokens of each row, in memory of their own; None where that is 0.

    Rows of one count are looked at together, those of different ones never: among equal logprobs the choice may depend
    on the count.
    """
    found: list[Top | None] = [None] * len(counts)
    for count in sorted(set(counts) - {0}):
        rows = [row for row, wanted in enumerate(counts) if wanted == count]
        top = logprobs_BV[torch.tensor(rows, device=logprobs_BV.device)].topk(count, dim=-1)
        ids, values = top.indices.cpu().numpy().astype(np.int32), top.values.cpu().numpy()
        for at, row in enumerate(rows):
            found[row] = (ids[at].copy(), values[at].copy())
    return found
