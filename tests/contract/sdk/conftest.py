"""Lends torch to the client's environment before the SDK looks for it; only custom losses need it."""

from __future__ import annotations

import os
import sys

if extra := os.environ.get("TORCH_FROM"):
    sys.path.append(extra)
