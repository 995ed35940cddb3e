"""One walk over the base for all that a step computes: a row for each sequence that is decoded, then the prompts.

The rows share every product with the base's weights; attention and adapters are each sequence's own. So a prompt that
comes in costs those who decode the time of its chunk, and no second reading of the weights.
Shape letters: T rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tinsmith.model import BaseModel, PassContext, padded_rows
from tinsmith.model.vision import Positions, joined
from tinsmith.sampling.admission import Chunk
from tinsmith.sampling.contexts import MixedContext
from tinsmith.sampling.decode import Decoder, Drawn
from tinsmith.sampling.graphs import Capture, decode_graphs
from tinsmith.sampling.kv import KVCache
from tinsmith.sampling.layers import lean_layers
from tinsmith.sampling.paged import PagedKV
from tinsmith.sampling.prefill import Prefill
from tinsmith.sampling.recording import RecordedRoutes, note_decoded, note_prompts, wants_routes
from tinsmith.sampling.row_lora import row_lora_for
from tinsmith.sampling.sequence import Sequence
from tinsmith.sampling.tiled_lora import TiledLora
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
        *,
        may_compile: bool = True,
    ) -> None:
        """is_exact: a row's bits don't depend on the others. Otherwise few rows stay few, and adapters take the
        shortest way. capture: as if on a GPU, with this in place of CUDA's. may_compile: see `row_lora_for`.

        Raises:
            UnsupportedError: see `graphs.decode_graphs`.
        """
        self._base = base
        layers = lean_layers(base)
        self._hidden = (layers or base).hidden
        is_tiled = capture is not None
        lora = (
            TiledLora(base.linears, base.device, base.dtype)
            if is_tiled
            else row_lora_for(base, is_exact, may_compile=may_compile)
        )
        self.decoder = Decoder(base, kv, lora, is_exact=is_exact)
        self.graphs = decode_graphs(base, layers, kv, lora, cuda_graphs, capture)

    def walk(self, chunks: Seq[Chunk]) -> list[Drawn]:
        """Move every sequence in the cache on by a token, and the chunks' prompts to the chunks' ends."""
        decoder = self.decoder
        num_decoded = decoder.prepare()
        if not chunks:
            inputs = (decoder.tokens, decoder.positions, decoder.rotary)
            found_TD = None
            if self.graphs is not None and not wants_routes(decoder.sequences, ()):
                found_TD = self.graphs.run(*inputs)
            if found_TD is None:
                found_TD = self._run(decoder.tokens, decoder.rotary, decoder.seek(), num_decoded, None)
            return decoder.draw(found_TD)
        prefill = Prefill(self._base, chunks)
        if not num_decoded:
            prefill.finish(self._run(prefill.tokens, prefill.positions, prefill.context, 0, prefill))
            return []
        tokens = np.concatenate([decoder.tokens, prefill.tokens])
        positions = joined([decoder.rotary, prefill.positions])
        mixed = MixedContext(decoder.seek(), num_decoded, prefill.context)
        hidden_TD = self._run(tokens, positions, mixed, num_decoded, prefill)
        prefill.finish(hidden_TD[num_decoded:])
        return decoder.draw(hidden_TD)

    def prefill(self, chunks: Seq[Chunk]) -> None:
        """The same for chunks alone."""
        prefill = Prefill(self._base, chunks)
        prefill.finish(self._run(prefill.tokens, prefill.positions, prefill.context, 0, prefill))

    def _run(
        self, tokens: IntArray, positions: Positions, context: PassContext, num_decoded: int, prefill: Prefill | None
    ) -> Tensor:
        """Rows of the decoder's sequences first, then those of the prompts; their routes are noted for whom they are,
        and their pictures are looked at."""
        decoded = self.decoder.sequences[:num_decoded]
        chunks = () if prefill is None else prefill.chunks
        noted = None
        if self._base.num_routers and wants_routes(decoded, chunks):
            context = noted = RecordedRoutes(context, self._base.num_routers)
        sights = None
        if prefill is not None and self._base.eyes is not None:
            sights = self._base.eyes.sights(replace(span, row=span.row + num_decoded) for span in prefill.spans)
        missing = padded_rows(len(tokens)) - len(tokens)
        wide = np.pad(positions, [*[(0, 0)] * (positions.ndim - 1), (0, missing)])
        tokens_T, positions_T = (torch.from_numpy(rows) for rows in (np.pad(tokens, (0, missing)), wide))
        device = self._base.device
        hidden_TD = self._hidden(tokens_T.to(device), positions_T.to(device), context, sights=sights)
        if noted is not None:
            rows_TLK = noted.rows()
            note_decoded(decoded, rows_TLK[:num_decoded])
            note_prompts(chunks, rows_TLK[num_decoded : len(tokens)])
        return hidden_TD
