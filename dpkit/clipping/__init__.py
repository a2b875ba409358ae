"""Clipping rules: how far one unit may move the released sum."""

from .flat import Flat as Flat
from .per_layer import PerLayer as PerLayer
from .rule import ClipRule as ClipRule
from .rule import SeparableRule as SeparableRule
