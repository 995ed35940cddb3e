"""Exported adapters in peft: what is computed with them elsewhere is what was trained here."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.numerics.lab import datum, item, make_base, make_trainer, run_pass, spec
from tinsmith.bases.catalog import BaseRef, describe
from tinsmith.files.adapter_files import adapter_files
from tinsmith.files.checkpoint_file import dump_state, read_state_header
from tinsmith.lora_options import LoraOptions
from tinsmith.types import RunId, RunSpec, Targets

BOUND = 1e-5
ALL = Targets()
ATTN = Targets(attn=True, mlp=False, unembed=False)


RANKS = LoraOptions(ranks=(("k_proj", 3), ("lm_head", 2), ("mlp", 12)))
ALPHAS = LoraOptions(alphas=(("attn", 4.0), ("down_proj", 9.5)), use_rslora=True)
CASES: list[tuple[str, RunSpec]] = [
    *((kind, spec("a", 8, targets)) for kind in ("llama", "qwen3") for targets in (ALL, ATTN)),
    ("llama", replace(spec("a", 8), alpha=7.5)),
    ("qwen3", replace(spec("a", 8), alpha=8.0, options=LoraOptions(use_rslora=True))),
    ("llama", replace(spec("a", 8), options=RANKS)),
    ("qwen3", replace(spec("a", 8), alpha=6.0, options=replace(ALPHAS, ranks=RANKS.ranks))),
]


@pytest.mark.parametrize(("kind", "run"), CASES)
def test_peft_computes_the_same_logprobs(kind: str, run: RunSpec, tmp_path: Path) -> None:
    """qwen3's head is tied to its embedding here, so its adapter is named as the cookbook wants it; see the page."""
    base = make_base(kind, tmp_path / "base")
    for needed in ("tokenizer.json",):
        (tmp_path / "base" / needed).write_text("{}")
    info = describe(BaseRef(kind, tmp_path / "base"))
    assert info.is_head_tied == (kind == "qwen3")
    trainer = make_trainer(base, run)
    data = [datum(np.random.default_rng(1), length) for length in (9, 40)]
    (result,) = run_pass(trainer, [item("a", data, backward=False)])
    source = io.BytesIO(dump_state(trainer.export_run(RunId("a"))))
    directory = tmp_path / "adapter"
    directory.mkdir()
    for name, file in adapter_files(read_state_header(source), info).items():
        (directory / name).write_bytes(b"".join(file.read(source)))
    if info.is_head_tied and run.targets.unembed:
        path = directory / "adapter_model.safetensors"
        save_file({name.replace("model.unembed_tokens", "lm_head"): t for name, t in load_file(path).items()}, path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, attn_implementation="eager")
    with warnings.catch_warnings():  # others, as of keys that don't fit, are errors
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*tie")
        model = PeftModel.from_pretrained(model, directory)
    for one, ours in zip(data, result.logprobs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(one.tokens.astype(np.int64))[None]).logits[0].log_softmax(-1)
        theirs = logits.gather(1, torch.from_numpy(one.inputs["target_tokens"])[:, None])[:, 0]
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=BOUND)
