"""Sampling: continuous batching with mixed adapters over one frozen base, and over full runs beside it."""

from tinsmith.sampling.full import FullSamplers
from tinsmith.sampling.sampler import Sampler

__all__ = ["FullSamplers", "Sampler"]
