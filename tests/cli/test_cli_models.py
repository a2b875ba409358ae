"""The models of the command line on tables and on texts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpkit.cli import config as configs
from dpkit.cli import models
from dpkit.datasets.text import SST2_TOKEN_IDS
from dpkit.engine.probe import probe_forward
from dpkit.errors import ConfigError
from dpkit.gradients import ghost

from .conftest import SMALL

TOKENS = torch.tensor([[5, 9, 5, 0, 0], [7, 32767, 3, 2, 1], [4, 0, 0, 0, 0], [0, 0, 0, 0, 0]])


def some(name: str, shape: tuple[int, ...]) -> nn.Module:
    """A model in the middle of training: no weight is zero."""
    model = models.build(name, shape, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def loss_fn(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("bag_of_embeddings", TOKENS),
        ("linear", torch.rand(4, 11)),
        ("mlp", torch.rand(4, 11)),
        ("mlp", torch.rand(4, 3, 3)),
    ],
)
def test_per_example_gradients_are_those_of_one_backward_per_example(name: str, inputs: torch.Tensor):
    model = some(name, tuple(inputs.shape[1:])).double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    labels = torch.tensor([0, 1, 1, 0])
    recorded, _ = ghost.per_sample(model, loss_fn, (inputs, labels), 4)
    norms = recorded.sq_norms()
    for row in range(4):
        alone = copy.deepcopy(model)
        F.cross_entropy(alone(inputs[row : row + 1]), labels[row : row + 1]).backward()
        for parameter, value in alone.named_parameters():
            assert value.grad is not None
            # Never below the true norm; above it by no more than the rounding bound.
            true = value.grad.square().sum()
            assert norms[parameter][row].item() == pytest.approx(true.item(), rel=1e-9, abs=1e-12)


def test_the_probe_finds_that_no_example_of_a_bag_of_embeddings_moves_another_one():
    probe_forward(some("bag_of_embeddings", (5,)), ((TOKENS,), {}), rows=4)


def test_padding_and_the_order_of_words_do_not_count():
    model = some("bag_of_embeddings", (5,))
    with torch.no_grad():
        one = model(torch.tensor([[5, 9, 5]]))
        assert torch.allclose(one, model(torch.tensor([[9, 5, 5, 0, 0, 0]])))
        assert not torch.allclose(one, model(torch.tensor([[9, 5, 0]])))
        assert torch.allclose(model(torch.zeros(1, 5, dtype=torch.long)), model.get_parameter("head.bias"))


def test_every_token_id_of_sst2_has_a_vector():
    model = models.build("bag_of_embeddings", (5,), 2)
    model(torch.full((1, 5), SST2_TOKEN_IDS - 1))
    with pytest.raises(IndexError):
        model(torch.full((1, 5), SST2_TOKEN_IDS))


def test_images_are_centred_and_rows_of_categories_are_not():
    zeros = models.build("linear", (3,), 2)
    assert torch.equal(zeros(torch.zeros(1, 3))[0], list(zeros.parameters())[1])
    image = models.build("linear", (3, 3), 2)
    assert torch.equal(image(torch.full((1, 3, 3), 0.5))[0], list(image.parameters())[1])


@pytest.mark.parametrize(
    ("dataset", "model", "named"),
    [
        ("fashion", "tanh_cnn", None),
        ("adult", "mlp", None),
        ("sst2", "bag_of_embeddings", None),
        ("adult", "tanh_cnn", "takes images of 28x28"),
        ("sst2", "mlp", "use them together"),
        ("adult", "bag_of_embeddings", "use them together"),
        ("e2e", "linear", "dataset"),
        ("shakespeare", "linear", "dataset"),
    ],
)
def test_a_model_that_does_not_fit_its_data_set_is_refused(dataset: str, model: str, named: str | None):
    text = SMALL.format(output="run").replace("digits", dataset).replace("linear", model, 1)
    if named is None:
        assert configs.parse(text, source="test").dataset == dataset
    else:
        with pytest.raises(ConfigError, match=named):
            configs.parse(text, source="test")
