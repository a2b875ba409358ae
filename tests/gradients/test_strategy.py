"""Forms follow shapes and the memory that is left, and written-out gradients live in memory that is lent once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dpkit.gradients import forms, strategy
from dpkit.gradients.factors import Dense, Factor, OneHot, Outer
from dpkit.gradients.forms import Form, join
from dpkit.gradients.rules.conv import Patches, Window
from dpkit.gradients.strategy import Workspace


def tokens(size: int, steps: int, p: int, d: int) -> Outer:
    return Outer(torch.randn(1, 1, p).expand(size, steps, p), torch.randn(1, 1, d).expand(size, steps, d))


def images(size: int, channels: int, outputs: int, side: int) -> Patches:
    window = Window((1, 1), (1, 1), (1, 1), 1)
    x, q = torch.randn(size, 1, channels, side, side), torch.randn(size, 1, outputs, side, side)
    return Patches(x, q, window, torch.Size((outputs, channels, 3, 3)))


def chosen(factor: Factor, entries: int, keep_bytes: float = float("inf")) -> strategy.Option:
    parameter = torch.empty(entries)
    found = strategy.options([factor], parameter, factor.size)
    return strategy.choose(found, parameter, keep_bytes, Workspace())


@pytest.mark.parametrize(
    ("factor", "entries", "keeps"),
    [
        (tokens(16, 128, 768, 256), 768 * 256, True),
        (tokens(8, 512, 1024, 256), 1024 * 256, True),
        (tokens(64, 2, 1024, 1024), 1024 * 1024, False),
        (images(4, 32, 32, 32), 32 * 32 * 9, True),
        (images(4, 512, 512, 4), 512 * 512 * 9, False),
        (images(4, 256, 256, 8), 256 * 256 * 9, False),
    ],
    ids=["128 tokens", "512 tokens", "two tokens", "large images", "4 x 4 images", "8 x 8 images"],
)
def test_the_form_follows_the_shapes(factor: Factor, entries: int, keeps: bool) -> None:
    assert bool(chosen(factor, entries).kept_bytes) == keeps
    assert chosen(factor, entries, 0).kept_bytes == 0


def test_a_form_that_keeps_nothing_is_a_gram_or_is_computed_twice() -> None:
    assert chosen(tokens(16, 64, 512, 512), 512 * 512, 0).products is not None
    assert chosen(tokens(16, 1024, 64, 64), 64 * 64, 0).products is None


@pytest.mark.parametrize(
    ("uses", "expected"),
    [
        ([], forms.Zero),
        ([Dense(torch.ones(2, 3, 4))], forms.Kept),
        ([Dense(torch.ones(2, 3, 4)), Dense(torch.ones(2, 3, 4))], forms.Kept),
        ([tokens(2, 1, 3, 4)], forms.RankOne),
        ([OneHot(torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, 4), 3)], forms.Coalesced),
        ([tokens(2, 5, 3, 4), Dense(torch.ones(2, 3, 4))], forms.Recomputed),
    ],
    ids=["unused", "written by the operation", "written twice", "one vector", "lookups", "a mixture"],
)
def test_what_needs_no_memory_takes_none(uses: list[Factor], expected: type[Form]) -> None:
    form, taken = join(uses, nn.Parameter(torch.ones(3, 4)), 2, 0, Workspace())
    assert isinstance(form, expected)
    assert taken == 0


def test_memory_goes_to_those_who_gain_most_per_byte() -> None:
    """First come, first served in the first step; in the second, the parameter with the larger gain per byte."""
    small, large = nn.Parameter(torch.empty(256, 256)), nn.Parameter(torch.empty(256, 256))
    little, much = tokens(16, 64, 256, 256), tokens(16, 512, 256, 256)
    budget, space = 16 * 256 * 256 * 4, Workspace()

    def step() -> tuple[bool, bool]:
        left, kept = budget, []
        for parameter, factor in ((small, little), (large, much)):
            option = strategy.choose(strategy.options([factor], parameter, 16), parameter, left, space)
            left -= option.kept_bytes
            kept.append(option.kept_bytes > 0)
        space.next_step(budget)
        return kept[0], kept[1]

    assert step() == (True, False)
    assert step() == (False, True)
    assert step() == (False, True)


def kept(space: Workspace, parameter: Tensor, value: float, size: int) -> forms.Kept:
    outer = Outer(torch.full((size, 99, 3), value), torch.ones(size, 99, 4))
    form, taken = join([outer], parameter, size, float("inf"), space)
    assert isinstance(form, forms.Kept)
    assert taken == size * 12 * 4
    assert (form.gradients == 99 * value).all()
    return form


def test_written_out_gradients_live_in_memory_that_is_lent_once() -> None:
    parameter, space = nn.Parameter(torch.ones(3, 4)), Workspace()
    first, second = kept(space, parameter, 1.0, 5), kept(space, parameter, 2.0, 5)
    assert (first.gradients == 99).all()
    addresses = {first.gradients.data_ptr(), second.gradients.data_ptr()}
    assert len(addresses) == 2
    del first, second
    assert kept(space, parameter, 3.0, 4).gradients.data_ptr() in addresses
    assert len(kept(space, parameter, 4.0, 6).gradients) == 6


def test_batches_of_changing_size_do_not_pile_up_memory() -> None:
    parameters, space = [nn.Parameter(torch.ones(3, 4)) for _ in range(3)], Workspace()
    for size in (5, 6, 4, 7, 9, 8):
        together = [kept(space, parameter, 1.0, size) for parameter in parameters]
        assert len({form.gradients.data_ptr() for form in together}) == 3
        del together
    assert len(space._buffers) == 3
