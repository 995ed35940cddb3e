"""One sequence of 131,072 tokens trains on a GPU: memory linear in tokens, never a square of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.kernels.lab import DEVICE
from tests.numerics.lab import datum, grads, item, make_trainer, run_pass, spec
from tinsmith.model import load_base
from tinsmith.types import BaseInfo

TOKENS = 131_072
MOST_BYTES = 48 * 2**30


def test_128k_tokens(tmp_path: Path):
    config = Qwen3Config(
        vocab_size=4000, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=TOKENS,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    info = BaseInfo("long", str(tmp_path), "qwen3", 4000, TOKENS, ())
    trainer = make_trainer(load_base(info, device=DEVICE, dtype=torch.bfloat16), spec("a", 16))
    torch.cuda.reset_peak_memory_stats(DEVICE)
    (result,) = run_pass(trainer, [item("a", [datum(np.random.default_rng(0), TOKENS, vocab=4000)])])
    assert np.isfinite(result.metrics["loss:sum"])
    assert all(np.isfinite(array).all() for array in grads(trainer, "a").values())
    assert torch.cuda.max_memory_allocated(DEVICE) < MOST_BYTES
