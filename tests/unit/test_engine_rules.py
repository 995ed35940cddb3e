"""What is told of an adapter that serving engines don't read as it is, each rule by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from tinsmith.cli import main as cli
from tinsmith.export.adapter import read_adapter
from tinsmith.export.engines import SGLANG, VLLM, remarks
from tinsmith.export.peft_files import write_peft

Q = "model.layers.0.self_attn.q_proj"
HEAD = "model.unembed_tokens"


def adapter(directory: Path, *modules: str, rank: int = 8, **settings: Any) -> Path:
    """In the layout of an archive. The rank of a module is that of its pattern."""
    directory.mkdir(exist_ok=True)
    ranks = settings.get("rank_pattern", {})
    own = {module: ranks.get(module.rpartition(".")[2], rank) for module in modules}
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.ones(r, 4) for name, r in own.items()}
    tensors |= {f"base_model.model.{name}.lora_B.weight": torch.ones(4, r) for name, r in own.items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "bias": "none", **settings}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def told(tmp_path: Path, model_type: str | None, *modules: str, rank: int = 8, **settings: Any) -> list[str]:
    out = tmp_path / "out"
    out.mkdir()
    write_peft(read_adapter(adapter(tmp_path / "own", *modules, rank=rank, **settings)), out)
    return [str(remark) for remark in remarks(out, model_type)]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral"])
def test_nothing_is_told_where_both_read_all(model_type: str, tmp_path: Path) -> None:
    assert told(tmp_path, model_type, Q, HEAD) == []


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (16, None),
        (17, "--max-lora-rank 32"),
        (64, "--max-lora-rank 64"),
        (300, "--max-lora-rank 320"),
        (513, "at most 512, not 513: merge"),
    ],
)
def test_vllm_has_to_be_told_of_ranks(rank: int, words: str | None, tmp_path: Path) -> None:
    found = told(tmp_path, "llama", Q, rank=rank)
    assert len(found) == (words is not None)
    assert all(one.startswith(VLLM) and str(words) in one for one in found)


def test_the_greatest_rank_counts(tmp_path: Path) -> None:
    found = told(tmp_path, "llama", Q, "model.layers.0.mlp.up_proj", rank_pattern={"up_proj": 40})
    assert any("--max-lora-rank 64" in one for one in found)


@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "gpt_oss", "deepseek_v3", "made_up"])
def test_a_head_that_vllm_refuses_is_told_with_the_cure(model_type: str, tmp_path: Path) -> None:
    (found,) = [one for one in told(tmp_path, model_type, Q, HEAD) if one.startswith(VLLM)]
    assert f"refuses an lm_head of {model_type}" in found
    assert "train_unembed=False" in found
    assert "--format hf" in found


def test_without_the_base_the_architectures_are_named(tmp_path: Path) -> None:
    ours, theirs = told(tmp_path, None, Q, HEAD)
    assert ours.startswith(f"{VLLM} refuses an lm_head but of ernie4_5,")
    assert theirs.startswith(f"{SGLANG} leaves out an lm_head of cohere2, gemma2, gemma3_text")


@pytest.mark.parametrize(
    "settings", [{"rank_pattern": {"q_proj": 4}}, {"alpha_pattern": {"q_proj": 4}}, {"use_rslora": True}]
)
def test_sglang_scales_all_modules_alike(settings: dict[str, Any], tmp_path: Path) -> None:
    (found,) = told(tmp_path, "llama", Q, **settings)
    assert found.startswith(f"{SGLANG} scales all modules by lora_alpha / r")
    assert "--format hf" in found


def test_a_pattern_of_nothing_that_is_there_is_nothing_to_tell(tmp_path: Path) -> None:
    """As beside experts one by one, where `peft` alone needs it."""
    assert told(tmp_path, "qwen2_moe", Q, alpha_pattern={r".*\.experts\.gate_up_proj": 64}) == []


@pytest.mark.parametrize(
    ("model_type", "module", "engine", "words"),
    [
        ("glm4", "model.layers.0.mlp.gate_up_proj", VLLM, "refuses gate_up_proj"),
        ("deepseek_v3", "model.layers.0.self_attn.kv_b_proj", VLLM, "without the adapter of kv_b_proj"),
        ("deepseek_v3", "model.layers.0.self_attn.kv_a_proj_with_mqa", SGLANG, "no q_a_proj"),
        ("qwen3_next", "model.layers.0.linear_attn.in_proj_ba", SGLANG, "refuses adapters of in_proj_ba"),
        ("seed_oss", Q, SGLANG, "no model of its own for seed_oss"),
        ("gemma2", HEAD, SGLANG, "leaves out an lm_head of gemma2"),
        ("qwen3_vl_text", "model.visual.blocks.0.attn.qkv", SGLANG, "leaves out the adapter of the tower"),
        ("qwen3_vl_text", "model.visual.blocks.0.attn.qkv", VLLM, "--enable-tower-connector-lora"),
    ],
)
def test_each_rule_is_told(model_type: str, module: str, engine: str, words: str, tmp_path: Path) -> None:
    assert any(one.startswith(engine) and words in one for one in told(tmp_path, model_type, module))


def test_the_command_tells_it(tmp_path: Path) -> None:
    own = adapter(tmp_path / "own", Q, HEAD, rank=32, use_rslora=True)
    done = CliRunner().invoke(cli.app, ["export", str(own), "--out", str(tmp_path / "new")], catch_exceptions=False)
    assert done.exit_code == 0
    first, *more = done.stdout.splitlines()
    assert first.endswith("an adapter of 2 layers")
    assert [line.split(" ")[0] for line in more] == ["vLLM", "vLLM", "SGLang", "SGLang"]
