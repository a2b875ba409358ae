"""A second oracle that shares no code with the first: the per-sample gradients of Opacus' hooks."""

from __future__ import annotations

import pytest
import torch
from gradients.settings import SETTINGS
from opacus import GradSampleModule

from dpkit.gradients import ghost

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
]


@pytest.mark.parametrize("name", ["cnn", "group norm cnn", "tokens"])
def test_norms_and_sums_are_those_of_opacus(name: str) -> None:
    setting = next(setting for setting in SETTINGS if setting.name == name)
    model, batch, size = setting.build()
    found, _ = ghost.per_sample(model, setting.loss, batch, size)
    hooked = GradSampleModule(setting.build()[0], loss_reduction="sum")
    setting.loss(hooked, batch).sum().backward()
    theirs = {key.removeprefix("_module."): p.grad_sample.flatten(1).double() for key, p in hooked.named_parameters()}
    norms = found.sq_norms()
    assert norms.keys() == theirs.keys()
    weights = {key: torch.linspace(0.1, 1, size, dtype=torch.float64) for key in norms}
    for key, total in found.weighted_sum(weights):
        torch.testing.assert_close(norms[key].sqrt(), theirs[key].norm(dim=1), rtol=1e-5, atol=1e-7)
        error = (total.double().flatten() - weights[key] @ theirs[key]).norm()
        assert error <= 1e-5 * (weights[key] @ theirs[key].norm(dim=1))
