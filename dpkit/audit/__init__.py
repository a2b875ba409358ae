"""Audits: lower bounds on epsilon, found by attacking, to be set beside the upper bound that is claimed.

An audit can contradict a claim. It cannot confirm one.

Names are loaded when first used, so that reading score files does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .estimators import clopper_pearson as clopper_pearson
    from .estimators import family_inversion as family_inversion
    from .estimators import gaussian_dp as gaussian_dp
    from .guessing import one_run as one_run
    from .guessing import one_run_f_dp as one_run_f_dp
    from .input_canaries import InputCanaries as InputCanaries
    from .input_canaries import clip_bkd as clip_bkd
    from .input_canaries import group_claim as group_claim
    from .input_canaries import mislabelled as mislabelled
    from .input_canaries import random_noise as random_noise
    from .input_canaries import scores_of as scores_of
    from .inversion import Angle as Angle
    from .inversion import Distance as Distance
    from .inversion import Inversion as Inversion
    from .inversion import invert as invert
    from .inversion import linear_input as linear_input
    from .membership import MembershipReport as MembershipReport
    from .membership import likelihood_ratio as likelihood_ratio
    from .membership import logit_confidence as logit_confidence
    from .membership import loss_threshold as loss_threshold
    from .scaling import scaled as scaled
    from .score_files import read_scores as read_scores
    from .thresholds import Bonferroni as Bonferroni
    from .thresholds import Explicit as Explicit
    from .thresholds import Split as Split
    from .verdict import LowerBound as LowerBound
    from .verdict import Verdict as Verdict
    from .verdict import judge as judge
    from .white_box_audit import Canaries as Canaries
    from .white_box_audit import WhiteBox as WhiteBox
    from .white_box_audit import in_run as in_run
    from .white_box_audit import white_box as white_box

_HOMES = {
    "clopper_pearson": "estimators",
    "family_inversion": "estimators",
    "gaussian_dp": "estimators",
    "scaled": "scaling",
    "one_run": "guessing",
    "one_run_f_dp": "guessing",
    "InputCanaries": "input_canaries",
    "clip_bkd": "input_canaries",
    "group_claim": "input_canaries",
    "mislabelled": "input_canaries",
    "random_noise": "input_canaries",
    "scores_of": "input_canaries",
    "Angle": "inversion",
    "Distance": "inversion",
    "Inversion": "inversion",
    "invert": "inversion",
    "linear_input": "inversion",
    "MembershipReport": "membership",
    "likelihood_ratio": "membership",
    "logit_confidence": "membership",
    "loss_threshold": "membership",
    "read_scores": "score_files",
    "Bonferroni": "thresholds",
    "Explicit": "thresholds",
    "Split": "thresholds",
    "LowerBound": "verdict",
    "Verdict": "verdict",
    "judge": "verdict",
    "Canaries": "white_box_audit",
    "WhiteBox": "white_box_audit",
    "in_run": "white_box_audit",
    "white_box": "white_box_audit",
}
"""The file of each public name."""


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'dpkit.audit' has no attribute {name!r}")
