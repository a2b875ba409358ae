"""Puts this folder's own helpers (brute_force, ledger_worker) on the path; pytest's importlib mode does not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
