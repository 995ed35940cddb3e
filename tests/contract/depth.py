"""How many examples the tests draw that look for what nobody thought of: the same few every time by default, others and
as many as `TINSMITH_TEST_EXAMPLES` says when it is set (`make fuzz`).
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck

DEEPER = os.environ.get("TINSMITH_TEST_EXAMPLES")
NUM_EXAMPLES = int(DEEPER or 4)


def depth(times: int = 1) -> dict[str, Any]:
    """Hypothesis' settings. `times`: how much cheaper than a request to a live server an example is."""
    return {
        "max_examples": times * NUM_EXAMPLES,
        "deadline": None,
        "database": None,
        "derandomize": DEEPER is None,
        "print_blob": True,
        "suppress_health_check": list(HealthCheck),
    }
