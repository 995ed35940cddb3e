"""Runs the demonstration and saves what the terminal shows as docs/images/demo.svg, the picture in the README.

python scripts/make_demo_picture.py
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from tinsmith.config import point_sdk_at
from tinsmith.demo.main import supervised
from tinsmith.demo.server import started_server

FONT_FACE = re.compile(r"@font-face \{.*?\}\n?", re.DOTALL)  # fetched from elsewhere; a reader's own will do
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "demo.svg"


def main() -> int:
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=False, color_system="truecolor")
    with tempfile.TemporaryDirectory() as directory, started_server() as (url, key):
        point_sdk_at(url, key)
        code = supervised(console, Path(directory))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(FONT_FACE.sub("", console.export_svg(title="tinsmith demo")))
    return code


if __name__ == "__main__":
    sys.exit(main())
