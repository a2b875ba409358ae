"""``python -m dpkit.cli`` is ``dpkit``."""

import sys

from .app import main

sys.exit(main())
