"""The command line: ``dpkit demo | init | train | epsilon | statement | report | verify``.

torch is loaded where something is trained.
"""

from .app import main as main
