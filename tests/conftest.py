"""Fixtures that several folders of tests share."""

from __future__ import annotations

import sys
from pathlib import Path


# Helpers of the tests (`rollout.scripted_engine`) are imported by their path below `tests/`.
sys.path.insert(0, str(Path(__file__).parent))
