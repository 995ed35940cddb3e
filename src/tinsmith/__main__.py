"""`python -m tinsmith` is `tinsmith`."""

import sys

from tinsmith.machine import heap

with heap.undisturbed():
    from tinsmith.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
