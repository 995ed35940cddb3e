"""The same targets under atheris, which follows coverage: `python -m tests.fuzz.guided TARGET [--count N]`."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tinsmith"]):
    from tests.fuzz import targets as room

LIMITS = ("-timeout=10", "-rss_limit_mb=4096", "-max_len=65536", "-print_final_stats=1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=list(room.targets()))
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--corpus", type=Path, default=Path(".fuzz/corpus"))
    args = parser.parse_args()
    room.settle()
    target, corpus = room.targets()[args.target], args.corpus / args.target
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds:
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    atheris.Setup([sys.argv[0], *LIMITS, f"-runs={args.count}", str(corpus)], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
