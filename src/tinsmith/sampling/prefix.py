"""Keys and values of beginnings, kept for later prompts that begin alike.

They are kept in pieces of `grid` tokens, under all tokens up to a piece's end, the contents of the pictures that begin
there, the weights and the scope that they came with. Where the grid is the size of the chunks in which prompts are
computed, and only prompts are kept, what is found is what would be computed again, to the bit. On a finer grid, and
with what was sampled kept as well, so that the next turn of a conversation finds it, the last bits may differ. The
least recently used go first. Holds memory of its own, beside that of the prompts and sequences under way: copies, or in
pages blocks that it shares with them.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tinsmith.pictures import Picture
from tinsmith.sampling.kv import Kept
from tinsmith.types import TokenArray

Line = tuple[str, str | None]  # the scope (its tenant), and the weights


class PrefixCache:
    """num_bytes: what is held, at most `max_bytes`.

    has_states: a beginning is of use only up to a piece after which the model's states are known.
    """

    def __init__(self, grid: int, max_bytes: int, *, has_states: bool = False) -> None:
        self._has_states = has_states
        self._grid = grid
        self._max_bytes = max_bytes
        self._pieces: OrderedDict[bytes, Kept] = OrderedDict()
        self.num_bytes = 0

    def fill(
        self,
        line: Line,
        tokens: TokenArray,
        load: Callable[[int, Kept], None],
        end: int,
        pictures: Sequence[Picture] = (),
        may_cut: Callable[[int], bool] = lambda position: True,
    ) -> int:
        """Hand what is known of a beginning of `tokens` with its pictures to `load`, with the position at which it
        begins, never beyond position `end`; how many tokens that was. may_cut: where it may end."""
        found: list[bytes] = []
        for key in self._keys(line, tokens, end // self._grid if self._pieces else 0, pictures):
            if key not in self._pieces:
                break
            found.append(key)
        while found and (self._lacks_states(found[-1]) or not may_cut(len(found) * self._grid)):
            found.pop()
        for index, key in enumerate(found):
            load(index * self._grid, self._pieces[key])
        self._use(found)
        return len(found) * self._grid

    def keep(
        self,
        line: Line,
        tokens: TokenArray,
        save: Callable[[int, int], Kept],
        start: int,
        end: int,
        pictures: Sequence[Picture] = (),
    ) -> None:
        """Positions start..end-1 of `tokens` have been computed, and those before them are there. save: keeps some
        positions, first and past the last."""
        if not self._max_bytes:
            return
        first, last = start // self._grid, end // self._grid
        if first == last:
            return
        keys = list(self._keys(line, tokens, last, pictures))
        for index, key in enumerate(keys):
            known = self._pieces.get(key)
            if index < first or (known is not None and (known.states is not None or not self._has_states)):
                continue
            kept = save(index * self._grid, (index + 1) * self._grid)
            if known is not None and kept.states is None:
                kept.drop()
                continue
            if known is not None:
                self.num_bytes -= known.num_bytes
                known.drop()
            self._pieces[key] = kept
            self.num_bytes += kept.num_bytes
        self._use(keys)
        while self.num_bytes > self._max_bytes:
            _, dropped = self._pieces.popitem(last=False)
            self.num_bytes -= dropped.num_bytes
            dropped.drop()

    def _lacks_states(self, key: bytes) -> bool:
        return self._has_states and self._pieces[key].states is None

    def _use(self, keys: Sequence[bytes]) -> None:
        """The first ones last: a piece is of no use without those before it."""
        for key in reversed(keys):
            if key in self._pieces:
                self._pieces.move_to_end(key)

    def _keys(self, line: Line, tokens: TokenArray, num_pieces: int, pictures: Sequence[Picture]) -> Iterator[bytes]:
        """Of the first pieces, in order. A picture counts with its place, length and content in the piece in which it
        begins, and so in all after it: its placeholders are the same for every picture of its size."""
        scope, weights = line
        digest = hashlib.sha256(f"{scope}\0{weights}\0".encode())
        for index in range(num_pieces):
            start, end = index * self._grid, (index + 1) * self._grid
            digest.update(np.ascontiguousarray(tokens[start:end], "<i4").tobytes())
            for picture in pictures:
                if start <= picture.start < end:
                    digest.update(struct.pack("<qq", picture.start, picture.num_tokens) + picture.digest)
            yield digest.digest()
