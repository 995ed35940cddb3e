"""Turns DIRECTORY/*/{train,eval}_data.jsonl into Arrow data sets of the same names. Run inside `.venv-cookbook`."""

import sys
from pathlib import Path

import datasets

datasets.disable_progress_bars()


def main(directory: Path) -> None:
    for rows in sorted(directory.glob("*/*.jsonl")):
        datasets.Dataset.from_json(str(rows), cache_dir=str(directory / "cache")).save_to_disk(rows.with_suffix(""))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
