"""The sampler snapshots held in memory, by key. Least recently used ones go first; what a request needs stays."""

from __future__ import annotations

from collections import Counter, OrderedDict

from tinsmith.errors import UserError
from tinsmith.model import BaseModel, RowLayout
from tinsmith.sampling.lora import Adapter
from tinsmith.types import RunState


class AdapterCache:
    """At most `max_adapters`, more only while more are needed at once. Adapters are frozen copies of what was added."""

    def __init__(self, base: BaseModel, max_adapters: int) -> None:
        self._base = base
        self._max_adapters = max_adapters
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._num_users: Counter[str] = Counter()

    def __contains__(self, key: str) -> bool:
        return key in self._adapters

    def add(self, key: str, state: RunState) -> None:
        """Raises: UserError: the state doesn't fit this base."""
        layout = RowLayout(self._base.linears, state.spec.targets, state.spec.rank)
        params = {name: tensor for name, tensor in state.tensors.items() if name.startswith("param/")}
        row_P = layout.tensors_to_row("param", params, self._base.device).to(self._base.dtype)
        self._adapters[key] = Adapter.of(layout, state.spec.targets, row_P, state.spec.alpha)
        self._adapters.move_to_end(key)
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

    def _evict(self, keep: str | None = None) -> None:
        surplus = len(self._adapters) - self._max_adapters
        idle = [key for key in self._adapters if key not in self._num_users and key != keep]
        for key in idle[: max(0, surplus)]:
            del self._adapters[key]
