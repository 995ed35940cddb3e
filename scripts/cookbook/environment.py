"""The environment that recipes run in: `.venv-cookbook`, with the cookbook, the SDK and torch for the CPU; no tinsmith.

The cookbook's package asks for a `tml-renderers` that isn't published everywhere. So it is installed without its
dependencies, which constraints.txt beside this file pins; what is lost are the renderers of two model families that no
recipe here uses.
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import venv
from pathlib import Path

from scripts.install import install_torch

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / ".venv-cookbook"
CONSTRAINTS = Path(__file__).parent / "constraints.txt"
COOKBOOK = "tinker-cookbook==0.6.1"
DOWNLOAD_MB, DISK_MB = 450, 1700
DEPENDENCIES = (
    *("tinker", "tml-renderers", "transformers", "datasets", "huggingface-hub", "safetensors", "peft", "numpy"),
    *("aiohttp", "anyio", "blobfile", "chz", "cloudpickle", "pillow", "pydantic", "pyrage", "rich", "termcolor"),
    *("tiktoken", "tqdm", "math-verify", "pylatexenc", "sympy", "textarena", "pandas"),
)


def python() -> Path:
    """The environment's interpreter; makes the environment if it isn't there or is out of date.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    interpreter = DIRECTORY / "bin" / "python"
    stamp = DIRECTORY / ".installed"
    state = hashlib.sha256("\n".join([COOKBOOK, *DEPENDENCIES, CONSTRAINTS.read_text()]).encode()).hexdigest()
    with open(f"{DIRECTORY}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == state:
            return interpreter
        print(
            f"making {DIRECTORY.name}: {COOKBOOK}, torch for the CPU and what they need; about {DOWNLOAD_MB} MB to "
            f"download, unless pip has it cached, and {DISK_MB} MB on disk; pip will call tml-renderers too old, "
            "which is known and does no harm",
            flush=True,
        )
        venv.create(DIRECTORY, with_pip=True, clear=True)
        pip = [str(interpreter), "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "on"]
        install_torch(pip)
        for what in (["--no-deps", COOKBOOK], DEPENDENCIES):
            subprocess.run([*pip, "-c", str(CONSTRAINTS), *what], check=True)
        stamp.write_text(state)
    return interpreter


def package() -> Path:
    """Where the installed cookbook lies."""
    (found,) = DIRECTORY.glob("lib/python*/site-packages/tinker_cookbook")
    return found
