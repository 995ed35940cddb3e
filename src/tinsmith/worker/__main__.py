"""`python -m tinsmith.worker`."""

import sys

from tinsmith.worker.main import main

sys.exit(main())
