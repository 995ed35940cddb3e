"""Sampling: continuous batching with mixed adapters over one frozen base."""

from tinsmith.sampling.sampler import Sampler

__all__ = ["Sampler"]
