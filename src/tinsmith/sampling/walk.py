"""One walk over the base for everything that a step computes: a row for each sequence that is decoded, then the prompts.

The rows share every product with the base's weights; attention and adapters are each sequence's own. So a prompt that
comes in costs those who decode the time of its chunk, and no second reading of the weights.
Shape letters: T rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from tinsmith.model import BaseModel, PassContext, padded_rows
from tinsmith.sampling.admission import Chunk
from tinsmith.sampling.contexts import MixedContext
from tinsmith.sampling.decode import Decoder, Drawn
from tinsmith.sampling.prefill import Prefill
from tinsmith.sampling.sequence import Sequence
from tinsmith.types import IntArray


def walk(base: BaseModel, decoder: Decoder, paused: Collection[Sequence], chunks: Seq[Chunk]) -> list[Drawn]:
    """Move every sequence in the cache on by a token, and the chunks' prompts to the chunks' ends.

    Paused sequences are carried along and nothing comes of it.
    """
    num_decoded = decoder.prepare(paused)
    if not chunks:
        hidden_TD = _hidden(base, decoder.tokens, decoder.positions, decoder.context)
        return decoder.draw(hidden_TD, paused)
    prefill = Prefill(base, chunks)
    if not num_decoded:
        prefill.finish(_hidden(base, prefill.tokens, prefill.positions, prefill.context))
        return []
    tokens = np.concatenate([decoder.tokens, prefill.tokens])
    positions = np.concatenate([decoder.positions, prefill.positions])
    context = MixedContext(decoder.context, num_decoded, prefill.context)
    hidden_TD = _hidden(base, tokens, positions, context)
    prefill.finish(hidden_TD[num_decoded:])
    return decoder.draw(hidden_TD, paused)


def prefill_alone(base: BaseModel, chunks: Seq[Chunk]) -> None:
    """The same for chunks alone."""
    prefill = Prefill(base, chunks)
    prefill.finish(_hidden(base, prefill.tokens, prefill.positions, prefill.context))


def _hidden(base: BaseModel, tokens: IntArray, positions: IntArray, context: PassContext) -> Tensor:
    missing = padded_rows(len(tokens)) - len(tokens)
    tokens_T, positions_T = (torch.from_numpy(np.pad(rows, (0, missing))) for rows in (tokens, positions))
    return base.hidden(tokens_T.to(base.device), positions_T.to(base.device), context)
