"""Randomness as a pure function of (seed, sample index, position): no state, no order, no neighbours.

The generator is splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 16),
which can be read at any position: with golden = 0x9E3779B97F4A7C15 and `mix` its finalizer,

    stream(seed, index)      = mix(mix(seed + golden) + (index + 1) * golden)      mod 2^64
    uniform(stream, position) = (mix(stream + (position + 1) * golden) >> 12) / 2^52

so a uniform lies in [0, 1 - 2^-52]. `position` counts the sampled tokens of the sequence from 0. Samples have the
indices from 0, draws at the positions of a prompt those from `ALT_STREAMS`. Formula and
constants are part of the contract: a request that is run again after a crash must give the same tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
ALT_STREAMS = 2**32


def streams(seed: int, num_samples: int, first: int = 0) -> UInt64Array:
    """uint64 [num_samples]: the streams of a request from index `first` on. Seeds are taken modulo 2^64."""
    start = _mix(np.array([seed & (2**64 - 1)], np.uint64) + GOLDEN)
    return _mix(start + np.arange(first + 1, first + num_samples + 1, dtype=np.uint64) * GOLDEN)


def uniforms(streams_B: UInt64Array, positions_B: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """float64 [B] in [0, 1): the draw of each stream at its position (0 or more)."""
    bits = _mix(streams_B + (positions_B.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(z: UInt64Array) -> UInt64Array:
    z = (z ^ (z >> np.uint64(30))) * MIX_1
    z = (z ^ (z >> np.uint64(27))) * MIX_2
    return z ^ (z >> np.uint64(31))
