"""A decode step whose inputs and outputs stay where they are, so that a CUDA graph of it can be replayed.

Rows are filled up to a bucket with padding: token 0 at position 0 of the pool's own padding block. Everything that
changes from step to step is a number in a buffer; the work is the same for every batch of a bucket, and nothing in it
waits for the device. Run eagerly it is an ordinary step, which is how it is tested without a GPU.
Shape letters: N rows there is room for, T rows of a bucket, B blocks of a table, D hidden size, H and G query and
key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from tinsmith.model import BaseModel, ExpertAdapters, OwnRoutes, PassContext, Routes, padded_rows
from tinsmith.model.attention import AttentionKind
from tinsmith.model.delta import DeltaKind
from tinsmith.sampling.paged import PagedRows, Pool
from tinsmith.sampling.tiled_lora import TiledLora
from tinsmith.types import IntArray

Hidden = Callable[[Tensor, Tensor, PassContext], Tensor]


class StaticStep:
    """hidden_ND: what the last step computed, in its first rows."""

    def __init__(
        self, base: BaseModel, hidden: Hidden, pool: Pool, lora: TiledLora, max_rows: int, max_blocks: int
    ) -> None:
        self.max_rows = max_rows
        self._hidden = hidden
        self._pool = pool
        self._lora = lora
        device = base.device
        self._tokens_N = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._positions_N = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._rotary_N = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._tables_NB = torch.full((max_rows, max_blocks), pool.padding, dtype=torch.int64, device=device)
        self.hidden_ND = torch.zeros(padded_rows(max_rows), base.head.in_features, dtype=base.dtype, device=device)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of all memory that a captured step reads or writes and that isn't the base's, nor its own."""
        own = (self._tokens_N, self._positions_N, self._rotary_N, self._tables_NB, self.hidden_ND)
        return (*(t.data_ptr() for t in (*own, *self._pool.layers)), *self._lora.addresses)

    def arrange(self, tables: Collection[Sequence[int]]) -> None:
        """Take a new batch: the blocks of each row's sequence."""
        wide = np.full((self.max_rows, max(map(len, tables), default=1)), self._pool.padding, np.int64)
        for row, table in enumerate(tables):
            wide[row, : len(table)] = table
        self._tables_NB[:, : wide.shape[1]].copy_(torch.from_numpy(wide))

    def load(self, tokens: IntArray, positions: IntArray, rotary: IntArray, bucket: int) -> None:
        """Take the next step's inputs; rows up to the bucket are padding. rotary: positions as layers count them."""
        buffers = (self._tokens_N, self._positions_N, self._rotary_N)
        for rows_N, own in zip(buffers, (tokens, positions, rotary), strict=True):
            rows_N[:bucket].copy_(torch.from_numpy(np.pad(own, (0, bucket - len(own)))))

    def compute(self, bucket: int) -> None:
        """The step. May be run again with the same inputs: it writes the same keys and values."""
        positions_T = self._positions_N[:bucket]
        context = StaticContext(PagedRows(self._pool, self._tables_NB[:bucket], positions_T), self._lora)
        self.hidden_ND[:bucket].copy_(self._hidden(self._tokens_N[:bucket], self._rotary_N[:bucket], context))


class StaticContext(OwnRoutes):
    """One token of each row; all rows are sequences or padding."""

    def __init__(self, rows: PagedRows, lora: TiledLora) -> None:
        self._rows = rows
        self._lora = lora

    def attend(self, layer: int, q_HTE: Tensor, k_GTE: Tensor, v_GTE: Tensor, kind: AttentionKind) -> Tensor:
        return self._rows.attend(layer, q_HTE.transpose(0, 1), k_GTE, v_GTE, kind)

    def add_lora(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        self._lora.add(group, x_TI, y_TO)
        return ()

    def mix(self, layer: int, mixed_TC: Tensor, g_TH: Tensor, beta_TH: Tensor, kind: DeltaKind) -> Tensor:
        raise AssertionError("a model with states is decoded without graphs")

    def experts(self, name: str, routes: Routes) -> ExpertAdapters:
        return self._lora.experts(routes)
