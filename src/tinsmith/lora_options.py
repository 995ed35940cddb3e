"""Which layers carry an adapter, and what it may have beyond one rank for all: layers' own ranks, rsLoRA, dropout.

A layer goes by the last part of its path (`q_proj`, `down_proj`, `lm_head`) or by its group (`attn`, `mlp`, `unembed`,
`vision`); the former goes before the latter. Pure arithmetic; knows neither models nor requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DEFAULT_ALPHA = 32.0
VISION = "vision"
GROUPS = ("attn", "mlp", "unembed", VISION)


@dataclass(frozen=True, slots=True)
class Targets:
    """Which groups of linear layers carry an adapter. vision: those of the tower that pictures go through, and of what
    brings its outputs to the language model's size; the other three are of the language model."""

    attn: bool = True
    mlp: bool = True
    unembed: bool = True
    vision: bool = False

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of those that carry one."""
        return tuple(name for name in GROUPS if getattr(self, name))


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """ranks, alphas: of layers that have others than the run's, sorted by name. use_rslora: the scale of a layer is
    alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732) and not alpha / rank (Hu et al. 2021). dropout: the part
    of an adapter's inputs that is left out when gradients are computed."""

    use_rslora: bool = False
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    dropout: float = 0.0

    def rank_of(self, group: str, layer: str, rank: int) -> int:
        """`rank`: the run's."""
        own = dict(self.ranks)
        return own.get(layer, own.get(group, rank))

    def alpha_of(self, group: str, layer: str, alpha: float) -> float:
        """`alpha`: the run's."""
        own = dict(self.alphas)
        return own.get(layer, own.get(group, alpha))

    def scale_of(self, group: str, layer: str, rank: int, alpha: float) -> float:
        """What a layer's adapter is multiplied by; `rank` and `alpha` are the run's."""
        own_rank = self.rank_of(group, layer, rank)
        return self.alpha_of(group, layer, alpha) / (math.sqrt(own_rank) if self.use_rslora else own_rank)

    @property
    def names(self) -> set[str]:
        """The layers and groups that it names."""
        return {name for name, _ in (*self.ranks, *self.alphas)}


PLAIN = LoraOptions()
