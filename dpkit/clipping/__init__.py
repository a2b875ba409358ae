"""Clipping rules: how far one unit may move the released sum."""

from .flat import Flat as Flat
from .rule import ClipRule as ClipRule
