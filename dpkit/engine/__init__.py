"""The engine: plan, step, loader, probe, and the object that ties them to a model."""

from .check import check as check
from .engine import PrivacyEngine as PrivacyEngine
from .plan import Plan as Plan
