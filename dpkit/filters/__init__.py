"""Filters: post-processing of the released gradient before the optimizer sees it."""

from .filter import Filter as Filter
