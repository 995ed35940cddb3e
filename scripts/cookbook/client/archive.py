"""One function of tinker_cookbook.weights, in a process of its own. Run inside `.venv-cookbook`.

`archive.py FUNCTION JSON`: the arguments by name. What it raises goes to standard error, and the status is 1.
"""

import json
import sys

from tinker_cookbook import weights

getattr(weights, sys.argv[1])(**json.loads(sys.argv[2]))
