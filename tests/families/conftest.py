"""Each family's small base, opened once for both modes, and the same model as transformers has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_next import modeling_qwen3_next

from tests.families.configs import CONFIGS, CONTEXTS, PROCESSORS
from tests.families.hub_configs import HUB_CONFIGS
from tests.families.twin import plain_model
from tinsmith.bases.vision_files import read_vision
from tinsmith.model import BaseModel, load_base
from tinsmith.types import BaseInfo

BOUND = 1e-5
MakeBase = Callable[..., BaseModel]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class DoubleTorch:
    """torch, but for what it says float32 is."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def exact_reference(monkeypatch: pytest.MonkeyPatch):
    """transformers computes the delta rule in float32 whatever a model's dtype is; the reference is to be exact."""
    for module in (modeling_qwen3_next, modeling_qwen3_5, modeling_qwen3_5_moe):
        monkeypatch.setattr(module, "torch", DoubleTorch())


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    directories: dict[tuple[str, torch.dtype], str] = {}

    @cache
    def make(
        kind: str,
        *,
        deterministic: bool = False,
        shares_factors: bool = True,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype = torch.float32,
    ) -> BaseModel:
        """stored: what the files have."""
        model_class, config = CONFIGS[kind]
        key = kind, stored
        if key not in directories:
            directories[key] = str(tmp_path_factory.mktemp(kind))
            torch.manual_seed(7)
            model = model_class(config)
            with torch.no_grad():
                corrections = [buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
                biases = [p for name, p in model.named_parameters() if p.ndim == 1 or name.endswith("proj_bias")]
                for parameter in (*corrections, *biases):  # those that do nothing would hide mistakes
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
                for parameter in (p for name, p in model.named_parameters() if "mm_input_projection" in name):
                    parameter.normal_(std=0.2)
                for name, parameter in model.named_parameters():
                    if name.endswith("A_log"):  # as it is drawn, a state is forgotten with the next token
                        parameter.copy_(torch.linspace(0.02, 0.5, len(parameter)).log())
                    if name.endswith("conv1d.weight"):
                        parameter.normal_(std=0.5)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(stored)
            model.save_pretrained(directories[key])
            if kind in HUB_CONFIGS:
                Path(directories[key], "config.json").write_text(json.dumps(HUB_CONFIGS[kind]))
            if kind in PROCESSORS:
                PROCESSORS[kind].save_pretrained(directories[key])
        path = Path(directories[key])
        vision = read_vision(path, json.loads((path / "config.json").read_text())) if kind in PROCESSORS else None
        text = config.get_text_config()
        max_context = CONTEXTS.get(kind, text.max_position_embeddings)
        info = BaseInfo(kind, str(path), kind, text.vocab_size, max_context, (), vision=vision)
        return load_base(
            info,
            device=torch.device(device),
            dtype=dtype,
            deterministic=deterministic,
            shares_factors=shares_factors,
        )

    return make


@pytest.fixture
def plain() -> Callable[[BaseModel], torch.nn.Module]:
    return plain_model


@pytest.fixture
def within(record_property: Callable[[str, object], None]) -> Callable[[str, Any, Any], None]:
    """Compares, and notes the largest difference for the page of models."""
    largest: dict[str, float] = {}

    def check(what: str, ours: Any, theirs: Any) -> None:
        difference = float(np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)).max())
        largest[what] = max(largest.get(what, 0.0), difference)
        record_property(what, largest[what])
        assert difference <= BOUND, f"{what}: {difference:.1e}"

    return check
