"""HF_ENDPOINT=<server>/hf is all that `transformers` needs to load a served model's tokenizer, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tinsmith.api.services import ServedBase
from tinsmith.api.training import gives_path
from tinsmith.bases.catalog import SHIPPED_NAME, SHIPPED_PATH, BaseRef, describe
from tinsmith.config import Settings

TEXT = "What is 2 + 3? Größe: 12 km\n"
TURNS = [{"role": "user", "content": "Hello!"}]
CODE = f"""
import json
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({SHIPPED_NAME!r})
chat = tokenizer.apply_chat_template({TURNS!r}, tokenize=False, add_generation_prompt=True)
print(json.dumps([type(tokenizer).__name__, tokenizer.encode({TEXT!r}), tokenizer.eos_token, chat]))
"""


GET_TOKENIZERS = f"""
import json, sys
import tinker

with tinker.ServiceClient() as service:
    for name in sys.argv[1:]:
        run = service.create_lora_training_client(name, rank=2).result()
        clients = [run, service.create_sampling_client(base_model=name)]
        print(json.dumps([client.get_tokenizer().encode({TEXT!r}) for client in clients]))
"""
NAMES = ("org", "org/model", "org/model/variant", "meta-llama/Llama-3.2-1B", "org/third:lora", "lone/model/variant")


def run_offline(code: str, live: Any, home: Path, *args: str, **more: str) -> str:
    """In a process of its own with an empty cache and the hub's address as the only setting."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": f"{live.url}/hf", "HF_HOME": str(home), **more}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], env=env, text=True, capture_output=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def many(house: Any) -> None:
    """Bases of many names: `org` has no files, to be told from those beside it; the others have the shipped model's."""
    files = house.services.bases[SHIPPED_NAME].tokenizer_files
    for name in NAMES:
        info = describe(BaseRef(name, SHIPPED_PATH))
        house.services.bases[name] = ServedBase(info, {} if name == "org" else files)
    object.__setattr__(house.settings, "tokenizer_id", "name")


def test_tokenizers_of_the_sdk_for_names_of_all_kinds(live: Any, many: None, house: Any, tmp_path: Path) -> None:
    """Training clients ask by the name that the server tells them, sampling clients by one they make of the base's."""
    for name in NAMES[1:]:
        house.make_worker(name).start()
    sdk = {"TINKER_BASE_URL": live.url, "TINKER_API_KEY": house.key, "TINKER_TELEMETRY": "0"}
    said = run_offline(GET_TOKENIZERS, live, tmp_path / "hf", *NAMES[1:], **sdk)
    expected = AutoTokenizer.from_pretrained(SHIPPED_PATH).encode(TEXT)
    assert [json.loads(line) for line in said.splitlines()] == [[expected, expected]] * len(NAMES[1:])


def test_the_longest_name_counts(many: None, anonymous: Any) -> None:
    assert anonymous.raw("GET", "/hf/org/model/resolve/main/tokenizer.json").status_code == 200
    assert anonymous.raw("GET", "/hf/api/models/org/model").json()["id"] == "org/model"
    assert anonymous.raw("GET", "/hf/org/resolve/main/tokenizer.json").status_code == 404
    assert anonymous.raw("GET", "/hf/org/nothing/resolve/main/tokenizer.json").status_code == 404


def test_transformers_loads_the_served_tokenizer(live: Any, tmp_path: Path) -> None:
    """In a process of its own with an empty cache and the hub's address as the only setting, without a key."""
    home = tmp_path / "hf"
    said = run_offline(CODE, live, home)
    expected = AutoTokenizer.from_pretrained(SHIPPED_PATH)
    assert json.loads(said.splitlines()[-1]) == [
        type(expected).__name__,
        expected.encode(TEXT),
        expected.eos_token,
        expected.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True),
    ]
    fetched = {path.name for path in home.rglob("*") if path.is_file()}
    assert "tokenizer.json" in fetched
    assert not any("safetensors" in name for name in fetched)


@pytest.mark.parametrize(
    ("host", "url", "is_local"),
    [
        ("127.0.0.1", "", True),
        ("127.0.0.1", "http://localhost:80/x", True),
        ("::1", "http://[::1]:80", True),
        ("127.0.0.1", "https://tinker.example", False),
        ("0.0.0.0", "", False),
        ("0.0.0.0", "http://localhost", False),
    ],
)
def test_clients_are_told_a_path_if_host_and_public_url_are_of_this_machine(
    host: str, url: str, is_local: bool
) -> None:
    assert gives_path(Settings(host=host, public_url=url)) is is_local
