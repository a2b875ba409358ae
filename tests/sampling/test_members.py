"""Laws of every sampler, and what those of fixed size and order do. A new sampler joins in ``SAMPLERS``."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import accounting
from accounting import Relation
from dpkit.errors import InvalidArgument
from dpkit.mechanisms import RunKey
from dpkit.sampling import (
    CyclicPoisson,
    FixedOrder,
    Poisson,
    Sampler,
    TruncatedPoisson,
    Users,
    WithoutReplacement,
    unit_of,
)

N, FALSE_ALARM = 40, 1e-7
SAMPLERS: list[tuple[Sampler, Relation]] = [
    (Poisson(0.23), Relation.ADD_REMOVE),
    (TruncatedPoisson(0.23, 12), Relation.ADD_REMOVE),
    (CyclicPoisson(0.1, groups=4), Relation.ADD_REMOVE),
    (CyclicPoisson(0.2, groups=4), Relation.ZERO_OUT),
    (WithoutReplacement(7, N), Relation.REPLACE_ONE),
    (FixedOrder(7, N), Relation.ZERO_OUT),
    (FixedOrder(8, N, order_seed=None), Relation.REPLACE_ONE),
]
of_all = pytest.mark.parametrize(("sampler", "relation"), SAMPLERS, ids=str)


def drawn(sampler: Sampler, steps: int) -> torch.Tensor:
    """(steps, N) of 0 and 1, and a check that no unit is drawn twice in a step."""
    run, table = RunKey(), torch.zeros(steps, N, dtype=torch.long)
    arranged = sampler.arrange(N, run.arrangement())
    for step in range(steps):
        units = sampler.draw(N, run.sampling(step), step=step, arranged=arranged)
        assert len(units.unique()) == len(units)
        table[step, units] = 1
    return table


@of_all
def test_no_unit_takes_part_more_often_or_closer_than_is_said(sampler: Sampler, relation: Relation) -> None:
    steps = 61
    table, said = drawn(sampler, steps), sampler.participation(steps, N)
    assert said.steps == steps
    assert int(table.sum(0).max()) <= said.max_participations
    for unit in range(N):
        times = table[:, unit].nonzero().flatten().tolist()
        assert all(later - earlier >= said.min_separation for earlier, later in itertools.pairwise(times))


@of_all
def test_the_size_of_a_draw_stays_within_what_is_public(sampler: Sampler, relation: Relation) -> None:
    sizes = drawn(sampler, 200).sum(1)
    assert int(sizes.max()) <= sampler.largest_batch(N)
    if sampler.cap is not None:
        assert int(sizes.max()) <= sampler.cap


@of_all
def test_the_mean_size_is_the_expected_batch(sampler: Sampler, relation: Relation) -> None:
    steps = 600
    total = int(drawn(sampler, steps).sum())
    expected = sampler.sample_rate * N * steps
    if isinstance(sampler, (WithoutReplacement, FixedOrder)):
        last = 0 if N % sampler.batch_size == 0 else sampler.batch_size - N % sampler.batch_size
        passes = steps // -(-N // sampler.batch_size)
        assert total == expected - (passes * last if isinstance(sampler, FixedOrder) else 0)
    elif not isinstance(sampler, TruncatedPoisson):
        low, high = stats.binom.ppf([FALSE_ALARM, 1 - FALSE_ALARM], steps * N, sampler.sample_rate)
        assert low <= total <= high


@of_all
def test_the_event_has_a_theorem_under_its_relation_and_names_others(sampler: Sampler, relation: Relation) -> None:
    event = sampler.event(accounting.Gaussian(noise_multiplier=2.0), N)
    assert accounting.epsilon(event, 1e-5, relation=relation).upper > 0
    refused = {
        FixedOrder: [Relation.ADD_REMOVE],
        WithoutReplacement: [Relation.ADD_REMOVE, Relation.ZERO_OUT],
    }.get(type(sampler), [Relation.REPLACE_ONE])
    for other in refused:
        with pytest.raises(accounting.Unsupported, match=other.value):
            accounting.epsilon(event, 1e-5, relation=other)


def test_a_fixed_order_is_the_same_in_every_pass_and_complete() -> None:
    for sampler in (FixedOrder(7, N), FixedOrder(7, N, order_seed=None), FixedOrder(N, N)):
        per_pass = sampler.steps_per_event(N)
        table = drawn(sampler, 3 * per_pass).view(3, per_pass, N)
        assert torch.equal(table[0], table[1]) and torch.equal(table[0], table[2])
        assert bool((table[0].sum(0) == 1).all())
    assert not torch.equal(FixedOrder(N, N).arrange(N, torch.Generator()), torch.arange(N))
    assert not torch.equal(
        FixedOrder(N, N, 1).arrange(N, torch.Generator()), FixedOrder(N, N, 2).arrange(N, torch.Generator())
    )


def test_fixed_size_batches_are_uniform_and_independent() -> None:
    steps, size = 4000, 7
    table = drawn(WithoutReplacement(size, N), steps).double()
    assert bool((table.sum(1) == size).all())
    pairs = (table.T @ table).triu(1)
    pairs = pairs[pairs.triu(1) > 0]
    assert len(pairs) == N * (N - 1) // 2
    low, high = stats.binom.ppf(
        [FALSE_ALARM / len(pairs), 1 - FALSE_ALARM / len(pairs)], steps, size * (size - 1) / (N * (N - 1))
    )
    assert low <= float(pairs.min()) and float(pairs.max()) <= high
    overlap = float((table[1:] * table[:-1]).sum(1).mean())  # hypergeometric, mean 49/40, variance below 1
    assert abs(overlap - size * size / N) < 6 / (steps - 1) ** 0.5


def test_cyclic_draws_come_from_one_group_at_a_time_whose_members_are_drawn_by_lot() -> None:
    sampler, counts = CyclicPoisson(0.2, groups=4), torch.zeros(4)
    assignments = []
    for _ in range(100):
        run = RunKey()
        arranged = sampler.arrange(N, run.arrangement())
        assignments.append(arranged)
        counts += torch.bincount(arranged, minlength=4)
        for step in range(8):
            units = sampler.draw(N, run.sampling(step), step=step, arranged=arranged)
            assert bool((arranged[units] == step % 4).all())
    assert stats.chisquare(counts.numpy()).pvalue > FALSE_ALARM
    same = (assignments[0] == torch.stack(assignments[1:])).double().mean()
    assert abs(float(same) - 0.25) < 6 * (0.1875 / (99 * N)) ** 0.5  # another run, other groups


def test_within_its_group_a_unit_is_drawn_at_the_rate_of_the_event() -> None:
    sampler = CyclicPoisson(0.2, groups=4)
    assert sampler.event(accounting.Gaussian(1.0), N).sample_rate == pytest.approx(0.8)
    steps = 4000
    low, high = stats.binom.ppf([FALSE_ALARM, 1 - FALSE_ALARM], steps // 4, 0.8)
    counts = drawn(sampler, steps)[:, 0].sum()
    assert low <= int(counts) <= high


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedOrder(0, 10), "batch_size is 0; it must be at least 1"),
        (lambda: FixedOrder(11, 10), "batch_size is 11, and there are 10 units"),
        (lambda: FixedOrder(2.0, 10), "batch_size is 2.0; it must be a whole number"),
        (lambda: FixedOrder(2, 10, order_seed=-1), "order_seed is -1"),
        (lambda: WithoutReplacement(11, 10), "batch_size is 11"),
        (lambda: WithoutReplacement(1, 0), "num_examples is 0"),
        (lambda: CyclicPoisson(0.3, groups=4), "times 4 groups is above 1"),
        (lambda: CyclicPoisson(0.3, groups=0), "groups is 0"),
        (lambda: CyclicPoisson(0.0, groups=1), "sample_rate is 0.0"),
    ],
)
def test_samplers_without_a_meaning_are_refused(make: type[Poisson], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("sampler", [FixedOrder(7, N), WithoutReplacement(7, N)], ids=str)
def test_a_data_set_of_another_size_is_refused(sampler: Sampler) -> None:
    sampler.check(N, N)
    for population, public in ((N - 1, N), (N, N + 1)):
        with pytest.raises(InvalidArgument, match="need the exact, public size"):
            sampler.check(population, public)


# -- users ------------------------------------------------------------------------------------------------------------


def test_an_item_is_one_user_with_rows_of_that_user_alone() -> None:
    ids = torch.tensor([5, 2, 5, 9, 5, 2])
    rows = TensorDataset(torch.arange(6.0), ids)
    users = Users(rows, ids, rows_per_user=2)
    assert len(users) == 3
    for user, (owner, count) in enumerate(((2, 2), (5, 2), (9, 1))):
        (values, owners), weights = users[user]
        assert owners.tolist() == [owner, owner]
        assert weights.tolist() == [1 / count] * count + [0.0] * (2 - count)
        assert len(set(values.tolist())) == count
    torch.manual_seed(0)
    seen = {value for _ in range(50) for value in users[1][0][0].tolist()}
    assert seen == {0.0, 2.0, 4.0}  # of three rows, two are drawn anew each time
    (values, _), weights = next(iter(DataLoader(users, batch_size=3)))
    assert values.shape == weights.shape == (3, 2)


def test_ids_that_are_not_one_whole_number_a_row_are_refused() -> None:
    rows = TensorDataset(torch.arange(4))
    for ids in (torch.tensor([1, 2]), torch.tensor([0.5, 1.0, 1.0, 2.0])):
        with pytest.raises(InvalidArgument, match="one whole number for each row"):
            Users(rows, ids, rows_per_user=1)
    with pytest.raises(InvalidArgument, match="rows_per_user is 0"):
        Users(rows, [1, 1, 2, 2], rows_per_user=0)


def test_rows_are_chosen_with_random_numbers_that_nothing_else_uses() -> None:
    """Otherwise a user more would change which rows of all later ones are taken, and every later draw of the script."""
    ids = torch.tensor([0] * 9 + [1] * 9)
    users = Users(TensorDataset(torch.arange(18)), ids, rows_per_user=3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    chosen = {tuple(sorted(users[0][0][0].tolist())) for _ in range(40)}
    assert torch.equal(torch.get_rng_state(), before)
    assert len(chosen) > 10


def test_users_are_found_inside_of_other_data_sets() -> None:
    rows = TensorDataset(torch.arange(4))
    users = Users(rows, [1, 1, 2, 2], rows_per_user=1)
    for inside in (users, Subset(users, [0]), Subset(Subset(users, [0, 1]), [1]), ConcatDataset([rows, users])):
        assert unit_of(inside) == "user"
    assert unit_of(rows) is None and unit_of(Subset(rows, [0])) is None
