"""Models of real shapes with random weights, made on the device without a download, and the limits of the device.

The ceilings are measured on one H200: 790 TFLOP/s on a large bfloat16 matrix product, 4.3 TB/s on a copy (bytes read
plus written). Training a LoRA adapter on a frozen base costs 4N floating-point operations a token (2N forward, 2N for
the gradients of the inputs; none of the base's weights), and causal attention three times its forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from tinsmith.model import BaseModel, open_base
from tinsmith.types import BaseInfo

PEAK_FLOPS = 790e12
PEAK_BYTES = 4.3e12
COMMON: dict[str, Any] = {"vocab_size": 151_936, "head_dim": 128, "max_position_embeddings": 40_960}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        **COMMON, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "0.6b": {
        **COMMON, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the rows are measured. is_smoke: tiny shapes on whatever device, to see that the script works."""

    device: torch.device
    dtype: torch.dtype
    is_smoke: bool

    def model(self, shape: str) -> Any:
        """A transformers model with random weights, straight on the device."""
        config = Qwen3Config(**SHAPES["tiny" if self.is_smoke else shape])
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation="sdpa")

    def base(self, shape: str) -> BaseModel:
        config = SHAPES["tiny" if self.is_smoke else shape]
        info = BaseInfo(f"qwen3-{shape}", "", "qwen3", config["vocab_size"], config["max_position_embeddings"], ())
        return open_base(self.model(shape), info)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def num_weights(config: dict[str, Any]) -> int:
    """N: weights that a token is multiplied with, the output head's among them."""
    hidden, size = config["hidden_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    layer = hidden * size * (2 * heads + 2 * groups) + 3 * hidden * config["intermediate_size"]
    return config["num_hidden_layers"] * layer + hidden * config["vocab_size"]


def training_limit(config: dict[str, Any], length: int) -> tuple[float, str]:
    """Tokens a second at the ceiling, for sequences of one length; and how it comes about."""
    weights = num_weights(config)
    width = config["num_attention_heads"] * config["head_dim"]
    attention = 3 * 2 * config["num_hidden_layers"] * width * length
    limit = PEAK_FLOPS / (4 * weights + attention)
    parts = f"4 x {weights / 1e9:.2f}e9 + {attention / 1e9:.2f}e9 of attention"
    return limit, f"{limit:,.0f} tokens/s: {parts} FLOP a token at 790 TFLOP/s"


def decode_limit(
    config: dict[str, Any], batch: int, context: int, adapter_params: int, itemsize: int
) -> tuple[float, str]:
    """Tokens a second at the ceiling: all weights, all keys and values and all distinct adapters are read each step."""
    weights = num_weights(config)
    kv = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * context * batch
    limit = batch / (itemsize * (weights + kv + adapter_params) / PEAK_BYTES)
    parts = (
        f"{weights / 1e9:.2f}e9 weights + {kv / 1e9:.2f}e9 keys and values + {adapter_params / 1e9:.2f}e9 of adapters"
    )
    return limit, f"{limit:,.0f} tokens/s: ({parts}) x {itemsize} bytes at 4.3 TB/s"


def num_adapter_params(config: dict[str, Any], rank: int) -> int:
    """Of all linear layers but the head."""
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    widths = 4 * hidden + 2 * queries + 2 * keys + 3 * (hidden + inner)
    return config["num_hidden_layers"] * rank * widths
