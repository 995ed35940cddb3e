"""`python -m tinsmith` is `tinsmith`."""

import sys

from tinsmith.cli import main

if __name__ == "__main__":
    sys.exit(main())
