"""The SDK releases that are supported, each in an environment of its own.

`.venv-sdk-VERSION` beside the checkout's own environment holds the SDK, pytest and what they need, no torch and no
tinsmith. It is made when it's needed, kept, and used again until constraints.txt changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
VERSIONS = ("0.25.0", "0.30.4", "0.38.0")
DOWNLOAD_MB, DISK_MB = 60, 350


def environment(version: str) -> Path:
    """The interpreter of `.venv-sdk-VERSION`; makes the environment if it isn't there or is out of date.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    directory = ROOT / f".venv-sdk-{version}"
    python = directory / "bin" / "python"
    stamp = directory / ".installed"
    pins = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith(("tinker==", "torch=="))]
    state = hashlib.sha256("\n".join([version, *pins]).encode()).hexdigest()
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == state:
            return python
        print(
            f"making {directory.name}: tinker {version}, pytest and what they need, no torch; "
            f"about {DOWNLOAD_MB} MB to download, unless pip has it cached, and {DISK_MB} MB on disk",
            flush=True,
        )
        venv.create(directory, with_pip=False, clear=True)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write("\n".join(pins))
            constraints.flush()
            # with this environment's pip, and without compiling ten thousand modules of which few are imported
            pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install"]
            subprocess.run([*pip, "--no-compile", "-c", constraints.name, f"tinker=={version}", "pytest"], check=True)
        stamp.write_text(state)
    return python
