"""A random Qwen3 of 5.2 million parameters as a directory that `serve` takes, and the same engine without a service."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tinsmith.bases.catalog import SHIPPED_PATH, describe, parse
from tinsmith.config import Settings
from tinsmith.torch_engine import TorchEngine
from tinsmith.types import AdamParams, Datum, LossSpec, OpId, OptimItem, RunId, RunSpec, Targets, TrainItem

BASE = "bench/qwen3-5m"
VOCAB = 8192
RANK, DEFAULT_RANK = 8, 32
TARGETS = Targets(unembed=False)
LEARNING_RATE = 1e-4


def make(directory: Path) -> str:
    """The `--base-model` of a new model: hidden 256, 4 layers, vocabulary 8,192, tied."""
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    shutil.copy(SHIPPED_PATH / "tokenizer.json", directory)
    return f"{BASE}={directory}"


class Alone:
    """The engine in this process, and `num_runs` runs that step together. num_tokens: of each datum."""

    def __init__(
        self,
        base_model: str,
        num_runs: int,
        num_data: int,
        num_tokens: int,
        threads: int,
        *,
        rank: int = RANK,
        targets: Targets = TARGETS,
    ) -> None:
        self._engine = TorchEngine(describe(parse(base_model)), Settings(threads=threads))
        rng = np.random.default_rng(0)
        self._items = []
        for index in range(num_runs):
            run = RunId(f"bench:train:{index}")
            self._engine.create_run(RunSpec(run, BASE, rank, index, targets))
            data = tuple(_datum(rng, num_tokens) for _ in range(num_data))
            self._items.append(TrainItem(OpId(run), run, 1, data, LossSpec("cross_entropy"), backward=True))

    def step(self) -> None:
        training_pass = self._engine.start_pass(self._items)
        while training_pass.advance(self._engine.pass_max_tokens):
            pass
        training_pass.commit()
        params = AdamParams(LEARNING_RATE)
        self._engine.optim_step([OptimItem(item.op_id, item.run_id, params) for item in self._items])


def sdk_data(types: Any, num_data: int, num_tokens: int) -> list[Any]:
    """The same data as the SDK sends them."""
    rng = np.random.default_rng(0)
    made = [_datum(rng, num_tokens) for _ in range(num_data)]
    return [
        types.Datum(model_input=types.ModelInput.from_ints(datum.tokens.tolist()), loss_fn_inputs=dict(datum.inputs))
        for datum in made
    ]


def _datum(rng: np.random.Generator, length: int) -> Datum:
    tokens = rng.integers(0, VOCAB, length + 1)
    return Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:], "weights": np.ones(length, np.float32)})
