"""The sampler snapshots held in memory, by key. Least recently used ones go first; what a request needs stays."""

from __future__ import annotations

from collections import Counter, OrderedDict

import torch
from torch import Tensor

from tinsmith.errors import UserError
from tinsmith.machine.huge_pages import HugePages
from tinsmith.model import BaseModel, RowLayout, shape_of
from tinsmith.sampling.lora import Adapter
from tinsmith.types import RunSpec, RunState


class AdapterCache:
    """At most `max_adapters` and `max_bytes`, more only while more are needed at once: ask `has_room` before. Adapters
    are frozen: nobody changes what was added."""

    def __init__(self, base: BaseModel, max_adapters: int, max_bytes: int) -> None:
        self._base = base
        self._max_adapters = max_adapters
        self._max_bytes = max_bytes
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._num_users: Counter[str] = Counter()
        self._layouts: dict[RunSpec, RowLayout] = {}
        is_read_in_place = base.device.type == "cpu" and base.dtype == torch.float32
        self._pages = HugePages() if is_read_in_place else None

    def __contains__(self, key: str) -> bool:
        return key in self._adapters

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())

    def has_room(self, num_bytes: int) -> bool:
        """Whether an adapter whose float32 numbers take so much fits beside those that are needed now."""
        needed = sum(self._sizes[key] for key in self._num_users if key in self._sizes)
        return not needed or needed + num_bytes * self._base.dtype.itemsize // 4 <= self._max_bytes

    def add(self, key: str, state: RunState, *, may_keep: bool = False) -> None:
        """A copy of the state's weights, or with `may_keep` these themselves.

        Raises:
            UserError: the state doesn't fit this base.
        """
        layout = self._layout(state.spec)
        may_keep = may_keep or self._pages is not None
        row_P = layout.tensors_to_row("param", state.tensors, self._base.device, may_keep=may_keep)
        self.put(key, state.spec, row_P)

    def put(self, key: str, spec: RunSpec, row_P: Tensor) -> None:
        """A row that nobody changes any more."""
        layout = self._layout(spec)
        row_P = self._laid_down(row_P.to(self._base.device, self._base.dtype))
        self._adapters[key] = Adapter.of(layout, row_P)
        self._adapters.move_to_end(key)
        self._sizes[key] = row_P.numel() * row_P.element_size()
        self._evict(keep=key)

    def acquire(self, key: str) -> Adapter:
        """The adapter, kept until `release`.

        Raises:
            UserError: it isn't here.
        """
        adapter = self._adapters.get(key)
        if adapter is None:
            raise UserError(f"the weights {key} aren't loaded: load them with add_adapter before sampling from them")
        self._adapters.move_to_end(key)
        self._num_users[key] += 1
        return adapter

    def release(self, key: str) -> None:
        self._num_users[key] -= 1
        if self._num_users[key] <= 0:
            del self._num_users[key]
            self._evict()

    def _laid_down(self, row_P: Tensor) -> Tensor:
        """Where it is read fastest: on the CPU, which reads all of it in each step, in huge pages beside others."""
        if self._pages is None:
            return row_P
        return torch.from_numpy(self._pages.empty(len(row_P))).copy_(row_P)

    def _evict(self, keep: str | None = None) -> None:
        num_bytes = self.num_bytes
        for key in list(self._adapters):
            if len(self._adapters) <= self._max_adapters and num_bytes <= self._max_bytes:
                return
            if key not in self._num_users and key != keep:
                del self._adapters[key]
                num_bytes -= self._sizes.pop(key)

    def _layout(self, spec: RunSpec) -> RowLayout:
        key = shape_of(spec)
        if key not in self._layouts:
            self._layouts[key] = RowLayout.of(self._base.linears, spec)
        return self._layouts[key]
