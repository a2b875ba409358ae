"""Clipping rules: how far one unit may move the released sum."""

from .automatic import Automatic as Automatic
from .flat import Flat as Flat
from .global_adapt import Global as Global
from .global_adapt import GlobalAdapt as GlobalAdapt
from .group_adaptive import GroupAdaptive as GroupAdaptive
from .noise_split import BoundSplit as BoundSplit
from .noise_split import NoiseSplit as NoiseSplit
from .normalize_if_exceeds import NormalizeIfExceeds as NormalizeIfExceeds
from .per_layer import PerLayer as PerLayer
from .quantile import PerLayerQuantile as PerLayerQuantile
from .quantile import Quantile as Quantile
from .rule import ClipRule as ClipRule
from .rule import SeparableRule as SeparableRule
from .rule import Setting as Setting
