"""Installs tinsmith from this checkout into the environment of its Python: `python scripts/install.py demo,test`.

Says what will be downloaded and what it weighs, then leaves the work, and the question of where things come from, to
pip and its settings. On a machine with an NVIDIA GPU torch is the default (CUDA) build; elsewhere a CPU build is taken
where pip is offered one.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
MIN_PYTHON = (3, 11)
PAUSE_S = 10.0
CPU_MB, CUDA_MB, REST_MB = 200, 3200, 180


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment is made")
    parser.add_argument("--extras", default="demo", help="extras of tinsmith to install, separated by commas")
    args = parser.parse_args()
    if sys.version_info < MIN_PYTHON:
        print(f"tinsmith needs Python {'.'.join(map(str, MIN_PYTHON))} or newer; this is {platform.python_version()}")
        return 2
    stamp = args.venv / f".installed-{args.extras.replace(',', '-')}"
    state = fingerprint(args.extras)
    if stamp.exists() and stamp.read_text() == state:
        print(f"installed already: {args.venv}")
        return 0
    if not (args.venv / "bin" / "python").exists():
        print(
            f"making a virtual environment with Python {platform.python_version()} and pip in {args.venv} "
            "(some seconds; nothing is downloaded yet)",
            flush=True,
        )
        venv.create(args.venv, with_pip=True)
    pip = [str(args.venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
    if not has_torch(args.venv):
        install_torch(pip)
    print(f"installing tinsmith[{args.extras}] (about {REST_MB} MB to download, unless pip has it cached)", flush=True)
    code = run([*pip, "-c", str(CONSTRAINTS), "-e", f"{ROOT}[{args.extras}]"])
    if code == 0:
        stamp.write_text(state)
    return code


def install_torch(pip: list[str]) -> None:
    """The build for this machine. pip's own progress bar shows the download."""
    version = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    if platform.system() == "Linux" and not has_gpu():
        print(f"installing {version}, CPU build (about {CPU_MB} MB to download)", flush=True)
        code, said = attempt([*pip, "--progress-bar", "on", f"{version}+cpu"])
        if code == 0:
            return
        if not is_absent(said):
            print(said.rstrip(), file=sys.stderr)
            print("the CPU build of torch could not be installed; what pip said is above", file=sys.stderr)
            sys.exit(code)
        print(
            "pip's index has no CPU build of torch. The default build works on a CPU too, but brings CUDA libraries\n"
            "along. To avoid them, press Ctrl-C now, point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheels, and try again.",
            flush=True,
        )
        if sys.stdin.isatty():
            time.sleep(PAUSE_S)
    size = CUDA_MB if platform.system() == "Linux" else CPU_MB
    print(f"installing {version}, default build (about {size} MB to download)", flush=True)
    exact = version.replace("==", "===")  # `==` would take a +cpu build where one is offered
    code = run([*pip, "--progress-bar", "on", exact])
    if code != 0:
        sys.exit(code)


def has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False).returncode == 0


def has_torch(directory: Path) -> bool:
    return any(directory.glob("lib/python*/site-packages/torch-*.dist-info"))


def fingerprint(extras: str) -> str:
    digest = hashlib.sha256(extras.encode())
    for path in (ROOT / "pyproject.toml", CONSTRAINTS):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run(command: list[str]) -> int:
    return subprocess.run(command, check=False).returncode


def attempt(command: list[str]) -> tuple[int, str]:
    """Exit status and what went to stderr, which is not shown."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    return done.returncode, done.stderr


def is_absent(said: str) -> bool:
    """Whether pip reached its index and found other builds, but not this one.

    An index that can't be reached ends in "No matching distribution found" too, after retries or with no versions.
    """
    return "No matching distribution" in said and "from versions: none" not in said and "Retrying (" not in said


if __name__ == "__main__":
    sys.exit(main())
