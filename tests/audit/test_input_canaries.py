"""Input canaries: their coins, what they are made of, what they do to N, and that they catch a model that remembers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dpkit
from dpkit.audit import one_run
from dpkit.audit.input_canaries import (
    InputCanaries,
    clip_bkd,
    group_claim,
    mislabelled,
    random_noise,
    scores_of,
)
from dpkit.errors import InvalidArgument

CLASSES = 4


def public(n: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(CLASSES, size=n))
    centres = torch.from_numpy(np.random.default_rng(9).normal(size=(CLASSES, 3, 8)).astype(np.float32))
    noise = torch.from_numpy(rng.normal(0, 1, (n, 3, 8)).astype(np.float32))
    return centres[labels] + noise, labels


def make(kind: str, count: int, rng: np.random.Generator) -> InputCanaries:
    x, y = public()
    match kind:
        case "mislabelled":
            return mislabelled(x, y, count=count, num_classes=CLASSES, rng=rng)
        case "noise":
            return random_noise((3, 8), count=count, num_classes=CLASSES, rng=rng)
        case _:
            return clip_bkd(x, y, count=count, num_classes=CLASSES, rng=rng)


KINDS = ["mislabelled", "noise", "clip_bkd"]


# -- coins ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_coins_are_fair_and_independent_of_each_other(kind: str):
    """250 sets of 20 canaries: 5,000 coins, 4,750 pairs of neighbours; each count at 1 - 1e-6, three kinds."""
    tosses = np.array([make(kind, 20, np.random.default_rng(seed)).member for seed in range(250)])
    for number, trials in ((tosses.sum(), 5000), ((tosses[:, 1:] == tosses[:, :-1]).sum(), 4750)):
        low, high = stats.binom.ppf([5e-7, 1 - 5e-7], trials, 0.5)
        assert low <= number <= high


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_generator_makes_the_same_canaries_and_another_one_others(kind: str):
    one, same, other = (make(kind, 20, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.inputs, same.inputs) and torch.equal(one.labels, same.labels)
    assert (one.member == same.member).all() and (one.member != other.member).any()


# -- what they are ----------------------------------------------------------------------------------------------------


def test_mislabelled_canaries_are_different_real_inputs_with_a_wrong_label():
    x, y = public()
    found = mislabelled(x, y, count=300, num_classes=CLASSES, rng=np.random.default_rng(0))
    rows = {tuple(row.flatten().tolist()): int(label) for row, label in zip(x, y, strict=True)}
    keys = [tuple(row.flatten().tolist()) for row in found.inputs]
    assert len(set(keys)) == 300 and set(keys) == set(rows)
    shifts = [(int(label) - rows[key]) % CLASSES for key, label in zip(keys, found.labels, strict=True)]
    assert 0 not in shifts
    # Three shifts, 100 times each: below 65 with probability 1e-5.
    assert min(np.bincount(shifts, minlength=CLASSES)[1:]) >= 65


def test_noise_fills_its_range_with_every_class():
    found = random_noise((2, 5), count=500, num_classes=3, rng=np.random.default_rng(0), lower=-2, upper=4)
    assert found.inputs.dtype == torch.float32 and found.inputs.shape == (500, 2, 5)
    assert stats.kstest(found.inputs.numpy().ravel(), stats.uniform(-2, 6).cdf).pvalue > 1e-6
    assert set(found.labels.tolist()) == {0, 1, 2}


def test_clip_bkd_takes_the_directions_of_least_variance_at_the_median_length_with_the_least_likely_label():
    x, y = public()
    found = clip_bkd(x, y, count=5, num_classes=CLASSES, rng=np.random.default_rng(0))
    rows = x.flatten(1).double().numpy()
    directions = np.linalg.svd(rows)[2][::-1][:5]  # smallest first
    length = np.median(np.linalg.norm(rows, axis=1))
    flat = found.inputs.flatten(1).double().numpy()
    assert np.linalg.norm(flat, axis=1) == pytest.approx(length, rel=0.01)
    assert np.abs((flat / length * directions).sum(1)) == pytest.approx(np.ones(5), abs=0.01)
    means = np.array([rows[y.numpy() == label].mean(0) for label in range(CLASSES)])
    assert found.labels.tolist() == (flat @ means.T).argmin(1).tolist()


def test_clip_bkd_asks_a_model_for_the_least_likely_label():
    x, y = public()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, CLASSES))
    found = clip_bkd(x, y, count=6, num_classes=CLASSES, rng=np.random.default_rng(0), model=model)
    assert found.labels.tolist() == model(found.inputs).argmin(1).tolist()
    with pytest.raises(InvalidArgument, match="4 logits"):
        clip_bkd(x, y, count=6, num_classes=CLASSES, rng=np.random.default_rng(0), model=lambda z: z.flatten(1))


def test_directions_that_the_data_lack_altogether_come_first():
    # Fewer rows than columns: most singular values are 0 and their vectors are orthogonal to every row.
    x, y = public(n=10)
    found = clip_bkd(x, y, count=14, num_classes=CLASSES, rng=np.random.default_rng(0))
    assert (found.inputs.flatten(1) @ x.flatten(1).T).abs().max() < 1e-3


# -- the data set and N -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 3])
def test_the_canaries_that_are_in_stand_behind_the_data_and_n_does_not_depend_on_the_coins(copies: int):
    x, y = public()
    sizes = set()
    for seed in range(5):
        canaries = clip_bkd(x, y, count=12, num_classes=CLASSES, rng=np.random.default_rng(seed), copies=copies)
        dataset, num_examples = canaries.added_to(TensorDataset(x, y))
        sizes.add(num_examples)
        inside = int(canaries.member.sum())
        assert len(dataset) == 300 + copies * inside <= num_examples  # pyright: ignore[reportArgumentType]
        rows = [dataset[300 + index] for index in range(copies * inside)]
        expected = canaries.inputs[torch.from_numpy(canaries.member)].repeat_interleave(copies, dim=0)
        assert torch.equal(torch.stack([row for row, _ in rows]), expected)
        assert [int(label) for _, label in rows] == [
            int(label)
            for label, inside in zip(canaries.labels, canaries.member, strict=True)
            if inside
            for _ in range(copies)
        ]
    assert sizes == {300 + 12 * copies}


class Numbers(Dataset):
    """A data set whose labels are numbers, as torchvision's are."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.inputs[index], self.labels[index]


@pytest.mark.parametrize("kind", [Numbers, TensorDataset])
def test_labels_are_collated_with_those_of_the_data(kind):
    x, y = public()
    dataset, _ = make("noise", 40, np.random.default_rng(0)).added_to(kind(x, y))
    loader = DataLoader(dataset, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    assert all(labels.dtype == torch.int64 for _, labels in loader)


def test_a_data_set_that_does_not_fit_is_refused():
    canaries = make("noise", 5, np.random.default_rng(0))
    x, y = public()
    for dataset, words in (
        (TensorDataset(x[:0], y[:0]), "empty"),
        (TensorDataset(x), "pairs"),
        (TensorDataset(x.flatten(1), y), "pairs"),
        (TensorDataset(x.double(), y), "pairs"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            canaries.added_to(dataset)


# -- scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_minus_the_loss_and_the_model_keeps_its_mode():
    canaries = make("noise", 30, np.random.default_rng(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, CLASSES), nn.Dropout(0.5)).train()
    found = scores_of(model, canaries)
    probabilities = torch.softmax(model[1](canaries.inputs.flatten(1)).double(), dim=1)
    expected = probabilities[torch.arange(30), canaries.labels].log()
    assert found == pytest.approx(expected.detach().numpy(), rel=1e-6)
    assert model.training and model[2].training


def test_models_that_cannot_be_scored_are_refused():
    canaries = make("noise", 30, np.random.default_rng(0))
    for model, words in (
        (lambda x: torch.full((len(x), CLASSES), math.nan), "not finite"),
        (lambda x: torch.zeros(len(x)), "one row of logits"),
        (lambda x: torch.zeros(len(x), 2), "one row of logits"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            scores_of(model, canaries)


# -- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_a_claim_for_groups_is_the_claim_applied_step_by_step(copies: int):
    epsilon, delta = 0.7, 1e-6
    factor, added = 1.0, 0.0
    for _ in range(copies):  # p <= e^ε (factor p' + added) + δ
        factor, added = math.exp(epsilon) * factor, math.exp(epsilon) * added + delta
    found = group_claim(epsilon, delta, copies)
    assert found == pytest.approx((math.log(factor), added), rel=1e-12)


def test_claims_for_groups_saturate_and_refuse_what_is_no_claim():
    assert group_claim(3.0, 1e-5, 100_000) == (300_000.0, 1.0)
    assert group_claim(3.0, 0.0, 100_000) == (300_000.0, 0.0)
    assert group_claim(900.0, 1e-5, 1) == (900.0, 1e-5)
    for epsilon, delta, copies in (
        (-1, 0, 1),
        (math.nan, 0, 1),
        (math.inf, 0, 1),
        (1, 2, 1),
        (1, math.nan, 1),
        (1, 0, 0),
    ):
        with pytest.raises(InvalidArgument, match="no claim"):
            group_claim(epsilon, delta, copies)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": 0}, "count"),
        ({"count": True}, "count"),
        ({"num_classes": 1}, "num_classes"),
        ({"num_classes": 2}, "labels"),
        ({"labels": torch.zeros(299, dtype=torch.int64)}, "shape"),
        ({"labels": torch.zeros(300)}, "labels"),
        ({"inputs": torch.zeros(300)}, "shape"),
        ({"inputs": torch.zeros(0, 3), "labels": torch.zeros(0, dtype=torch.int64)}, "at least 1"),
        ({"inputs": torch.zeros(300, 24).index_fill_(0, torch.tensor([7]), math.nan)}, "input 7"),
    ],
)
@pytest.mark.parametrize("maker", [mislabelled, clip_bkd])
def test_what_no_canary_can_be_made_of_is_refused(maker, change: dict[str, object], words: str):
    x, y = public()
    arguments = {"inputs": x, "labels": y, "count": 5, "num_classes": CLASSES} | change
    with pytest.raises(InvalidArgument, match=words):
        maker(**arguments, rng=np.random.default_rng(0))


def test_more_canaries_than_there_is_material_for_are_refused():
    x, y = public()
    rng = np.random.default_rng(0)
    with pytest.raises(InvalidArgument, match="count is 301"):
        mislabelled(x, y, count=301, num_classes=CLASSES, rng=rng)
    with pytest.raises(InvalidArgument, match="24 numbers"):
        clip_bkd(x, y, count=25, num_classes=CLASSES, rng=rng)
    with pytest.raises(InvalidArgument, match="token ids"):
        clip_bkd(torch.ones(9, 4, dtype=torch.int64), y[:9], count=2, num_classes=CLASSES, rng=rng)
    with pytest.raises(InvalidArgument, match="all zeros"):
        clip_bkd(torch.zeros(9, 4), y[:9], count=2, num_classes=CLASSES, rng=rng)
    with pytest.raises(InvalidArgument, match="copies"):
        clip_bkd(x, y, count=2, num_classes=CLASSES, rng=rng, copies=0)


@pytest.mark.parametrize(
    ("change", "words"), [({"shape": (0,)}, "shape"), ({"lower": 1.0}, "range"), ({"upper": math.nan}, "range")]
)
def test_noise_outside_its_domain_is_refused(change: dict[str, object], words: str):
    arguments: dict[str, Any] = {"shape": (3,), "count": 2, "num_classes": 2, **change}
    with pytest.raises(InvalidArgument, match=words):
        random_noise(**arguments, rng=np.random.default_rng(0))


# -- end to end -------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, CLASSES))


def test_a_model_that_remembers_contradicts_a_small_claim(tmp_path: Path):
    """Trained without privacy until it fits its noise, a network tells nearly all coins."""
    x, y = public()
    canaries = random_noise((3, 8), count=300, num_classes=CLASSES, rng=np.random.default_rng(5), lower=-2, upper=2)
    dataset, _ = canaries.added_to(TensorDataset(x, y))
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = DataLoader(dataset, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    for _ in range(150):
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    bound = one_run(scores_of(model, canaries), canaries.member, delta=1e-5)
    assert bound.epsilon > 1.5, bound


def trained_by_the_engine(
    folder: Path, rng: np.random.Generator, epochs: int, **noise: float
) -> tuple[float, nn.Module, InputCanaries]:
    """(what the ledger says that it cost, the model, its 300 canaries of noise)."""
    canaries = random_noise((3, 8), count=300, num_classes=CLASSES, rng=rng, lower=-2, upper=2)
    dataset, num_examples = canaries.added_to(TensorDataset(*public()))
    engine = dpkit.PrivacyEngine(folder)
    model = network()
    model, optimizer, loader = engine.make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=2.0),
        DataLoader(dataset, batch_size=64),
        num_examples=num_examples,
        target_delta=1e-5,
        epochs=epochs,
        max_grad_norm=1.0,
        **noise,  # pyright: ignore[reportArgumentType]
    )
    while engine.steps_left:
        for inputs, labels in loader:
            optimizer.zero_grad()
            engine.backward(F.cross_entropy(model(inputs), labels, reduction="none"))
            optimizer.step()
    spent = engine.statement().epsilon
    engine.detach()
    return spent, model, canaries


@pytest.mark.slow
def test_a_model_that_the_engine_trained_does_not(tmp_path: Path):
    """Three runs at ε = 1, noise from the operating system. The claim is true, so each contradicts it with probability
    at most 1e-6, the confidence of the audit."""
    for run in range(3):
        rng = np.random.default_rng()
        spent, model, canaries = trained_by_the_engine(tmp_path / str(run), rng, 20, target_epsilon=1.0)
        bound = one_run(scores_of(model, canaries), canaries.member, delta=1e-5, confidence=1 - 1e-6)
        assert bound.epsilon <= spent <= 1.0, bound


@pytest.mark.slow
def test_an_engine_with_too_little_noise_for_a_claim_of_one_is_contradicted(tmp_path: Path):
    """The same training with next to no noise: what the test above asks can come out otherwise."""
    rng = np.random.default_rng(5)
    spent, model, canaries = trained_by_the_engine(tmp_path / "run", rng, 150, noise_multiplier=1e-3)
    bound = one_run(scores_of(model, canaries), canaries.member, delta=1e-5)
    assert 1.0 < bound.epsilon <= spent, bound
