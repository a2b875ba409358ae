r"""Recurrent layers: ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh``, ``torch.rnn_relu``, and their cells.

With a_t the sum of what a step's gates receive, and a'_t where the recurrent part enters separately (GRU),

    a_t = W x_t + b + W' h_(t-1) + b',    G_b(W) = sum_t (da_bt) x_bt^T,    G_b(W') = sum_t (da'_bt) h_b,t-1^T,

so that a layer's factors are outer products over time, whatever the cell.  The forward pass is the library's own, one
layer at a time, and keeps only its output: h is the output, so the backward pass gets the gates of all steps from
one matrix product.  Only two recurrences remain: the cell states of an LSTM, forward, and the gradient, backward.

Everything inside runs time-major, as the library does it, so dropout between layers draws the same mask.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dpkit.gradients.arithmetic import accumulation_dtype, linear_product
from dpkit.gradients.factors import Dense, Factor, Outer
from dpkit.gradients.rules.elementwise import _by_rows as by_rows

if TYPE_CHECKING:
    from dpkit.gradients.capture import Call
    from dpkit.gradients.layout import Layout


# --------------------------------------------------------------------------------------------------------------- rules


def lstm(call: Call, /, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """``torch.lstm``: input (B, T, d) or (T, B, d), states (h, c) of (layers * directions, B, H)."""
    return _recurrent(call, _LSTM, input, *args, **kwargs)


def gru(call: Call, /, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """``torch.gru``: input (B, T, d) or (T, B, d), state (layers * directions, B, H)."""
    return _recurrent(call, _GRU, input, *args, **kwargs)


def rnn_tanh(call: Call, /, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """``torch.rnn_tanh``: input (B, T, d) or (T, B, d), state (layers * directions, B, H)."""
    return _recurrent(call, _TANH, input, *args, **kwargs)


def rnn_relu(call: Call, /, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """``torch.rnn_relu``: input (B, T, d) or (T, B, d), state (layers * directions, B, H)."""
    return _recurrent(call, _RELU, input, *args, **kwargs)


def _recurrent(
    call: Call,
    cell: _Cell,
    input: Tensor,
    hx: Any,
    params: Any,
    has_biases: Any,
    num_layers: Any = None,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> tuple[Tensor, ...]:
    # A packed sequence has its batch sizes, which are a tensor, in second place, and everything else one further.
    if isinstance(hx, Tensor) and not isinstance(has_biases, bool):
        raise call.unsupported(
            "a packed sequence lays the examples out by their lengths",
            "pad the sequences and mask the losses instead of pack_padded_sequence",
        )
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if any(state.shape[-1] != states[0].shape[-1] for state in states):
        raise call.unsupported("proj_size has no rule", "leave proj_size=0 and put nn.Linear behind the layer")
    if input.dim() != 3:
        raise call.unsupported(
            f"the input has shape {tuple(input.shape)} and no batch axis", "keep a batch axis, of length 1 if need be"
        )
    directions = 2 if bidirectional else 1
    each = 4 if has_biases else 2
    finals: list[tuple[Tensor, ...]] = []
    axis = 0 if batch_first else 1
    layout = call.layout(input, axis=axis)
    if layout.axis != axis:
        raise call.unsupported("the examples are not along the batch axis of its input", "check batch_first")
    input = _rows_of_examples(call, input, layout)
    layout = dataclasses.replace(layout, axis=1)
    states = tuple(_rows_of_examples(call, state, layout) for state in states)
    with call.capturing():
        x = input.transpose(0, 1) if batch_first else input
        for layer in range(num_layers):
            if layer and train and dropout:
                x = F.dropout(x, dropout)
            rows = slice(layer * directions, (layer + 1) * directions)
            weights = tuple(params[rows.start * each : rows.stop * each])
            operation = _Layer(tuple(map(call.name, weights)), cell, layout, has_biases, bidirectional)
            initial = states if num_layers == 1 else tuple(state[rows] for state in states)
            x, *final = call.record_many(operation, (x, *initial), tuple(map(call.detached, weights)))
            finals.append(tuple(final))
        y = x.transpose(0, 1) if batch_first else x
        if num_layers == 1:
            return y, *finals[0]
        return y, *(torch.cat(of_layers) for of_layers in zip(*finals, strict=True))


def _rows_of_examples(call: Call, value: Tensor, layout: Layout) -> Tensor:
    """An argument that has the batch axis; one that is made from parameters gets a gradient for each example."""
    key = call.name(value)
    return value if key is None else by_rows(call, value, key, layout, layout.axis)


def lstm_cell(
    call: Call,
    /,
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch.lstm_cell``: input (B, d), states (B, H) twice."""
    with call.capturing():
        h, c = hx
        i, f, g, o = (F.linear(input, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
        after = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(after), after


def gru_cell(
    call: Call,
    /,
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """``torch.gru_cell``: input (B, d), state (B, H)."""
    with call.capturing():
        reset, update, new = F.linear(input, w_ih, b_ih).chunk(3, -1)
        reset_h, update_h, new_h = F.linear(hx, w_hh, b_hh).chunk(3, -1)
        candidate = torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h)
        return candidate + torch.sigmoid(update + update_h) * (hx - candidate)


def rnn_tanh_cell(
    call: Call,
    /,
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """``torch.rnn_tanh_cell``: input (B, d), state (B, H)."""
    with call.capturing():
        return torch.tanh(F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh))


def rnn_relu_cell(
    call: Call,
    /,
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """``torch.rnn_relu_cell``: input (B, d), state (B, H)."""
    with call.capturing():
        return torch.relu(F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh))


# ------------------------------------------------------------------------------------------------------ one layer of it


@dataclass(frozen=True, slots=True)
class _Layer:
    """x (T, B, d) and states (directions, B, H) -> y (T, B, directions * H) and the last states.

    The names are those of (W, W', b, b') in the forward direction, then in the other.
    """

    names: tuple[Any, ...]
    cell: _Cell
    layout: Layout
    has_biases: bool
    bidirectional: bool

    def forward(
        self, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        x, *states = inputs
        hx = states[0] if len(states) == 1 else tuple(states)
        with warnings.catch_warnings():
            # cuDNN says that the weights of one layer are not all of one buffer: they are copied, and that is all.
            warnings.filterwarnings("ignore", message=".*RNN module weights are not part of single contiguous chunk")
            outputs = self.cell.function(
                x, hx, list(weights), self.has_biases, 1, 0.0, False, self.bidirectional, False
            )
        return tuple(outputs), (x, outputs[0], *states, *weights)

    def backward(
        self, grads: tuple[Tensor | None, ...], saved: tuple[Tensor, ...], *, need_inputs: tuple[bool, ...]
    ) -> tuple[tuple[Tensor | None, ...], list[tuple[Any, Factor]]]:
        count = self.cell.states
        dtype = accumulation_dtype(saved[0].dtype)
        x, y, *initial = (value.to(dtype) for value in saved[: 2 + count])
        weights = [value.to(dtype) for value in saved[2 + count :]]
        directions = 2 if self.bidirectional else 1
        each = len(weights) // directions
        width = y.shape[2] // directions
        grad_y, *grad_finals = (None if grad is None else grad.to(dtype) for grad in grads)
        grad_x: Tensor | None = None
        grad_initial: list[list[Tensor]] = [[] for _ in initial]
        found: list[tuple[Any, Factor]] = []
        for way in range(directions):
            columns = slice(way * width, (way + 1) * width)
            w, w_h, *biases = weights[way * each : (way + 1) * each]
            run = _Run(
                x,
                y[:, :, columns],
                [state[way] for state in initial],
                _Weights(w, w_h, *(biases or (None, None))),
                None if grad_y is None else grad_y[:, :, columns],
                [None if grad is None else grad[way] for grad in grad_finals],
                reverse=way == 1,
            )
            gates, gates_h, before, states = self.cell.differentiate(run)
            found += self._factors(self.names[way * each : (way + 1) * each], gates, gates_h, saved[0], before)
            for of_directions, grad in zip(grad_initial, states, strict=True):
                of_directions.append(grad)
            if need_inputs[0]:
                part = linear_product(gates, w.mT)
                grad_x = part if grad_x is None else grad_x.add_(part)
        stacked = (
            torch.stack(grads).to(saved[0].dtype) if needed else None
            for grads, needed in zip(grad_initial, need_inputs[1:], strict=True)
        )
        return (None if grad_x is None else grad_x.to(saved[0].dtype), *stacked), found

    def _factors(
        self, names: Sequence[Any], gates: Tensor, gates_h: Tensor, x: Tensor, before: Tensor
    ) -> list[tuple[Any, Factor]]:
        """Of the gates' gradients (T, B, gates * H), in the order of the names."""
        u, u_h = self._steps(gates.to(x.dtype)), self._steps(gates_h.to(x.dtype))
        found: list[tuple[Any, Factor]] = []
        for name, q, v in zip(names, (u, u_h), (x.detach(), before.to(x.dtype)), strict=False):
            if name is not None:
                found.append((name, Outer(q, self._steps(v))))
        dtype = accumulation_dtype(x.dtype)
        for name, q in zip(names[2:], (u, u_h), strict=False):
            if name is not None:
                found.append((name, Dense(q.sum(1, dtype=dtype))))
        return found

    def _steps(self, values: Tensor) -> Tensor:
        """(T, B * M, features) -> (B, M * T, features)."""
        return self.layout.split(values).flatten(1, 2)


class _Weights(NamedTuple):
    w: Tensor
    w_h: Tensor
    b: Tensor | None
    b_h: Tensor | None


class _Run(NamedTuple):
    """One direction of one layer, with the gradients that arrive at it."""

    x: Tensor
    y: Tensor
    initial: list[Tensor]
    weights: _Weights
    grad_y: Tensor | None
    grad_final: list[Tensor | None]
    reverse: bool

    def before(self) -> Tensor:
        """h_(t-1) of each step: (T, B, H)."""
        first = self.initial[0][None]
        return torch.cat((self.y[1:], first) if self.reverse else (first, self.y[:-1]))

    def last_first(self, *sequences: Sequence[Any]) -> list[tuple[Any, ...]]:
        """The entries of each step, in the order of the backward pass."""
        steps = list(zip(*sequences, strict=True))
        return steps if self.reverse else steps[::-1]

    def arriving(self) -> tuple[Tensor, list[Tensor | None]]:
        """The gradient of the last h, and for each step that of the output one step earlier, None for none."""
        last = self.grad_final[0]
        if self.grad_y is None:
            grads: list[Tensor | None] = [None] * len(self.y)
            return torch.zeros_like(self.initial[0]) if last is None else last, grads
        grads = [grad for (grad,) in self.last_first(self.grad_y.unbind(0))]
        first = grads[0]
        assert first is not None
        return first if last is None else first + last, [*grads[1:], None]


class _Cell(NamedTuple):
    """``differentiate(run)`` -> the gradients of a and a' (T, B, gates * H), h_(t-1), those of the first states."""

    function: Callable[..., Any]
    states: int
    differentiate: Callable[[_Run], tuple[Tensor, Tensor, Tensor, list[Tensor]]]


def _differentiate_lstm(run: _Run) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """i, f, o = sigmoid(.), g = tanh(.) of a; c_t = f c_(t-1) + i g; h_t = o tanh(c_t)."""
    (steps, size, width), weights = run.y.shape, run.weights
    before, first = run.before(), run.initial[1]
    bias = None if weights.b is None or weights.b_h is None else weights.b + weights.b_h
    a = linear_product(torch.cat((run.x, before), 2), torch.cat((weights.w, weights.w_h), 1), bias)
    a = a.view(steps, size, 4, width)
    a[:, :, :2].sigmoid_()
    i, o = a[:, :, 0], a[:, :, 3].sigmoid_()
    # Copied: the memory of all gates is written over below, and tanh is twice as fast on memory without gaps.
    f, g = (a[:, :, gate].clone(memory_format=torch.contiguous_format) for gate in (1, 2))
    g.tanh_()
    forget = f.unbind(0)
    states = first.new_empty(steps + 1, size, width)
    states[-1 if run.reverse else 0] = first
    c, c_before = (states[:-1], states[1:]) if run.reverse else (states[1:], states[:-1])
    torch.mul(i, g, out=c)
    for of_step, of_last, kept in reversed(run.last_first(c.unbind(0), c_before.unbind(0), forget)):
        of_step.addcmul_(kept, of_last)
    tanh = c.tanh()

    # First what dc_t (for i, f, g) and dh_t (for o) are multiplied by, of all steps at once; then the products.
    into_cell = torch.ops.aten.tanh_backward(o, tanh)
    gates = a  # each of these reads its own part of it before it writes there
    torch.ops.aten.sigmoid_backward(tanh, o, grad_input=gates[:, :, 3])
    torch.ops.aten.tanh_backward(i, g, grad_input=gates[:, :, 2])
    torch.ops.aten.sigmoid_backward(c_before, f, grad_input=gates[:, :, 1])
    torch.ops.aten.sigmoid_backward(g, i, grad_input=gates[:, :, 0])

    back, flat = weights.w_h.mT, gates.flatten(2)
    dh, earlier = run.arriving()
    dc = torch.zeros_like(first) if run.grad_final[1] is None else run.grad_final[1].clone()
    dc_each = dc.unsqueeze(1)
    slices = flat.unbind(0), gates[:, :, :3].unbind(0), gates[:, :, 3].unbind(0), into_cell.unbind(0), forget
    for (whole, through_c, output, into_c, kept), grad in zip(run.last_first(*slices), earlier, strict=True):
        dc.addcmul_(dh, into_c)
        through_c.mul_(dc_each)
        output.mul_(dh)
        dc.mul_(kept)
        dh = linear_product(whole, back, plus=grad)
    return flat, flat, before, [dh, dc]


def _differentiate_gru(run: _Run) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """r, z = sigmoid(a + a'); n = tanh(a + r a'); h_t = (1 - z) n + z h_(t-1)."""
    (steps, size, width), weights = run.y.shape, run.weights
    before = run.before()
    a = linear_product(run.x, weights.w, weights.b).view(steps, size, 3, width)
    a_h = linear_product(before, weights.w_h, weights.b_h).view(steps, size, 3, width)
    a[:, :, :2].add_(a_h[:, :, :2]).sigmoid_()
    r, z = a[:, :, 0], a[:, :, 1]
    n = a[:, :, 2].addcmul(r, a_h[:, :, 2]).tanh_()

    # First what dh_t is multiplied by, of all steps at once; then the products.
    new = torch.ops.aten.tanh_backward(1 - z, n)
    gates_h = torch.empty_like(a)
    torch.ops.aten.sigmoid_backward(new * a_h[:, :, 2], r, grad_input=gates_h[:, :, 0])
    torch.ops.aten.sigmoid_backward(before - n, z, grad_input=gates_h[:, :, 1])
    torch.mul(new, r, out=gates_h[:, :, 2])

    back, flat = weights.w_h.mT, gates_h.flatten(2)
    dh, earlier = run.arriving()
    slices = flat.unbind(0), gates_h.unbind(0), new.unbind(0), z.unbind(0)
    for (whole, each, of_new, kept), grad in zip(run.last_first(*slices), earlier, strict=True):
        each.mul_(dh.unsqueeze(1))
        of_new.mul_(dh)
        direct = dh * kept if grad is None else torch.addcmul(grad, dh, kept)
        dh = linear_product(whole, back, plus=direct)
    gates = gates_h.clone()
    gates[:, :, 2] = new
    return gates.flatten(2), flat, before, [dh]


def _differentiate_plain(run: _Run, gates: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """h_t = s(a); ``gates`` holds s'(a) and is overwritten."""
    back = run.weights.w_h.mT
    dh, earlier = run.arriving()
    for (whole,), grad in zip(run.last_first(gates.unbind(0)), earlier, strict=True):
        whole.mul_(dh)
        dh = linear_product(whole, back, plus=grad)
    return gates, gates, run.before(), [dh]


def _differentiate_tanh(run: _Run) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    return _differentiate_plain(run, 1 - run.y.square())


def _differentiate_relu(run: _Run) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    return _differentiate_plain(run, (run.y > 0).to(run.y.dtype))


_LSTM = _Cell(torch.lstm, 2, _differentiate_lstm)
_GRU = _Cell(torch.gru, 1, _differentiate_gru)
_TANH = _Cell(torch.rnn_tanh, 1, _differentiate_tanh)
_RELU = _Cell(torch.rnn_relu, 1, _differentiate_relu)
