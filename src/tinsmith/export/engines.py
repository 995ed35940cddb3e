"""What vLLM and SGLang don't read of an adapter that was written, by the rules in their sources.

Read in November 2026, in the two releases named below; no engine is asked. Other releases have other rules: a remark
says which one it is of. Knows names, ranks and the configuration of an adapter, and the base's `model_type`.

vLLM: `lora/peft_helper.py` (settings), `lora/lora_model.py` and `lora/worker_manager.py` (names, which must be those of
linear layers, or in a model's `packed_modules_mapping`, or in its `embedding_modules`), `config/lora.py` (ranks),
`model_executor/layers/attention/mla_attention.py`. SGLang: `srt/lora/lora.py` (scale), `srt/lora/utils.py` (names:
`get_default_hidden_dim` knows them or fails), `srt/lora/mem_pool.py` (experts), and what the `forward` of a model hands
to its `logits_processor`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tinsmith.bases.catalog import TOWER_PARTS
from tinsmith.files.adapter_files import CONFIG, OWN_HEAD, PREFIX, WEIGHTS

VLLM, SGLANG = "vLLM 0.33.0", "SGLang 0.5.23"
# by `model_type` of the text model
VLLM_HEADS = frozenset({
    "ernie4_5", "exaone4", "granite", "llama", "llama4_text", "mixtral", "phi3", "qwen3", "qwen3_5_moe_text",
    "qwen3_5_text", "qwen3_moe", "qwen3_vl_moe_text", "qwen3_vl_text",
})  # fmt: skip
VLLM_FUSED = frozenset({"gpt_oss", "qwen3_5_moe_text", "qwen3_vl_moe_text"})  # `is_3d_moe_weight`
VLLM_SPLIT = {"glm4": "gate_up_proj"}  # one layer in the base, and vLLM takes its parts' names alone
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
VLLM_USUAL_RANK = 16
SGLANG_OWN = frozenset({
    "cohere2", "deepseek_v3", "exaone4", "gemma2", "gemma3_text", "glm4", "glm4_moe", "glm4_moe_lite", "gpt_oss",
    "granite", "kimi_k2", "llama", "llama4_text", "minimax_m2", "ministral3", "mistral", "mixtral", "olmo", "olmo2",
    "olmoe", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next",
    "qwen3_vl_moe_text", "qwen3_vl_text",
})  # fmt: skip
SGLANG_NO_HEADS = frozenset({"cohere2", "gemma2", "gemma3_text"})  # their logits come from the embedding
SGLANG_LAYERS = frozenset({
    "down_proj", "gate_proj", "gate_up_proj", "k_proj", "kv_a_proj_with_mqa", "kv_b_proj", "lm_head", "o_proj",
    "q_a_proj", "q_b_proj", "q_proj", "qkv_proj", "up_proj", "v_proj",
})  # fmt: skip
SGLANG_MORE = {name: frozenset({"out_proj"}) for name in ("qwen3_5_moe_text", "qwen3_5_text")}
FUSED = re.compile(r".*\.experts(\.base_layer)?")
MERGE = "merge with --format hf"


@dataclass(frozen=True, slots=True)
class Remark:
    """missing: what the engine doesn't read; "" where it does, if it is started so. text: the same with the cure."""

    engine: str
    missing: str
    text: str

    def __str__(self) -> str:
        return f"{self.engine} {self.text}"


@dataclass(frozen=True, slots=True)
class _Written:
    """modules: by path, as the files name them."""

    modules: frozenset[str]
    settings: Mapping[str, Any]
    model_type: str | None

    @property
    def layers(self) -> set[str]:
        """Last parts of the names of modules, but for experts that are in one tensor and for towers."""
        return {
            name.rpartition(".")[2] for name in self.modules if not FUSED.fullmatch(name) and not _is_of_tower(name)
        }

    @property
    def is_fused(self) -> bool:
        return any(map(FUSED.fullmatch, self.modules))


def remarks(directory: Path, model_type: str | None) -> list[Remark]:
    """What to know before an engine is given this adapter.

    Args:
        directory: as `write_peft` left it.
        model_type: of the base's text model; None if it isn't known, and then remarks name the models they are about.
    """
    settings = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    with safe_open(directory / WEIGHTS, framework="numpy") as file:
        modules = frozenset(name.removeprefix(PREFIX).partition(".lora_")[0] for name in file.keys())  # noqa: SIM118
    written = _Written(modules, settings, model_type)
    return [*_of_vllm(written), *_of_sglang(written)]


def _of_vllm(written: _Written) -> Iterator[Remark]:
    greatest = max([written.settings["r"], *(written.settings.get("rank_pattern") or {}).values()])
    allowed = next((rank for rank in VLLM_RANKS if rank >= greatest), None)
    if allowed is None:
        yield Remark(VLLM, "ranks above 512", f"takes ranks of at most {VLLM_RANKS[-1]}, not {greatest}: {MERGE}")
    elif greatest > VLLM_USUAL_RANK:
        yield Remark(VLLM, "", f"takes it when started with --max-lora-rank {allowed}")
    if OWN_HEAD in written.layers and written.model_type not in VLLM_HEADS:
        of = f"of {written.model_type}" if written.model_type else f"but of {', '.join(sorted(VLLM_HEADS))}"
        yield Remark(VLLM, "`lm_head`", f"refuses an lm_head {of}: train with train_unembed=False, or {MERGE}")
    split = VLLM_SPLIT.get(written.model_type or "")
    if split in written.layers:
        yield Remark(VLLM, f"`{split}`", f"refuses {split} of {written.model_type}: {MERGE}")
    if written.is_fused and written.model_type not in VLLM_FUSED:
        yield Remark(VLLM, "experts", f"has the experts of {written.model_type} in another layout: {MERGE}")
    if "kv_b_proj" in written.layers:
        yield Remark(VLLM, "`kv_b_proj`", f"decodes without the adapter of kv_b_proj: {MERGE}")
    if any(map(_is_of_tower, written.modules)):
        yield Remark(VLLM, "", "takes the adapter of the tower when started with --enable-tower-connector-lora")


def _of_sglang(written: _Written) -> Iterator[Remark]:
    model_type = written.model_type
    if model_type is not None and model_type not in SGLANG_OWN:
        yield Remark(SGLANG, "known", f"has no model of its own for {model_type}, so it isn't known here: {MERGE}")
        return
    if _is_scaled_by_module(written) or written.settings.get("use_rslora"):
        yield Remark(
            SGLANG, "ranks and alphas by module, rsLoRA",
            f"scales all modules by lora_alpha / r, without rank_pattern, alpha_pattern and use_rslora: {MERGE}",
        )  # fmt: skip
    strange = written.layers - SGLANG_LAYERS - SGLANG_MORE.get(model_type or "", frozenset())
    if strange:
        names = sorted(strange)
        yield Remark(
            SGLANG, ", ".join(f"`{name}`" for name in names), f"refuses adapters of {', '.join(names)}: {MERGE}"
        )
    if "kv_a_proj_with_mqa" in written.layers and "q_a_proj" not in written.layers:
        yield Remark(SGLANG, "attention without `q_a_proj`", f"fails on latent attention that has no q_a_proj: {MERGE}")
    if written.is_fused:
        yield Remark(SGLANG, "experts", f"leaves out experts that are in one tensor, with a warning: {MERGE}")
    if OWN_HEAD in written.layers and (model_type is None or model_type in SGLANG_NO_HEADS):
        of = model_type or ", ".join(sorted(SGLANG_NO_HEADS))
        yield Remark(SGLANG, "`lm_head`", f"leaves out an lm_head of {of}: train with train_unembed=False, or {MERGE}")
    if any(map(_is_of_tower, written.modules)):
        yield Remark(SGLANG, "the tower", f"leaves out the adapter of the tower: {MERGE}")


def _is_scaled_by_module(written: _Written) -> bool:
    """Whether a pattern is of a module that is read with r and lora_alpha instead."""
    patterns = {**(written.settings.get("rank_pattern") or {}), **(written.settings.get("alpha_pattern") or {})}
    names = [name for name in written.modules if not FUSED.fullmatch(name)]
    return any(re.fullmatch(rf"(.*\.)?({pattern})", name) for pattern in patterns for name in names)


def _is_of_tower(name: str) -> bool:
    return bool(TOWER_PARTS & set(name.split(".")))
