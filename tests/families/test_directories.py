"""How model directories are read: as the architecture they are, without any code of theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from tests.families.configs import COMMON, VOCAB
from tests.families.hub_configs import HUB_CONFIGS
from tinsmith.bases.catalog import BaseRef, describe
from tinsmith.errors import ConfigError, UnsupportedError, UserError
from tinsmith.model import load_base
from tinsmith.model.directory import read_config
from tinsmith.types import BaseInfo


def write(directory: Path, **config: object) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_kimi_k2_is_read_as_deepseek_v3_and_its_code_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "configuration_deepseek.py").write_text("raise AssertionError('code of a directory was run')")
    config = read_config(write(tmp_path, **HUB_CONFIGS["kimi_k2"]))
    assert isinstance(config, DeepseekV3Config)
    assert (config.n_group, config.topk_group, config.routed_scaling_factor) == (1, 1, 2.827)
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"], rope["beta_fast"]) == ("yarn", 50_000.0, 32.0, 1.0)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, model_type="made_up", auto_map={"AutoConfig": "made_up.MadeUpConfig"})
    with pytest.raises(UnsupportedError, match=r"made_up.*isn't run"):
        read_config(tmp_path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**COMMON)).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "nonsense"), ("num_hidden_layers", "2"), ("num_attention_heads", 3), ("num_attention_heads", 0),
        ("pad_token_id", 500), ("rope_parameters", {"rope_type": "nonsense"}), ("rms_norm_eps", None),
        ("rope_parameters", {"rope_type": "yarn", "factor": "x"}), ("text_config", []), ("dtype", "nonsense"),
        ("quantization_config", 5),
    ],
)  # fmt: skip
def test_a_configuration_of_which_no_model_can_be_made_is_named(llama: Path, field: str, value: object) -> None:
    path = llama / "config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), field: value}))
    try:
        with pytest.raises(UserError, match=r"no model can be made of its config.json \(.+\)"):
            load_base(describe(BaseRef("x", llama)), device=torch.device("cpu"), dtype=torch.float32)
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("field", "value"), [("vocab_size", 10), ("intermediate_size", 50), ("num_key_value_heads", 4)]
)
def test_weights_of_other_shapes_than_the_configuration_says_are_named(llama: Path, field: str, value: int) -> None:
    path = llama / "config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), field: value}))
    try:
        with pytest.raises(UserError, match=r"weight is \[\d+, \d+\] in its files and \[\d+, \d+\] by its config"):
            load_base(describe(BaseRef("x", llama)), device=torch.device("cpu"), dtype=torch.float32)
    finally:
        path.write_text(before)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "phi": (PhiForCausalLM, PhiConfig(**COMMON), r"PhiForCausalLM: its output head is not an nn\.Linear without bias"),
    "phimoe": (
        PhimoeForCausalLM,
        PhimoeConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
        r"mlp\.router\.weight, .*mlp\.experts\.gate_up_proj",
    ),
    "granitemoe": (
        GraniteMoeForCausalLM,
        GraniteMoeConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
        r"block_sparse_moe\.router\.weight, .*experts\.gate_up_proj",
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=512),
        r"attn\.c_attn\.weight, .*mlp\.c_fc\.weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_with_other_parts_is_refused_by_their_names(name: str, tmp_path: Path) -> None:
    model_class, config, part = REFUSED[name]
    model_class(config).save_pretrained(tmp_path)
    info = BaseInfo(name, str(tmp_path), name, VOCAB, 512, ())
    with pytest.raises(UnsupportedError, match=part):
        load_base(info, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("value", [0, -3, float("inf"), "x"])
@pytest.mark.parametrize("field", ["vocab_size", "max_position_embeddings"])
def test_sizes_that_no_model_has_are_refused(tmp_path: Path, field: str, value: object) -> None:
    write(tmp_path, model_type="llama", **{"vocab_size": 9, "max_position_embeddings": 9, field: value})
    with pytest.raises(ConfigError, match="vocab_size and max_position_embeddings"):
        describe(BaseRef("x", tmp_path))


def test_a_configuration_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="can't be read"):
        describe(BaseRef("x", tmp_path))
