from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from scripts import make_settings_page
from tinsmith.config import Settings, child_env, env_name
from tinsmith.errors import ConfigError


def test_flags_win_over_the_environment_which_wins_over_defaults() -> None:
    env = {"TINSMITH_PORT": "1234", "TINSMITH_HOST": "::1"}
    settings = Settings.load(env, port=0, host=None)
    assert (settings.port, settings.host, settings.lora_max_rank) == (0, "::1", 128)


def test_settings_come_back_from_their_environment(tmp_path: Path) -> None:
    settings = Settings.load(
        {},
        base_model=("a/b=/x/y", "c=/d"),
        data_dir=tmp_path,
        serve_tokenizers=False,
        lease_s=0.5,
        public_url="http://x",
    )
    assert Settings.load(settings.as_env()) == settings


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"TINSMITH_PORT": "eighty"}, "TINSMITH_PORT"),
        ({"TINSMITH_PORT": "70000"}, "--port"),
        ({"TINSMITH_LEASE_S": "0"}, "--lease-s"),
        ({"TINSMITH_SERVE_TOKENIZERS": "perhaps"}, "TINSMITH_SERVE_TOKENIZERS"),
        ({"TINSMITH_DEVICE": "tpu"}, "--device"),
        ({"TINSMITH_BASE_MODEL": " , "}, "--base-model"),
    ],
)
def test_bad_values_name_their_setting(env: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Settings.load(env)


def test_the_data_directory_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings.load({}, data_dir=Path("here")).data_dir == tmp_path / "here"
    assert Settings.load({"TINSMITH_DATA_DIR": "~/x"}).data_dir == Path.home() / "x"


def test_a_child_environment_keeps_what_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    env = child_env(Settings(port=7), {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}, OMP_NUM_THREADS="3")
    assert (env["OMP_WAIT_POLICY"], env["GOMP_SPINCOUNT"], env["OMP_NUM_THREADS"]) == ("ACTIVE", "0", "3")
    assert env["TINSMITH_PORT"] == "7"


@pytest.mark.parametrize("field", fields(Settings), ids=lambda f: f.name)
def test_every_setting_is_explained(field: Any) -> None:
    assert field.metadata["help"].endswith(".")
    assert env_name(field) == f"TINSMITH_{field.name.upper()}"


def test_the_settings_page_is_current() -> None:
    assert make_settings_page.PAGE.read_text(encoding="utf-8") == make_settings_page.page(), "run `make docs`"
