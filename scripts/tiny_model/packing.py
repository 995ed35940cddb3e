"""Turns documents into fixed-size training batches. Shapes: B rows, T tokens.

Documents lie side by side in a row, each with its own positions from 0 and blind to its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from .corpus import Corpus


@dataclass(frozen=True)
class Batch:
    """Packed documents; a token's target is its successor in the same document."""

    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    mask_B1TT: torch.Tensor  # bool, true where attention is allowed
    targets_BT: torch.Tensor
    weights_BT: torch.Tensor  # of the targets; 0 for the last token of a document and for padding
    num_tokens: int  # without padding


def encode(tokenizer: Tokenizer, corpus: Corpus, max_len: int) -> tuple[list[int], list[float]]:
    """The next document of at most `max_len` tokens: its ids and the loss weight of each."""
    while True:
        segments = corpus.document()
        ids, weights = [], []
        for text, weight in segments:
            piece = tokenizer.encode(text, add_special_tokens=False).ids
            ids += piece
            weights += [weight] * len(piece)
        if len(ids) <= max_len:
            return ids, weights


class Packer:
    """Draws documents from a corpus and packs each into the first row with room for it."""

    def __init__(self, tokenizer: Tokenizer, corpus: Corpus, *, num_rows: int, row_len: int) -> None:
        self.tokenizer, self.corpus = tokenizer, corpus
        self.num_rows, self.row_len = num_rows, row_len
        self._leftover: tuple[list[int], list[float]] | None = None

    def next_batch(self) -> Batch:
        """A full batch; the document that found no room opens the next one."""
        shape = (self.num_rows, self.row_len)
        ids, positions, documents = torch.zeros(shape).long(), torch.zeros(shape).long(), torch.zeros(shape).long()
        targets, weights = torch.zeros(shape).long(), torch.zeros(shape)
        used, number = [0] * self.num_rows, 0
        while True:
            tokens, losses = self._leftover or encode(self.tokenizer, self.corpus, self.row_len)
            size = len(tokens)
            row = next((r for r in range(self.num_rows) if used[r] + size <= self.row_len), None)
            if row is None:
                self._leftover = tokens, losses
                break
            self._leftover = None
            number += 1
            start, end = used[row], used[row] + size
            ids[row, start:end] = torch.tensor(tokens)
            positions[row, start:end] = torch.arange(size)
            documents[row, start:end] = number
            targets[row, start : end - 1] = torch.tensor(tokens[1:])
            weights[row, start : end - 1] = torch.tensor(losses[1:])
            used[row] = end
        same = documents[:, :, None] == documents[:, None, :]
        mask = (same & torch.ones(self.row_len, self.row_len).bool().tril())[:, None]
        return Batch(ids, positions, mask, targets, weights, sum(used))
