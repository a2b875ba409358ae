"""The engine: plan, step, loader, probe, and the object that ties them to a model."""

from .engine import PrivacyEngine as PrivacyEngine
from .plan import Plan as Plan
