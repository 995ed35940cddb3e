"""`python -m tinsmith.api`."""

import sys

from tinsmith.api.main import main

if __name__ == "__main__":
    sys.exit(main())
