"""One walk over the base for all that a step computes: a row for each sequence that is decoded, then the prompts.

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
from tinsmith.sampling.graphs import Capture, decode_graphs
from tinsmith.sampling.kv import KVCache
from tinsmith.sampling.layers import lean_layers
from tinsmith.sampling.paged import PagedKV
from tinsmith.sampling.prefill import Prefill
from tinsmith.sampling.recording import RecordedRoutes, note_decoded, note_prompts, wants_routes
from tinsmith.sampling.sequence import Sequence
from tinsmith.sampling.tiled_lora import TiledLora, row_lora_for
from tinsmith.types import IntArray


class Walker:
    """graphs: what decode steps without prompts are replayed from, where that can be."""

    def __init__(
        self,
        base: BaseModel,
        kv: KVCache[Sequence] | PagedKV[Sequence],
        is_exact: bool,
        cuda_graphs: str = "auto",
        capture: Capture | None = None,
    ) -> None:
        """is_exact: a row's bits don't depend on the others. Otherwise few rows stay few, and adapters take the
        shortest way. capture: as if on a GPU, with this in place of CUDA's.

        Raises:
            UnsupportedError: see `graphs.decode_graphs`.
        """
        self._base = base
        layers = lean_layers(base)
        self._hidden = (layers or base).hidden
        lora = row_lora_for(base, is_exact) if capture is None else TiledLora(base.linears, base.device, base.dtype)
        self.decoder = Decoder(base, kv, lora, is_exact=is_exact)
        self.graphs = decode_graphs(base, layers, kv, lora, cuda_graphs, capture)

    def walk(self, paused: Collection[Sequence], chunks: Seq[Chunk]) -> list[Drawn]:
        """Move every sequence in the cache on by a token, and the chunks' prompts to the chunks' ends.

        Paused sequences are carried along and nothing comes of it.
        """
        decoder = self.decoder
        num_decoded = decoder.prepare(paused)
        if not chunks:
            is_noted = wants_routes(decoder.sequences, ())
            may_replay = self.graphs is not None and not is_noted
            found_TD = self.graphs.run(decoder.tokens, decoder.positions) if may_replay and self.graphs else None
            if found_TD is None:
                found_TD = self._run(decoder.tokens, decoder.positions, decoder.seek(), num_decoded, ())
            return decoder.draw(found_TD, paused)
        prefill = Prefill(self._base, chunks)
        if not num_decoded:
            prefill.finish(self._run(prefill.tokens, prefill.positions, prefill.context, 0, chunks))
            return []
        tokens = np.concatenate([decoder.tokens, prefill.tokens])
        positions = np.concatenate([decoder.positions, prefill.positions])
        mixed = MixedContext(decoder.seek(), num_decoded, prefill.context)
        hidden_TD = self._run(tokens, positions, mixed, num_decoded, chunks)
        prefill.finish(hidden_TD[num_decoded:])
        return decoder.draw(hidden_TD, paused)

    def prefill(self, chunks: Seq[Chunk]) -> None:
        """The same for chunks alone."""
        prefill = Prefill(self._base, chunks)
        prefill.finish(self._run(prefill.tokens, prefill.positions, prefill.context, 0, chunks))

    def _run(
        self, tokens: IntArray, positions: IntArray, context: PassContext, num_decoded: int, chunks: Seq[Chunk]
    ) -> Tensor:
        """Rows of the decoder's sequences first, then those of the chunks; their routes are noted for whom they are."""
        decoded = self.decoder.sequences[:num_decoded]
        noted = None
        if self._base.num_routers and wants_routes(decoded, chunks):
            context = noted = RecordedRoutes(context, self._base.num_routers)
        missing = padded_rows(len(tokens)) - len(tokens)
        tokens_T, positions_T = (torch.from_numpy(np.pad(rows, (0, missing))) for rows in (tokens, positions))
        hidden_TD = self._hidden(tokens_T.to(self._base.device), positions_T.to(self._base.device), context)
        if noted is not None:
            rows_TLK = noted.rows()
            note_decoded(decoded, rows_TLK[:num_decoded])
            note_prompts(chunks, rows_TLK[num_decoded : len(tokens)])
        return hidden_TD
