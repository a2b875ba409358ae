"""Samplers: which units take part in a step, and which event that makes of the mechanism's."""

from .cyclic_poisson import CyclicPoisson as CyclicPoisson
from .fixed_order import FixedOrder as FixedOrder
from .poisson import Poisson as Poisson
from .poisson import TruncatedPoisson as TruncatedPoisson
from .sampler import Sampler as Sampler
from .users import Users as Users
from .users import unit_of as unit_of
from .without_replacement import WithoutReplacement as WithoutReplacement
