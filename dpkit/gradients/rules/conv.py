"""Convolutions and transposed convolutions with any stride, padding, dilation and groups.

The per-sample weight gradients of B examples with C channels are the weight gradient of ONE example with B C channels
in B times as many groups, which a single library call computes at nearly the speed of the ordinary one.  Where an
example holds several images, they are the batch of that call.

Their norms do not need them.  With the padded input's Gram matrix X over positions and that of the output gradient Q,

    |G|^2 = sum_tt' Q[t, t'] sum_k X[s t + k, s t' + k]

for stride s and offsets k within the kernel: shifted diagonals of X, which is needed only between positions of one
remainder modulo s.  Nothing is unfolded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpkit.gradients.arithmetic import accumulation_dtype, blocks
from dpkit.gradients.factors import NARROW, Dense, Factor, Joinable, Products

if TYPE_CHECKING:
    from dpkit.gradients.capture import Call, Layout


def convolution(axes: int) -> Callable[..., Tensor]:
    """The rule of ``F.conv1d``, ``F.conv2d``, ``F.conv3d``: input (B, C, ...), weight (O, C / groups, ...)."""

    def rule(
        call: Call,
        /,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        layout = _images(call, input, weight, axes)
        x, strides, dilations = input, _each(stride, axes), _each(dilation, axes)
        if padding == "same":
            spans = [step * (length - 1) for step, length in zip(dilations, weight.shape[2:], strict=True)]
            if any(span % 2 for span in spans):
                # Padding is the same on both sides except that 'same' puts the odd row behind.
                x = F.pad(x, [behind for span in reversed(spans) for behind in (0, span % 2)])
            paddings = tuple(span // 2 for span in spans)
        else:
            paddings = _each(0 if isinstance(padding, str) else padding, axes)
        names = (call.name(weight), None if bias is None else call.name(bias))
        operation = _Convolution(names, Window(strides, paddings, dilations, groups), weight.shape, layout)
        return call.record(operation, x, call.detached(weight), call.detached(bias))

    return rule


def transposed_convolution(axes: int) -> Callable[..., Tensor]:
    """The rule of ``F.conv_transpose1d`` to ``3d``: input (B, C, ...), weight (C, O / groups, ...)."""

    def rule(
        call: Call,
        /,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Tensor:
        layout = _images(call, input, weight, axes)
        names = (call.name(weight), None if bias is None else call.name(bias))
        window = Window(_each(stride, axes), _each(padding, axes), _each(dilation, axes), groups)
        operation = _Transposed(names, window, _each(output_padding, axes), weight.shape, layout)
        return call.record(operation, input, call.detached(weight), call.detached(bias))

    return rule


def _images(call: Call, x: Tensor, weight: Tensor, axes: int) -> Layout:
    """Where the examples are in a batch of images."""
    if call.is_batched(weight) or not call.is_batched(x):
        raise call.unsupported("the rule needs a batch of examples as the input, and a weight that is no batch")
    if x.dim() != axes + 2:
        raise call.unsupported(
            f"the input has shape {tuple(x.shape)} and no batch axis",
            "keep the examples of a batch along the first axis",
        )
    return call.layout(x, axis=0)


@dataclass(frozen=True, slots=True)
class Window:
    """How a kernel moves over an image: one number an axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: tuple[int, ...] | None = None
    ) -> Tensor:
        return torch.convolution(
            *(x, weight, bias, self.stride, self.padding, self.dilation),
            *(transposed is not None, transposed or [0] * len(self.stride), self.groups),
        )

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        which: list[bool],
        groups: int | None = None,
        transposed: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(
            *(grad, x, weight, None, self.stride, self.padding, self.dilation),
            *(transposed is not None, transposed or [0] * len(self.stride), groups or self.groups, which),
        )

    def outputs(self, image: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Positions of the kernel along each axis of an image."""
        return tuple(
            (length + 2 * padding - step * (span - 1) - 1) // stride + 1
            for length, span, stride, padding, step in zip(
                image, kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )


@dataclass(frozen=True, slots=True)
class _Convolution:
    names: tuple[Any, Any]
    window: Window
    weight_shape: torch.Size
    layout: Layout

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        return self.window.forward(x, weight, bias), (x, weight if x.requires_grad else None)

    def backward(
        self, grad: Tensor, saved: tuple[Tensor, Tensor | None], *, need_input: bool
    ) -> tuple[Tensor | None, list[tuple[Any, Factor]]]:
        x, weight = saved
        grad_input = None
        if need_input and weight is not None:
            grad_input, *_ = self.window.backward(grad, x, weight, [True, False, False])
        name, bias_name = self.names
        found: list[tuple[Any, Factor]] = []
        images, q = self.layout.split(x.detach()), self.layout.split(grad)
        if name is not None:
            found.append((name, Patches(images, q, self.window, self.weight_shape)))
        if bias_name is not None:
            found.append((bias_name, _bias(q)))
        return grad_input, found


@dataclass(frozen=True, slots=True)
class _Transposed:
    """The weight's gradient is that of a convolution of the output's gradient whose output's gradient is the input."""

    names: tuple[Any, Any]
    window: Window
    output_padding: tuple[int, ...]
    weight_shape: torch.Size
    layout: Layout

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        y = self.window.forward(x, weight, bias, self.output_padding)
        return y, (x, weight if x.requires_grad else None)

    def backward(
        self, grad: Tensor, saved: tuple[Tensor, Tensor | None], *, need_input: bool
    ) -> tuple[Tensor | None, list[tuple[Any, Factor]]]:
        x, weight = saved
        grad_input = None
        if need_input and weight is not None:
            which = [True, False, False]
            grad_input, *_ = self.window.backward(grad, x, weight, which, transposed=self.output_padding)
        name, bias_name = self.names
        found: list[tuple[Any, Factor]] = []
        images, q = self.layout.split(grad), self.layout.split(x.detach())
        if bias_name is not None:
            found.append((bias_name, _bias(images)))
        if name is not None:
            window, sides = self.window, tuple(q.shape[3:])
            if window.outputs(images.shape[3:], self.weight_shape[2:]) != sides:
                # Output padding of a stride or more: cut to what the kernel reached.
                reached = [
                    stride * (length - 1) + step * (span - 1) + 1
                    for length, span, stride, step in zip(
                        sides, self.weight_shape[2:], window.stride, window.dilation, strict=True
                    )
                ]
                pads = [
                    pad
                    for end, length, before in reversed(
                        list(zip(reached, images.shape[3:], window.padding, strict=True))
                    )
                    for pad in (before, end - length - before)
                ]
                images = F.pad(images, pads)
                window = Window(window.stride, (0,) * len(sides), window.dilation, window.groups)
            found.append((name, Patches(images, q, window, self.weight_shape)))
        return grad_input, found


def _bias(q: Tensor) -> Dense:
    """(B, M, O, ...) -> (B, O)."""
    return Dense(q.flatten(3).sum((1, 3), dtype=accumulation_dtype(q.dtype)))


@dataclass(frozen=True, slots=True)
class Patches(Joinable, Products):
    """G_b = sum_mt q_bmt (patch t of x_bm)^T, for images x: (B, M, C, ...) and output gradients q: (B, M, O, ...)."""

    x: Tensor
    q: Tensor
    window: Window
    weight_shape: torch.Size

    @property
    def size(self) -> int:
        return self.x.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def steps(self) -> int:
        return self.q.shape[1] * math.prod(self.q.shape[3:])

    @property
    def contracted(self) -> int:
        return self.weight_shape[1]

    @property
    def terms(self) -> int:
        return self.weight_shape[0] + self.weight_shape[1] + math.prod(self.weight_shape[2:])

    @property
    def kind(self) -> Hashable:
        return Patches, self.window, self.x.shape[3:]

    @classmethod
    def joined(cls, factors: Sequence[Patches]) -> Patches:
        x, q = torch.cat([factor.x for factor in factors], 1), torch.cat([factor.q for factor in factors], 1)
        return cls(x, q, factors[0].window, factors[0].weight_shape)

    def select(self, keep: Tensor) -> Patches:
        return Patches(self.x[keep], self.q[keep], self.window, self.weight_shape)

    def write(self, rows: slice, out: Tensor) -> None:
        x, q = self.x[rows].to(out.dtype), self.q[rows].to(out.dtype)
        size = len(x)
        if size == 0:
            return
        # Only the shape of the weight is read.
        weight = x.new_empty(size * self.weight_shape[0], *self.weight_shape[1:])
        x, q = x.transpose(0, 1).flatten(1, 2), q.transpose(0, 1).flatten(1, 2)
        _, found, _ = self.window.backward(q, x, weight, [False, True, False], size * self.window.groups)
        out.copy_(found.reshape(out.shape))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        dtype = weights.dtype
        scales = weights.view(-1, *[1] * (self.x.dim() - 1))
        weight = self.x.new_empty(self.weight_shape, dtype=dtype)
        total = torch.zeros_like(weight)
        # Float32 is read as it is; wider sums widen a block at a time.
        wider = 0 if dtype == self.dtype else dtype.itemsize * (self.x[:1].numel() + self.q[:1].numel())
        for rows in blocks(self.size, wider, self.x.device) if wider else [slice(0, self.size)]:
            x, q = self.x[rows].to(dtype), self.q[rows].to(dtype)
            if q.numel() <= x.numel():
                q = q * scales[rows]
            else:
                x = x * scales[rows]
            x, q = x.flatten(0, 1), q.flatten(0, 1)
            _, found, _ = self.window.backward(q, x, weight, [False, True, False])
            total = found if not wider else total.add_(found)
        return total

    # -------------------------------------------------------------------------------------------------- not written out

    def work(self, probes: int) -> tuple[float, float]:
        images, groups = self.x.shape[1], self.window.groups
        outputs, channels, *kernel = self.weight_shape
        positions = images * math.prod(self.x.shape[3:])
        phases, offsets = math.prod(self.window.stride), math.prod(kernel)
        multiplications = positions**2 * channels * groups / phases + self.steps**2 * outputs
        multiplications += NARROW * probes * (positions * channels * groups + self.steps * offsets * outputs)
        touched = groups * self.steps**2 * (offsets + 2) + positions**2 / phases * groups
        return multiplications, touched + positions * channels * groups + 2 * self.steps * outputs

    def grams(self, rows: slice, probes: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        outputs, groups = self.q.shape[3:], self.window.groups
        x, q = self._channels(self.x[rows].double()), self._channels(self.q[rows].double()).flatten(2)
        (size, _, images), steps, whole = x.shape[:3], q.shape[2], slice(None)
        right = q.new_zeros(size, images, *outputs, images, *outputs)
        for phase, offsets in self._phases().items():
            part = x[(..., *(slice(a, None, stride) for a, stride in zip(phase, self.window.stride, strict=True)))]
            sides = part.shape[2:]
            part = part.flatten(2)
            gram = torch.bmm(part.mT, part).view(size, *sides, *sides)
            for offset in offsets:
                # Outputs whose patch has this entry inside the image; outside of it are zeros.
                first = [max(0, -a) for a in offset]
                stop = [min(n, side - a) for n, side, a in zip(outputs, sides[1:], offset, strict=True)]
                if all(a < b for a, b in zip(first, stop, strict=True)):
                    to = tuple(map(slice, first, stop))
                    of = tuple(slice(a + c, b + c) for a, b, c in zip(first, stop, offset, strict=True))
                    right[(whole, whole, *to, whole, *to)] += gram[(whole, whole, *of, whole, *of)]
        sketch = None
        if probes is not None:
            sketch = torch.matmul(probes.mT, x.flatten(2)).view(-1, groups, probes.shape[1], *x.shape[2:])
        return torch.bmm(q.mT, q), right.view(size, steps, steps), sketch

    def sketched_sum(self, sketches: Tensor, weights: Tensor) -> Tensor:
        """(groups, outputs of a group, kernel entries, k)."""
        groups, outputs = self.window.groups, self.weight_shape[0]
        probes, kernel = sketches.shape[2], self.weight_shape[2:]
        total = sketches.new_zeros(groups, outputs // groups, math.prod(kernel) * probes)
        bytes_per_unit = 8 * self.steps * (outputs + 2 * groups * probes * math.prod(kernel))
        for rows in blocks(self.size, bytes_per_unit, sketches.device):
            q = self._channels(self.q[rows].double()).flatten(2).unflatten(0, (-1, groups))
            q = (q * weights[rows, None, None, None]).permute(1, 2, 0, 3).flatten(2)
            total.baddbmm_(q, self._unfolded(sketches[rows]))
        return total

    def sketch(self, total: Tensor, probes: Tensor) -> Tensor:
        groups, outputs = self.window.groups, self.weight_shape[0]
        total = total.reshape(groups, outputs // groups, self.weight_shape[1], -1)
        sketched = [part.double().mT @ probes for part in total.split(max(1, (1 << 18) // total[0, 0].numel()), 1)]
        return torch.cat(sketched, 1).flatten(2)

    def _channels(self, x: Tensor) -> Tensor:
        """(b, M, C, ...) -> (b groups, C / groups, M, ...)."""
        return x.unflatten(2, (self.window.groups, -1)).movedim(1, 3).flatten(0, 1)

    def _phases(self) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
        """Where the kernel's entries are from the output's place, in units of the stride, by their remainders."""
        found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for entry in itertools.product(*(range(length) for length in self.weight_shape[2:])):
            places = [
                i * step - padding
                for i, step, padding in zip(entry, self.window.dilation, self.window.padding, strict=True)
            ]
            parts = [divmod(place, stride) for place, stride in zip(places, self.window.stride, strict=True)]
            found.setdefault(tuple(part[1] for part in parts), []).append(tuple(part[0] for part in parts))
        return found

    def _unfolded(self, sketches: Tensor) -> Tensor:
        """(b, groups, k, M, ...) -> (groups, all positions of all units, kernel entries times k)."""
        window, outputs = self.window, self.q.shape[3:]
        sketches = F.pad(sketches, [padding for padding in reversed(window.padding) for _ in range(2)])
        patches = []
        for entry in itertools.product(*(range(length) for length in self.weight_shape[2:])):
            starts = [i * step for i, step in zip(entry, window.dilation, strict=True)]
            stops = [a + (n - 1) * step + 1 for a, n, step in zip(starts, outputs, window.stride, strict=True)]
            patches.append(sketches[(..., *map(slice, starts, stops, window.stride))])
        stacked = torch.stack(patches).flatten(5)
        _, size, groups, probes, images, positions = stacked.shape
        return stacked.permute(2, 1, 4, 5, 0, 3).reshape(groups, size * images * positions, len(patches) * probes)


def _each(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values
