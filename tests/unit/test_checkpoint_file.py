from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinsmith.checkpoint_file import dump_state, load_state
from tinsmith.errors import CorruptError
from tinsmith.types import RunId, RunSpec, RunState, Targets

SPEC = RunSpec(RunId("s:train:0"), "tinsmith/tiny", rank=4, seed=7, targets=Targets(mlp=False))
STATE = RunState(
    SPEC, 3, {"param/a.lora_A": np.arange(8, dtype=np.float32).reshape(4, 2), "m/a.lora_A": np.ones((4, 2), np.float32)}
)


def test_a_state_comes_back_exactly() -> None:
    back = load_state(dump_state(STATE))
    assert back.spec == SPEC
    assert back.step == 3
    assert back.has_optimizer
    assert back.tensors.keys() == STATE.tensors.keys()
    for name, tensor in STATE.tensors.items():
        np.testing.assert_array_equal(back.tensors[name], tensor)


def test_equal_states_give_equal_bytes() -> None:
    assert len({dump_state(load_state(dump_state(STATE))) for _ in range(20)}) == 1


@given(st.integers(0, 400))
def test_a_torn_file_is_called_corrupt(length: int) -> None:
    data = dump_state(STATE)
    with pytest.raises(CorruptError):
        load_state(data[: min(length, len(data) - 1)])


@given(st.binary(max_size=200))
def test_garbage_is_called_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptError):
        load_state(data)
