"""Mechanisms: the only way from a sensitive sum to a released value."""

from .correlated import BISR as BISR
from .correlated import BSR as BSR
from .correlated import BandMF as BandMF
from .correlated import Correlated as Correlated
from .correlated import SquareRoot as SquareRoot
from .correlated import Strategy as Strategy
from .gaussian import Gaussian as Gaussian
from .keys import NoiseKey as NoiseKey
from .keys import RunKey as RunKey
from .mechanism import Mechanism as Mechanism
from .mechanism import Tier as Tier
from .secure import DiscreteGaussian as DiscreteGaussian
from .secure import HardenedGaussian as HardenedGaussian
