"""Filters: post-processing of the released gradient before the optimizer sees it."""

from .filter import Filter as Filter
from .filter import FilterOf as FilterOf
from .low_pass import LowPass as LowPass
from .low_pass import LowPassState as LowPassState
from .low_pass import butterworth as butterworth
from .low_pass import first_order as first_order
from .low_pass import momentum as momentum
from .low_pass import nyquist_zero as nyquist_zero
