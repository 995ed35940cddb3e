"""HF_ENDPOINT=<server>/hf is all that `transformers` needs to load a served model's tokenizer, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tinsmith.bases import SHIPPED_NAME, SHIPPED_PATH

TEXT = "What is 2 + 3? Größe: 12 km\n"
TURNS = [{"role": "user", "content": "Hello!"}]
CODE = f"""
import json
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({SHIPPED_NAME!r})
chat = tokenizer.apply_chat_template({TURNS!r}, tokenize=False, add_generation_prompt=True)
print(json.dumps([type(tokenizer).__name__, tokenizer.encode({TEXT!r}), tokenizer.eos_token, chat]))
"""


def test_transformers_loads_the_served_tokenizer(live: Any, tmp_path: Path) -> None:
    """In a process of its own with an empty cache and the hub's address as the only setting, without a key."""
    home = tmp_path / "hf"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": f"{live.url}/hf", "HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=env, text=True, capture_output=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    expected = AutoTokenizer.from_pretrained(SHIPPED_PATH)
    assert json.loads(done.stdout.splitlines()[-1]) == [
        type(expected).__name__,
        expected.encode(TEXT),
        expected.eos_token,
        expected.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True),
    ]
    fetched = {path.name for path in home.rglob("*") if path.is_file()}
    assert "tokenizer.json" in fetched
    assert not any("safetensors" in name for name in fetched)
