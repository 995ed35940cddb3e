"""Sampler snapshots in memory: bounded in number and bytes, the least recently used go, what is needed stays."""

import pytest

from tests.numerics.sampling_lab import mixed_states
from tinsmith.errors import UserError
from tinsmith.sampling.adapters import AdapterCache


def num_bytes(state):
    return sum(tensor.nbytes for name, tensor in state.tensors.items() if name.startswith("param/"))


@pytest.fixture
def states(base):
    """Five of the same size."""
    state = mixed_states(base, 1)["a0"]
    return {f"a{number}": state for number in range(5)}


def test_bytes_are_bounded(base, states):
    size = num_bytes(states["a0"])
    cache = AdapterCache(base, 100, 2 * size)
    for key, state in states.items():
        cache.add(key, state)
        assert cache.num_bytes <= 2 * size
    assert [key in cache for key in states] == [False, False, False, True, True]


def test_one_that_is_larger_than_the_bound_is_held_alone(base, states):
    cache = AdapterCache(base, 100, num_bytes(states["a0"]) // 2)
    cache.add("a0", states["a0"])
    cache.add("a1", states["a1"])
    assert [key in cache for key in ("a0", "a1")] == [False, True]


def test_what_is_needed_stays_and_others_have_to_wait(base, states):
    size = num_bytes(states["a0"])
    cache = AdapterCache(base, 100, 2 * size)
    for key in ("a0", "a1"):
        assert cache.has_room(size)
        cache.add(key, states[key])
        cache.acquire(key)
    assert not cache.has_room(size)
    cache.release("a0")
    assert cache.has_room(size)
    cache.add("a2", states["a2"])
    assert [key in cache for key in ("a0", "a1", "a2")] == [False, True, True]
    with pytest.raises(UserError, match="aren't loaded"):
        cache.acquire("a0")


def test_rows_lie_side_by_side_and_leave_their_place_to_others(base, states):
    cache = AdapterCache(base, max_adapters=2, max_bytes=10**9)
    for key in ("a", "b"):
        cache.add(key, states["a0"], may_keep=True)
    first, second = (places_of(cache, key) for key in ("a", "b"))
    size = max(first) - min(first)
    assert 0 < min(second) - min(first) < size + 2**16
    cache.add("c", states["a0"])
    assert "a" not in cache
    cache.add("d", states["a0"])
    assert places_of(cache, "d") == first


def places_of(cache, key):
    adapter = cache.acquire(key)
    cache.release(key)
    return [matrix.data_ptr() for weights in adapter.matrices.values() for matrix in weights.tensors]
