"""dpkit: differentially private training for PyTorch code that exists already.

    engine = dpkit.PrivacyEngine(run_dir="runs/mnist")
    model, optimizer, loader = engine.make_private(model, optimizer, loader, num_examples=60_000, target_epsilon=3.0,
                                                   target_delta=1e-5, epochs=20, max_grad_norm=1.0)

The public surface is what ``__all__`` lists. Names are loaded when first used, so that ``import dpkit`` (and every
command that only counts) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .version import __version__ as __version__

if TYPE_CHECKING:
    from accounting import Budget as Budget
    from accounting import Relation as Relation
    from dpkit import callbacks as callbacks
    from dpkit import clipping as clipping
    from dpkit import errors as errors
    from dpkit import filters as filters
    from dpkit import mechanisms as mechanisms
    from dpkit import metrics as metrics
    from dpkit import optim as optim
    from dpkit import sampling as sampling
    from dpkit.engine import Plan as Plan
    from dpkit.engine import PrivacyEngine as PrivacyEngine
    from dpkit.engine import check as check
    from dpkit.gradients import ghost as ghost
    from dpkit.gradients import vmap as vmap
    from dpkit.mechanisms import Correlated as Correlated
    from dpkit.mechanisms import DiscreteGaussian as DiscreteGaussian
    from dpkit.mechanisms import Gaussian as Gaussian
    from dpkit.mechanisms import HardenedGaussian as HardenedGaussian
    from dpkit.sampling import CyclicPoisson as CyclicPoisson
    from dpkit.sampling import FixedOrder as FixedOrder
    from dpkit.sampling import Poisson as Poisson
    from dpkit.sampling import TruncatedPoisson as TruncatedPoisson
    from dpkit.sampling import Users as Users
    from dpkit.sampling import WithoutReplacement as WithoutReplacement


_HOMES = {
    "Budget": "accounting",
    "Relation": "accounting",
    "Plan": "dpkit.engine",
    "PrivacyEngine": "dpkit.engine",
    "check": "dpkit.engine",
    "Correlated": "dpkit.mechanisms",
    "DiscreteGaussian": "dpkit.mechanisms",
    "Gaussian": "dpkit.mechanisms",
    "HardenedGaussian": "dpkit.mechanisms",
    "CyclicPoisson": "dpkit.sampling",
    "FixedOrder": "dpkit.sampling",
    "Users": "dpkit.sampling",
    "WithoutReplacement": "dpkit.sampling",
    "Poisson": "dpkit.sampling",
    "TruncatedPoisson": "dpkit.sampling",
    "ghost": "dpkit.gradients",
    "vmap": "dpkit.gradients",
}
_MODULES = ("callbacks", "clipping", "errors", "filters", "mechanisms", "metrics", "optim", "sampling")

__all__ = [
    "Budget",
    "Correlated",
    "CyclicPoisson",
    "DiscreteGaussian",
    "FixedOrder",
    "Gaussian",
    "HardenedGaussian",
    "Plan",
    "Poisson",
    "PrivacyEngine",
    "Relation",
    "TruncatedPoisson",
    "Users",
    "WithoutReplacement",
    "callbacks",
    "check",
    "clipping",
    "errors",
    "filters",
    "ghost",
    "mechanisms",
    "metrics",
    "optim",
    "sampling",
    "vmap",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"dpkit.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dpkit' has no attribute {name!r}")
