"""Keys and values of prompt chunks, kept for later prompts that begin alike.

A chunk is kept whole, under all tokens up to its end, the weights and the scope that they came with; so what is found
is what would be computed again, to the bit. Prompts are cut at multiples of the chunk size, and only whole chunks are
kept. The least recently used go first. Holds memory of its own, beside that of the prompts and sequences under way.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from tinsmith.sampling.kv import PromptKV
from tinsmith.types import SampleItem

Layers = list[Tensor]  # each [2, key/value heads, chunk tokens, head size]


class PrefixCache:
    """num_bytes: what is held, at most `max_bytes`."""

    def __init__(self, chunk_tokens: int, max_bytes: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._max_bytes = max_bytes
        self._chunks: OrderedDict[bytes, Layers] = OrderedDict()
        self.num_bytes = 0

    def fill(self, item: SampleItem, kv: PromptKV, end: int) -> int:
        """Write what is known of the prompt into its memory, never beyond position `end`; how many tokens that was."""
        found: list[bytes] = []
        for key in self._keys(item, end // self._chunk_tokens):
            if key not in self._chunks:
                break
            found.append(key)
        for index, key in enumerate(found):
            part = slice(index * self._chunk_tokens, (index + 1) * self._chunk_tokens)
            for layer, kept in zip(kv.layers, self._chunks[key], strict=True):
                layer[:, :, part] = kept
        for key in reversed(found):  # a chunk is of no use without those before it
            self._chunks.move_to_end(key)
        return len(found) * self._chunk_tokens

    def keep(self, item: SampleItem, kv: PromptKV, start: int, end: int) -> None:
        """Positions start..end-1 of the prompt have been computed."""
        if end - start != self._chunk_tokens or end % self._chunk_tokens or not self._max_bytes:
            return
        *_, key = self._keys(item, end // self._chunk_tokens)
        if key in self._chunks:
            return
        layers = [layer[:, :, start:end].clone() for layer in kv.layers]
        self._chunks[key] = layers
        self.num_bytes += _num_bytes(layers)
        while self.num_bytes > self._max_bytes:
            _, dropped = self._chunks.popitem(last=False)
            self.num_bytes -= _num_bytes(dropped)

    def _keys(self, item: SampleItem, num_chunks: int) -> Iterator[bytes]:
        """Of the prompt's first chunks, in order."""
        digest = hashlib.sha256(f"{item.scope}\0{item.adapter}\0".encode())
        for index in range(num_chunks):
            part = item.prompt[index * self._chunk_tokens : (index + 1) * self._chunk_tokens]
            digest.update(np.ascontiguousarray(part, "<i4").tobytes())
            yield digest.digest()


def _num_bytes(layers: Layers) -> int:
    return sum(layer.numel() * layer.element_size() for layer in layers)
