"""How model directories are read: as the architecture they are, without any code of theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import DeepseekV3Config

from tests.families.hub_configs import HUB_CONFIGS
from tinsmith.errors import UnsupportedError
from tinsmith.model.directory import read_config


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
