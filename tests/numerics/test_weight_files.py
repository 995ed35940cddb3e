"""Directories with weights in fewer bits: what they mean, what is refused, and what becomes of it in memory.

References: the formats' own rules in tests/families/quantised.py, and transformers' own loaders where they work here.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.families import quantised
from tests.families.configs import CONFIGS
from tinsmith.bases.catalog import weight_bytes
from tinsmith.errors import ConfigError, UnsupportedError, UserError
from tinsmith.model import BaseModel, FrozenMatrix, load_base
from tinsmith.model.stored import Form, Stored, pack
from tinsmith.model.weight_files import WeightFiles
from tinsmith.types import BaseInfo

KINDS = {"fp8": "qwen3", "fp8_rows": "qwen3_moe", "fp8_whole": "llama", "mxfp4": "gpt_oss"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind in ("llama", "qwen3", "qwen3_moe", "gpt_oss"):
        model_class, config = CONFIGS[kind]
        torch.manual_seed(7)
        made[kind] = tmp_path_factory.mktemp(kind) / "plain"
        model_class(config).save_pretrained(made[kind])
    return made


@pytest.fixture
def directories(plain: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """Quantised, and what it means."""
    quantised.write(plain[KINDS[request.param]], request.param, tmp_path / "quantised", tmp_path / "twin")
    return tmp_path / "quantised", tmp_path / "twin"


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> BaseModel:
    return load_base(BaseInfo("x", str(path), "x", 211, 512, ()), device=CPU, dtype=dtype, **options)


def change(directory: Path, **settings: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("directories", KINDS, indirect=True)
def test_each_weight_means_what_its_format_says(directories: tuple[Path, Path]) -> None:
    path, twin = directories
    files, meant = WeightFiles(path), load_file(twin / "model.safetensors")
    assert files.keys() == meant.keys()
    assert any(map(files.is_quantised, files))
    for name, weight in meant.items():
        assert files.shape(name) == tuple(weight.shape)
        assert torch.equal(files.plain(name), weight), name
    stored = sum(map(files.num_bytes, files))
    assert stored == sum(t.nbytes for t in load_file(path / "model.safetensors").values())


@pytest.mark.parametrize("directories", ["mxfp4"], indirect=True)
def test_mxfp4_is_what_transformers_makes_of_it(directories: tuple[Path, Path]) -> None:
    path, _ = directories
    change(path, quantization_config={**quantised.FORMS["mxfp4"][1], "dequantize": True})
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    files = WeightFiles(path)
    assert all(torch.equal(files.plain(name), theirs[name]) for name in files if files.is_quantised(name))


def test_fp8_is_what_transformers_makes_of_it(plain: dict[str, Path], tmp_path: Path) -> None:
    """Whose blocks have to divide each weight."""
    tensors, stored = load_file(plain["qwen3"] / "model.safetensors"), {}
    for name, weight in tensors.items():
        stored[name] = weight
        if "proj" in name:
            scales = torch.rand(weight.shape[0] // 32, weight.shape[1] // 32) / 100
            stored |= {name: weight.mul(300).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    told = {**quantised.FP8, "weight_block_size": [32, 32], "dequantize": True}
    tmp_path.joinpath("config.json").write_text((plain["qwen3"] / "config.json").read_text())
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    change(tmp_path, quantization_config=told)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    files = WeightFiles(tmp_path)
    assert all(torch.equal(files.plain(name), theirs[name]) for name in files)


@pytest.mark.parametrize("directories", KINDS, indirect=True)
def test_a_base_keeps_the_form_or_is_dequantised_by_setting(directories: tuple[Path, Path]) -> None:
    kept, full = load(directories[0]), load(directories[0], weights="dequantised")
    forms = kept.bytes_by_form()
    assert forms.keys() & {"fp8", "MXFP4"}
    assert set(full.bytes_by_form()) == {"float32"}
    numbers = sum(m.in_features * m.out_features for m in kept.matrices() if m.form in ("fp8", "MXFP4"))
    bits = {"fp8": 8, "MXFP4": 4}
    ((name, num_bytes),) = ((name, n) for name, n in forms.items() if name in bits)
    assert numbers * bits[name] / 8 < num_bytes < 1.35 * numbers * bits[name] / 8


@pytest.mark.parametrize(("weights", "most"), [("int4", 0.64), ("nf4", 0.57)])
def test_four_bits_take_little_more_than_four(plain: dict[str, Path], weights: str, most: float) -> None:
    base = load(plain["qwen3"], weights=weights)
    name = {"int4": "int4", "nf4": "NF4"}[weights]
    numbers = sum(m.in_features * m.out_features for m in base.matrices() if m.form == name)
    assert numbers
    assert base.bytes_by_form()[name] <= most * numbers


def test_progress_ends_with_all_bytes(plain: dict[str, Path]) -> None:
    told: list[tuple[int, int]] = []
    load(plain["gpt_oss"], progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert (
        told[-1][0] == told[-1][1] == sum(t.nbytes for t in load_file(plain["gpt_oss"] / "model.safetensors").values())
    )


def test_progress_ends_where_files_have_more_than_the_model(plain: dict[str, Path], tmp_path: Path) -> None:
    """As DeepSeek-V3's have a layer that predicts a further token."""
    path = Path(shutil.copytree(plain["qwen3"], tmp_path / "more"))
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "model.layers.2.eh_proj.weight": torch.zeros(64, 128)}, path / "model.safetensors")
    told: list[tuple[int, int]] = []
    load(path, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == sum(t.nbytes for t in tensors.values()) + 4 * 64 * 128


@pytest.mark.parametrize("directories", ["fp8"], indirect=True)
def test_what_is_not_read_is_refused_by_name(directories: tuple[Path, Path], plain: dict[str, Path]) -> None:
    path, _ = directories
    with pytest.raises(UnsupportedError, match=r"--base-weights int4: .* is quantised already"):
        load(path, weights="int4")
    change(path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedError, match="quantised by 'gptq'"):
        load(path)
    change(path, quantization_config={**quantised.FP8, "weight_block_size": [16, 16]})
    with pytest.raises(UnsupportedError, match=r"scales of \[.*blocks of \[16, 16\]"):
        load(path)
    tensors = load_file(path / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("_scale_inv"))
    save_file({name: t for name, t in tensors.items() if name != lost}, path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=f"{lost.removesuffix('_scale_inv')} \\(F8_E4M3\\)"):
        load(path)


@pytest.mark.parametrize("directories", ["fp8"], indirect=True)
def test_a_file_that_is_cut_is_named(directories: tuple[Path, Path]) -> None:
    file = directories[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors can't be read"):
        load(directories[0])


def test_without_torchao_the_cure_is_named(plain: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"--base-weights nf4 needs torchao.*pip install 'tinsmith\[quantise\]'"):
        load(plain["llama"], weights="nf4")


def coded(rows: int, inputs: int) -> Stored:
    codes = torch.randint(0, 16, (rows, inputs), dtype=torch.uint8)
    zeros = torch.randint(-8, 8, (rows, inputs // 32), dtype=torch.int8)
    return Stored(Form.INT4, pack(codes), torch.rand(rows, inputs // 32) / 8, zeros, group=32)


@pytest.mark.parametrize("tile", [2**20, 64 * 7])
def test_products_are_those_of_the_dequantised_weight(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two weights side by side, one of them plain, in as many tiles as there may be."""
    monkeypatch.setattr("tinsmith.model.frozen.TILE_NUMBERS", tile)
    parts = coded(40, 64), torch.randn(24, 64), coded(33, 64)
    matrix = FrozenMatrix(*parts)
    whole = torch.cat([p.dequantised() if isinstance(p, Stored) else p for p in parts]).double()
    bias = torch.randn(97)
    for rows in (1, 4, 50):
        x, y = torch.randn(rows, 64), torch.randn(rows, 97)
        torch.testing.assert_close(matrix.times(x, bias).double(), x.double() @ whole.T + bias, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(matrix.times_transpose(y).double(), y.double() @ whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(matrix.times_float32(x), matrix.times(x))


def test_a_stored_weight_is_cut_and_joined_as_a_tensor_is() -> None:
    one, other = coded(12, 64), coded(12, 64)
    plain_one, plain_other = one.dequantised(), other.dequantised()
    both, plain_both = torch.stack([one, other]), torch.stack([plain_one, plain_other])
    for ours, theirs in (
        (torch.cat([one, other]), torch.cat([plain_one, plain_other])),
        (torch.cat([both, both], 1), torch.cat([plain_both, plain_both], 1)),
        (both.transpose(1, 2), plain_both.transpose(1, 2)),
        (both.transpose(1, 2).transpose(1, 2)[:, ::2], plain_both[:, ::2]),
        (both[1], plain_other),
        (both.unbind()[0][3:7], plain_one[3:7]),
        (one.T, plain_one.T),
        (torch.split(both.transpose(1, 2), 5, -1)[1], torch.split(plain_both.transpose(1, 2), 5, -1)[1]),
    ):
        assert isinstance(ours, Stored)
        assert ours.shape == theirs.shape
        assert torch.equal(ours.dequantised(), theirs)
    for ours, theirs in ((one[:, :32], plain_one[:, :32]), (one * 2, plain_one * 2), (both.sum(0), plain_both.sum(0))):
        assert not isinstance(ours, Stored)
        assert torch.equal(ours, theirs)
    assert one.to(torch.bfloat16).dequantised().dtype == torch.bfloat16


@pytest.mark.parametrize("directories", KINDS, indirect=True)
def test_what_a_base_will_take_is_known_from_its_files(directories: tuple[Path, Path]) -> None:
    """Within a fifth, but for a head that is tied, in the form that its files have and dequantised."""
    for kept in ("stored", "dequantised"):
        base = load(directories[0], weights=kept)
        rest = sum(p.nbytes for p in base.backbone.parameters())
        is_tied = "lm_head.weight" not in WeightFiles(directories[0])  # the head has a copy of its own then
        taken = sum(base.bytes_by_form().values()) + rest - is_tied * base.head.num_bytes
        assert weight_bytes(directories[0], kept, 4) == pytest.approx(taken, rel=0.2)
