"""The command line; ``dpkit --help`` lists the commands.

torch is loaded where something is trained.
"""

from .app import main as main
