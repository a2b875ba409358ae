"""Mechanisms: the only way from a sensitive sum to a released value."""

from .gaussian import Gaussian as Gaussian
from .keys import NoiseKey as NoiseKey
from .keys import RunKey as RunKey
from .mechanism import Mechanism as Mechanism
