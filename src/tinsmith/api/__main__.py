"""`python -m tinsmith.api`."""

import sys

from tinsmith.machine import heap

with heap.undisturbed():
    from tinsmith.api.main import main

if __name__ == "__main__":
    sys.exit(main())
