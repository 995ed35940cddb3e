"""Merging into bases in fewer bits: what their codes mean, and the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.families import quantised
from tests.families.test_battery import write_adapter
from tests.numerics.lab import make_trainer, spec
from tinsmith.bases.catalog import weight_shapes
from tinsmith.export.adapter import read_adapter
from tinsmith.export.expert_weights import plain_shapes
from tinsmith.export.merge import merge


@pytest.mark.parametrize("kind", ["qwen3-fp8", "llama-fp8_rows", "qwen3_moe-fp8_rows", "gpt_oss-mxfp4"])
def test_a_merge_into_a_quantised_base_is_that_into_what_it_means(kind: str, make_base, tmp_path: Path) -> None:
    family, form = kind.split("-")
    base = make_base(family)
    (tmp_path / "adapter").mkdir()
    write_adapter(base, make_trainer(base, spec("a", 4), deterministic=False), tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    quantised.write(Path(base.info.path), form, tmp_path / "coded", tmp_path / "meant")
    changed = [
        merge(tmp_path / name, adapter, tmp_path / f"{name}-merged", dtype="float32") for name in ("coded", "meant")
    ]
    assert changed[0] == changed[1]
    found, wanted = (load_file(tmp_path / f"{name}-merged" / "model.safetensors") for name in ("coded", "meant"))
    assert found.keys() == wanted.keys()
    assert all(tensor.equal(wanted[name]) for name, tensor in found.items())
    assert "quantization_config" not in json.loads((tmp_path / "coded-merged" / "config.json").read_text())
    shapes = plain_shapes(weight_shapes(tmp_path / "coded"))
    assert shapes == weight_shapes(tmp_path / "meant")
    merge(tmp_path / "coded", adapter, tmp_path / "plain")
    halves = load_file(tmp_path / "plain" / "model.safetensors")
    named = json.loads((tmp_path / "coded" / "config.json").read_text())["dtype"]
    assert {str(halves[name].dtype) for name in changed[0]} == {f"torch.{named}"}
