"""Published data sets, read from files that the user has: see ``catalogue`` and ``python -m experiments.data``."""

from .catalogue import CATALOGUE as CATALOGUE
from .catalogue import Description as Description
from .catalogue import File as File
from .catalogue import describe as describe
from .loaders import load as load
from .split import SensitiveAttribute as SensitiveAttribute
from .split import Split as Split
from .text import load_e2e as load_e2e
from .text import load_shakespeare as load_shakespeare
