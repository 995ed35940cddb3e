from __future__ import annotations

import io
import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from tinsmith.errors import CorruptError, UserError
from tinsmith.files.checkpoint_file import ALIGNMENT, dump_state, load_state, one_piece, read_state_header
from tinsmith.importing.tensor_file import TensorFile
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


@pytest.mark.parametrize("num_bytes", [64, 2**41])
def test_a_length_that_lies_makes_no_room(num_bytes: int, tmp_path: Path) -> None:
    """A header of 2^40 bytes, in a short file and in one that is as long as it says, in both readers of headers."""
    path = tmp_path / "state"
    path.write_bytes(struct.pack("<Q", 2**40))
    os.truncate(path, num_bytes)
    tracemalloc.start()
    try:
        with path.open("rb") as file:
            with pytest.raises(CorruptError, match=f"a header of {2**40} bytes"):
                read_state_header(file)
            with pytest.raises(UserError, match=f"a header of {2**40} bytes"):
                TensorFile(file, "x", 0, num_bytes)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


ROW = np.arange(20, dtype=np.float32)
FLAT = RunState(
    SPEC, 3, {"param/b.lora_A": ROW[:8].reshape(4, 2), "param/b.lora_B": ROW[8:16].reshape(2, 4), "param/a": ROW[16:]}
)


def test_what_is_one_row_in_memory_is_one_row_in_the_file_and_again_in_memory() -> None:
    data = dump_state(FLAT)
    assert ROW.tobytes() in data
    back = load_state(data)
    assert list(back.tensors) == list(FLAT.tensors)
    row = one_piece(list(back.tensors.values()))
    assert row is not None
    assert row.ctypes.data % ALIGNMENT == 0
    np.testing.assert_array_equal(row, ROW)


def test_arrays_that_only_lie_side_by_side_are_no_row() -> None:
    assert one_piece([ROW[:8], ROW[9:]]) is None
    assert one_piece([ROW[8:], ROW[:8]]) is None
    assert one_piece([ROW[:8].copy(), ROW[8:]]) is None
    assert one_piece([ROW]) is None


def test_the_library_reads_our_files_and_we_read_the_library_s() -> None:
    """The library sorts tensors by name: so lay those of files from before."""
    data = dump_state(FLAT)
    theirs = load(data)
    label = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    again = load_state(save(theirs, metadata=label))
    for name, tensor in FLAT.tensors.items():
        np.testing.assert_array_equal(theirs[name], tensor)
        np.testing.assert_array_equal(again.tensors[name], tensor)


@pytest.mark.parametrize("shift", [4, -4])
def test_tensors_that_overlap_or_leave_holes_are_called_corrupt(shift: int) -> None:
    data = dump_state(FLAT)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    begin, end = header["param/a"]["data_offsets"]
    header["param/a"]["data_offsets"] = [begin + shift, end + shift]
    text = json.dumps(header).encode()
    with pytest.raises(CorruptError):
        load_state(len(text).to_bytes(8, "little") + text + data[8 + length :] + bytes(8))


def test_more_than_the_header_names_is_called_corrupt() -> None:
    with pytest.raises(CorruptError):
        load_state(dump_state(STATE) + b"x")


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ([-2, -2], [0, 16]),
        ([2.0, 2], [0, 16]),
        ([True, 4], [0, 16]),
        ([2, 2], [0.0, 16.0]),
        ([1] * 100 + [4], [0, 16]),
        ([2**70, 0], [0, 0]),
        ([-1], [4, 0]),
        ("ab", [0, 16]),
    ],
)
def test_a_shape_that_is_none_is_called_corrupt(shape: Any, offsets: list[Any]) -> None:
    """By whoever reads the header, before the digest is known."""
    data = dump_state(STATE)
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    text = json.dumps({"__metadata__": metadata, "param/a": entry}).encode()
    with pytest.raises(CorruptError):
        read_state_header(io.BytesIO(len(text).to_bytes(8, "little") + text + bytes(16)))


def test_a_header_of_lists_within_lists_is_called_corrupt() -> None:
    text = b"[" * 10**5 + b"]" * 10**5
    with pytest.raises(CorruptError, match="is no JSON"):
        load_state(len(text).to_bytes(8, "little") + text)
