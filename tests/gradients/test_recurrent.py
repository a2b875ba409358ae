"""Recurrent layers and cells give the per-sample gradients of one backward pass for each example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients.one_by_one import check_each, check_seeded, energy, observe
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from dpkit import errors
from dpkit.gradients import ghost

LAYERS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
}
over_layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
over_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


class Recurrent(nn.Module):
    """A linear layer (so that the input's gradient counts), a recurrent one, and what is asked of its outputs."""

    def __init__(self, layer: Any, *, states: str = "none", outputs: str = "all", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = options.pop("width", 5)
        self.first = nn.Linear(3, 4)
        self.layer = layer(4, width, **options)
        self.states, self.outputs = states, outputs
        rows = self.layer.num_layers * (2 if self.layer.bidirectional else 1)
        if states == "batched":
            self.to_start = nn.Linear(3, rows * width)
        if states == "learnt":
            self.start = nn.Parameter(torch.randn(rows, 1, width))
        if states == "repeated":
            self.start = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Any:
        size = len(x)
        rows, width = self.layer.num_layers * (2 if self.layer.bidirectional else 1), self.layer.hidden_size
        inputs = self.first(x)
        inputs = inputs if self.layer.batch_first else inputs.transpose(0, 1)
        start: Any = None
        if self.states == "batched":
            start = self.to_start(x[:, 0]).view(size, rows, width).transpose(0, 1).contiguous()
        elif self.states == "learnt":
            start = self.start.expand(-1, size, -1)
        elif self.states == "repeated":
            start = torch.tanh(self.start).repeat(rows, size, 1)
        if start is not None and isinstance(self.layer, nn.LSTM):
            start = (start, 0.5 * start)
        outputs, final = self.layer(inputs, start)
        outputs = outputs if self.layer.batch_first else outputs.transpose(0, 1)
        finals = final if isinstance(final, tuple) else (final,)
        finals = tuple(state.transpose(0, 1) for state in finals)
        return {"all": (outputs, *finals), "sequence": outputs, "final": finals[-1]}[self.outputs]


def sequences(size: int = 4, steps: int = 6) -> tuple[Tensor]:
    torch.manual_seed(1)
    return (torch.randn(size, steps, 3),)


@over_layers
@over_dtypes
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("outputs", ["all", "sequence", "final"])
def test_one_layer(layer: Any, dtype: torch.dtype, batch_first: bool, outputs: str) -> None:
    check_each(Recurrent(layer, batch_first=batch_first, outputs=outputs), sequences(), dtype)


@over_layers
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("states", ["none", "batched", "learnt", "repeated"])
@pytest.mark.parametrize(("num_layers", "bidirectional"), [(1, True), (2, False), (2, True)])
def test_layers_directions_and_first_states(
    layer: Any, bias: bool, states: str, num_layers: int, bidirectional: bool
) -> None:
    model = Recurrent(
        layer, states=states, bias=bias, num_layers=num_layers, bidirectional=bidirectional, batch_first=bias
    )
    check_each(model, sequences(), torch.float64)


@over_layers
def test_all_of_it_in_float32(layer: Any) -> None:
    model = Recurrent(layer, states="batched", num_layers=2, bidirectional=True, batch_first=True)
    check_each(model, sequences(), torch.float32)


@over_layers
@pytest.mark.parametrize("size", [1, 6])
def test_sequences_as_long_as_the_batch_and_of_one_step(layer: Any, size: int) -> None:
    for steps in (1, 6):
        check_each(Recurrent(layer, states="batched"), sequences(size, steps), torch.float64)


@over_layers
@pytest.mark.parametrize("batch_first", [True, False])
def test_where_the_examples_were_observed(layer: Any, batch_first: bool) -> None:
    model = Recurrent(layer, states="learnt", num_layers=2, batch_first=batch_first)
    check_each(model, sequences(6, 6), torch.float64, observed=True)


class Several(nn.Module):
    """Several sequences of one example, in one axis with the examples."""

    def __init__(self, layer: Any, order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.order = layer(3, 5, batch_first=True), order

    def forward(self, x: Tensor) -> Tensor:
        size, rows = x.shape[:2]
        if self.order == "major":
            return self.layer(x.flatten(0, 1))[0].unflatten(0, (size, rows))
        return self.layer(x.transpose(0, 1).flatten(0, 1))[0].unflatten(0, (rows, size)).transpose(0, 1)


@over_layers
@pytest.mark.parametrize("order", ["major", "minor"])
def test_several_sequences_of_one_example(layer: Any, order: str) -> None:
    torch.manual_seed(1)
    check_each(Several(layer, order), (torch.randn(3, 2, 5, 3),), torch.float64, observed=True)


@over_layers
def test_time_is_not_the_axis_of_the_examples(layer: Any) -> None:
    torch.manual_seed(1)
    model, x = layer(3, 5), torch.randn(6, 6, 3)
    observe(model, (x,), lambda model, batch: model(*batch)[0].flatten(1).sum(1))
    with pytest.raises(errors.UnsupportedOperation, match="check batch_first"):
        ghost.per_sample(model, lambda model, batch: model(*batch)[0].flatten(1).sum(1), (x,), 6)


@over_layers
@over_dtypes
def test_layers_large_enough_for_the_library_of_the_cpu(layer: Any, dtype: torch.dtype) -> None:
    check_each(Recurrent(layer, width=128, bidirectional=True), sequences(8, 12), dtype)


@over_layers
def test_dropout_between_layers_draws_the_same_mask(layer: Any) -> None:
    for batch_first in (True, False):
        check_seeded(Recurrent(layer, num_layers=3, dropout=0.4, batch_first=batch_first), sequences())


@over_layers
def test_dropout_is_off_in_evaluation(layer: Any) -> None:
    check_each(Recurrent(layer, num_layers=2, dropout=0.4).eval(), sequences(), torch.float64)


def test_frozen_weights_of_a_layer_get_no_gradient_and_pass_it_on() -> None:
    model = Recurrent(nn.LSTM, num_layers=2)
    for name, parameter in model.layer.named_parameters():
        parameter.requires_grad_("weight_hh" in name)
    check_each(model, sequences(), torch.float64)


@over_layers
@pytest.mark.parametrize("batch_first", [True, False])
def test_learnt_inputs(layer: Any, batch_first: bool) -> None:
    class Decoder(nn.Module):
        """It starts from the batch, and reads the same learnt inputs for each example."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inputs = nn.Parameter(torch.randn(1, 6, 4) if batch_first else torch.randn(6, 1, 4))
            self.layer = layer(4, 3, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            size, start = len(x), x[:, :1].transpose(0, 1).contiguous()
            inputs = self.inputs.expand(size, -1, -1) if batch_first else self.inputs.expand(-1, size, -1)
            outputs, _ = self.layer(inputs, (start, start) if isinstance(self.layer, nn.LSTM) else start)
            return outputs if batch_first else outputs.transpose(0, 1)

    check_each(Decoder(), sequences(), torch.float64)


@over_layers
def test_a_layer_that_runs_twice(layer: Any) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = layer(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x)[0])[0]

    torch.manual_seed(1)
    check_each(Twice(), (torch.randn(3, 5, 4),), torch.float64)


@over_layers
def test_bfloat16(layer: Any) -> None:
    check_each(Recurrent(layer), sequences(), torch.bfloat16)


def test_what_is_refused_says_what_to_do() -> None:
    def lengths(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
        packed = pack_padded_sequence(batch[0], torch.tensor([6, 5, 2, 2]), batch_first=True)
        return model(packed)[1][0].transpose(0, 1).flatten(1).sum(1)

    torch.manual_seed(1)
    for layer in (nn.LSTM, nn.GRU, nn.RNN):
        with pytest.raises(errors.UnsupportedOperation, match="mask the losses instead of pack_padded_sequence"):
            ghost.per_sample(layer(3, 5, batch_first=True), lengths, sequences(), 4)
    with pytest.raises(errors.UnsupportedOperation, match="proj_size"):
        ghost.per_sample(Recurrent(nn.LSTM, proj_size=2, outputs="sequence"), energy, sequences(), 4)


class Cells(nn.Module):
    """A cell unrolled by hand."""

    def __init__(self, cell: Any, *, bias: bool, learnt: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = cell(3, 5, bias=bias)
        self.start = nn.Parameter(torch.randn(1, 5)) if learnt else None

    def forward(self, x: Tensor) -> Any:
        state: Any = None
        if self.start is not None:
            state = self.start.expand(len(x), -1)
            state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


@over_dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize(
    "cell",
    [nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda *args, **options: nn.RNNCell(*args, nonlinearity="relu", **options)],
    ids=["lstm", "gru", "tanh", "relu"],
)
def test_cells(cell: Any, dtype: torch.dtype, bias: bool, learnt: bool) -> None:
    check_each(Cells(cell, bias=bias, learnt=learnt), sequences(4, 3), dtype)
