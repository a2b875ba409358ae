"""Per-sample gradients: ``ghost`` captures operations, ``vmap`` maps the whole loss; both return a ``PerSample``."""

from dpkit.gradients import ghost as ghost
from dpkit.gradients import vmap as vmap
from dpkit.gradients.arithmetic import ROUNDING_CHAIN as ROUNDING_CHAIN
from dpkit.gradients.backend import Backend as Backend
from dpkit.gradients.backend import PerSample as PerSample
from dpkit.gradients.backend import trainable as trainable
from dpkit.gradients.capture import Capture as Capture
from dpkit.gradients.derived import is_derived as is_derived
from dpkit.gradients.forms import PerSampleGradients as PerSampleGradients
from dpkit.gradients.tape import precisely as precisely
from dpkit.gradients.units import places_of as places_of
