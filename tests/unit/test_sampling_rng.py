"""The stream of a sample is a fixed function of seed, index and position."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tinsmith.sampling.rng import streams, uniforms

GOLDEN = 0x9E3779B97F4A7C15
WORD = 2**64 - 1


def mix(z: int) -> int:
    """splitmix64's finalizer in plain integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


@given(st.integers(-(2**70), 2**70), st.integers(0, 50), st.integers(0, 10**6))
def test_the_formula(seed, index, position):
    stream = mix((mix((seed + GOLDEN) & WORD) + (index + 1) * GOLDEN) & WORD)
    expected = (mix((stream + (position + 1) * GOLDEN) & WORD) >> 12) / 2**52
    drawn = uniforms(streams(seed, 51)[index : index + 1], np.array([position]))
    assert drawn.tolist() == [expected]
    assert 0 <= expected < 1


def test_known_values_of_splitmix64():
    """The first outputs for state 1234567, as the reference implementation prints them."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    drawn = uniforms(np.full(3, 1234567, np.uint64), np.arange(3))
    assert drawn.tolist() == [(value >> 12) / 2**52 for value in known]


def test_samples_and_positions_are_independent_and_uniform():
    drawn = np.stack([uniforms(streams(seed, 8), np.full(8, p)) for seed in range(20) for p in range(100)])
    assert len(np.unique(drawn)) == drawn.size
    assert abs(drawn.mean() - 0.5) < 0.01
    assert abs(drawn.var() - 1 / 12) < 0.002
    assert np.abs(np.corrcoef(drawn.T) - np.eye(8)).max() < 0.1
