from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from typing import Any

import numpy as np
import pyrage
import pytest
from safetensors.numpy import load

from tinsmith.errors import CorruptError
from tinsmith.files.adapter_files import COMPLETE, CONFIG, WEIGHTS, adapter_files, as_tar, external_files, pack_external
from tinsmith.files.checkpoint_file import dump_state, read_state_header
from tinsmith.files.virtual_file import Span, VirtualFile
from tinsmith.types import BaseInfo, RunId, RunSpec, RunState

BASE = BaseInfo("org/base", "/nowhere", "qwen3", 100, 256, (0,))
TIED = replace(BASE, is_head_tied=True)
SPEC = RunSpec(RunId("s:train:0"), "org/base", rank=4, alpha=32.0)
LAYERS = {
    "model.layers.0.self_attn.q_proj": (8, 6),
    "model.layers.11.mlp.up_proj": (5, 6),
    "model.unembed_tokens": (100, 6),
}


def state(*parts: str, layers: dict[str, tuple[int, int]] = LAYERS) -> RunState:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, int]] = {}
    for name, (num_out, num_in) in layers.items():
        shapes |= {f"{name}.lora_A": (4, num_in), f"{name}.lora_B": (num_out, 4)}
    tensors = {
        f"{part}/{name}": rng.normal(size=shape).astype(np.float32) for part in parts for name, shape in shapes.items()
    }
    return RunState(SPEC, 3, tensors)


def files_of(stored: bytes, base: BaseInfo = BASE) -> dict[str, bytes]:
    source = io.BytesIO(stored)
    return {name: b"".join(file.read(source)) for name, file in adapter_files(read_state_header(source), base).items()}


@pytest.mark.parametrize(("base", "head"), [(BASE, "lm_head"), (TIED, "model.unembed_tokens")])
def test_tensors_keep_their_numbers_under_pefts_names(base: BaseInfo, head: str) -> None:
    made = state("param", "grad", "m", "v")
    weights = load(files_of(dump_state(made), base)[WEIGHTS])
    expected = {
        f"base_model.model.{name.removeprefix('param/').replace('model.unembed_tokens', head)}.weight": tensor
        for name, tensor in made.tensors.items()
        if name.startswith("param/")
    }
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(weights[name], tensor)


def test_the_optimizer_makes_no_difference() -> None:
    made = state("param", "m", "v")
    bare = RunState(SPEC, 0, {name: tensor for name, tensor in made.tensors.items() if name.startswith("param/")})
    assert files_of(dump_state(made)) == files_of(dump_state(bare))


def test_the_config_says_what_was_trained() -> None:
    config = json.loads(files_of(dump_state(state("param")))[CONFIG])
    assert config["target_modules"] == ["lm_head", "q_proj", "up_proj"]
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 32, "org/base")
    assert config["peft_type"] == "LORA"


def test_numbers_start_at_a_multiple_of_eight() -> None:
    weights = files_of(dump_state(state("param")))[WEIGHTS]
    assert int.from_bytes(weights[:8], "little") % 8 == 0


def test_the_tar_is_one_for_everybody() -> None:
    source = io.BytesIO(dump_state(state("param")))
    pieces = as_tar(adapter_files(read_state_header(source), BASE), 1e9)
    data = b"".join(pieces.read(source))
    assert len(data) == pieces.size
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        assert [(m.name, m.mtime, m.mode, m.isreg()) for m in tar] == [
            (CONFIG, 10**9, 0o644, True), (WEIGHTS, 10**9, 0o644, True), (COMPLETE, 10**9, 0o644, True),
        ]  # fmt: skip
        assert tar.extractfile(WEIGHTS).read() == files_of(source.getvalue())[WEIGHTS]  # type: ignore[union-attr]
        assert tar.getmember(COMPLETE).size == 0


def test_a_tar_may_hold_more_than_eight_gigabytes() -> None:
    size = 20 * 2**30
    made = as_tar({WEIGHTS: VirtualFile([Span(0, size)])}, 0)
    header = next(piece for piece in made if isinstance(piece, bytes))
    assert tarfile.TarInfo.frombuf(header[:512], "utf-8", "strict").size == size
    assert made.size == 512 + size + 512 + 1024


class TestExternal:
    def pack(self, *recipients: str) -> io.BytesIO:
        return io.BytesIO(b"".join(pack_external(state("param"), BASE, recipients, 5.0)))

    def test_holds_the_files(self) -> None:
        packed = self.pack()
        found = {name: b"".join(file.read(packed)) for name, file in external_files(packed).items()}
        assert found == files_of(dump_state(state("param")))

    def test_holds_nothing_readable_if_sealed(self) -> None:
        key = pyrage.x25519.Identity.generate()
        packed = self.pack(str(key.to_public()))
        found = {name: b"".join(file.read(packed)) for name, file in external_files(packed).items()}
        opened = {name.removesuffix(".age"): pyrage.decrypt(data, [key]) for name, data in found.items()}
        assert opened == files_of(dump_state(state("param")))
        assert b"q_proj" not in packed.getvalue()

    @pytest.mark.parametrize("junk", [b"", b"x" * 2000, bytes(2048), b"\x1f\x8b" + b"x" * 600])
    def test_junk_is_refused(self, junk: bytes) -> None:
        with pytest.raises(CorruptError, match="not an external checkpoint"):
            external_files(io.BytesIO(junk))

    @pytest.mark.parametrize("name", ["a/b", "../x"])
    def test_a_place_elsewhere_is_refused(self, name: str) -> None:
        data = b"".join(as_tar({name: VirtualFile([b"x"])}, 0).read(io.BytesIO()))
        with pytest.raises(CorruptError):
            external_files(io.BytesIO(data))

    @pytest.mark.parametrize(
        "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
    )
    def test_a_link_or_a_device_is_refused(self, kind: bytes) -> None:
        """Beside a file that is one."""
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as tar:
            tar.addfile(tarfile.TarInfo(WEIGHTS))
            member = tarfile.TarInfo("more")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        with pytest.raises(CorruptError, match="something else than a few files"):
            external_files(made)


class TestCorrupt:
    def test_no_weights(self) -> None:
        with pytest.raises(CorruptError, match="no weights"):
            files_of(dump_state(state("m")))

    def test_no_half_of_an_adapter(self) -> None:
        odd = RunState(SPEC, 0, {"param/model.layer.weight": np.zeros(3, np.float32)})
        with pytest.raises(CorruptError, match="no half"):
            files_of(dump_state(odd))

    @pytest.mark.parametrize("cut", [1, 100, 3000])
    def test_cut_short(self, cut: int) -> None:
        stored = dump_state(state("param"))
        with pytest.raises(CorruptError):
            read_state_header(io.BytesIO(stored[:-cut]))

    @pytest.mark.parametrize(
        "change", [{"dtype": "F16"}, {"shape": [1]}, {"data_offsets": [0, 10**9]}, {"data_offsets": []}]
    )
    def test_headers_that_lie(self, change: dict[str, Any]) -> None:
        stored = dump_state(state("param"))
        length = int.from_bytes(stored[:8], "little")
        header = json.loads(stored[8 : 8 + length])
        name = next(name for name in header if name != "__metadata__")
        header[name] |= change
        text = json.dumps(header).encode()
        with pytest.raises(CorruptError):
            read_state_header(io.BytesIO(len(text).to_bytes(8, "little") + text + stored[8 + length :]))
