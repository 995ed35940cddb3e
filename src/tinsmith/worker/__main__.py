"""`python -m tinsmith.worker`."""

import sys

from tinsmith.machine import heap

with heap.undisturbed():
    from tinsmith.worker.main import main

sys.exit(main())
