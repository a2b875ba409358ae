"""Normal form: one place for counts, one mechanism per batch, one table of relations."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest

from accounting import InvalidParameter, Unsupported, epsilon
from accounting.events import (
    ApproximateDP,
    BinomialTrials,
    Composed,
    Gaussian,
    Laplace,
    MatrixMechanism,
    OnePass,
    Poisson,
    PoissonTrials,
    PureDP,
    Relation,
    Repeated,
    Select,
    TruncatedNegativeBinomial,
    TruncatedPoisson,
    WithoutReplacement,
)
from accounting.normal_form import atoms_under, joint_noise_multiplier, normal_form

ADD_REMOVE, REPLACE_ONE, ZERO_OUT = Relation.ADD_REMOVE, Relation.REPLACE_ONE, Relation.ZERO_OUT

ATOMS = [
    Gaussian(1.3),
    Laplace(2.0),
    ApproximateDP(0.4, 1e-8),
    ApproximateDP(0.4, 0.0),
    Poisson(0.01, Gaussian(0.7)),
    Poisson(0.01, Composed((Gaussian(0.7), Repeated(Laplace(3.0), 2)))),
    TruncatedPoisson(0.01, 600, 50_000, Gaussian(1.1)),
    WithoutReplacement(5, 90, Gaussian(1.0)),
    OnePass(Gaussian(4.0)),
    OnePass(Laplace(4.0)),
    MatrixMechanism(2.0, 3.5, 64, 16),
    Select(Poisson(0.01, Gaussian(0.7)), TruncatedNegativeBinomial(1.0, 0.1)),
    Select(Gaussian(1.0), PoissonTrials(3.0)),
    Select(Gaussian(1.0), BinomialTrials(3, 0.5)),
]
ALLOWED = {
    Gaussian(1.0): {ADD_REMOVE, REPLACE_ONE, ZERO_OUT},
    Laplace(1.0): {ADD_REMOVE, REPLACE_ONE, ZERO_OUT},
    PureDP(1.0): {ADD_REMOVE, REPLACE_ONE, ZERO_OUT},
    ApproximateDP(1.0, 1e-9): {ADD_REMOVE, REPLACE_ONE, ZERO_OUT},
    Poisson(0.1, Gaussian(1.0)): {ADD_REMOVE, ZERO_OUT},
    Poisson(0.1, Composed((PureDP(1.0), Gaussian(1.0)))): {ADD_REMOVE, ZERO_OUT},
    Poisson(1.0, Gaussian(1.0)): {ADD_REMOVE, REPLACE_ONE, ZERO_OUT},
    TruncatedPoisson(0.1, 20, 100, Gaussian(1.0)): {ADD_REMOVE, ZERO_OUT},
    WithoutReplacement(10, 100, Gaussian(1.0)): {REPLACE_ONE},
    WithoutReplacement(100, 100, Gaussian(1.0)): {REPLACE_ONE},
    OnePass(Gaussian(1.0)): {REPLACE_ONE, ZERO_OUT},
    MatrixMechanism(1.0, 2.0): {REPLACE_ONE, ZERO_OUT},
    Select(Gaussian(1.0), PoissonTrials(3.0)): {ADD_REMOVE, REPLACE_ONE, ZERO_OUT},
    Select(Poisson(0.1, Gaussian(1.0)), PoissonTrials(3.0)): {ADD_REMOVE, ZERO_OUT},
    Select(OnePass(Gaussian(1.0)), PoissonTrials(3.0)): {REPLACE_ONE, ZERO_OUT},
    Select(WithoutReplacement(10, 100, Gaussian(1.0)), PoissonTrials(3.0)): {REPLACE_ONE},
    Repeated(Composed((OnePass(Gaussian(1.0)), Poisson(0.1, Gaussian(1.0)))), 3): {ZERO_OUT},
    Composed((WithoutReplacement(10, 100, Gaussian(1.0)), Poisson(0.1, Gaussian(1.0)))): set(),
}


def name_of(event):
    inner = getattr(event, "event", None)
    return event.kind if inner is None else f"{event.kind}({name_of(inner)})"


@pytest.mark.parametrize("relation", Relation)
@pytest.mark.parametrize("event", ALLOWED, ids=name_of)
def test_each_event_is_accounted_under_its_relations_only(event, relation):
    if relation in ALLOWED[event]:
        assert atoms_under(event, relation)
    else:
        with pytest.raises(Unsupported, match=rf"under {relation.value} has no theorem here.*State the guarantee for"):
            atoms_under(event, relation)


@pytest.mark.parametrize("atom", ATOMS, ids=name_of)
def test_an_atom_is_its_own_normal_form_and_its_count_is_repetition(atom):
    assert normal_form(atom) == [(atom, 1)]
    for seven in (Repeated(atom, 7), Composed((atom,) * 7), Composed((Repeated(atom, 3), atom, Repeated(atom, 3)))):
        assert normal_form(seven) == [(atom, 7)]
    assert normal_form(Repeated(Repeated(Composed((atom, atom)), 3), 4)) == [(atom, 24)]
    assert normal_form(Repeated(atom, 0)) == []


def test_the_order_of_events_changes_no_count():
    draw = random.Random(0)
    for _ in range(50):
        events = [Repeated(atom, draw.randint(1, 3)) for atom in ATOMS] * 2
        expected = dict(normal_form(Composed(tuple(events))))
        draw.shuffle(events)
        cut = draw.randint(0, len(events))
        assert dict(normal_form(Composed((Composed(tuple(events[:cut])), *events[cut:])))) == expected


def test_the_atoms_of_a_normal_form_are_its_own_normal_form():
    event = Repeated(Composed((*ATOMS, PureDP(1.0), Poisson(0.3, Composed((Gaussian(1.0), Gaussian(2.0)))))), 3)
    again = Composed(tuple(Repeated(atom, count) for atom, count in normal_form(event)))
    assert normal_form(again) == normal_form(event)


def test_counts_of_what_becomes_equal_are_added():
    event = Composed((OnePass(Gaussian(2.0)), Repeated(Gaussian(2.0), 3), MatrixMechanism(2.0, 1.0)))
    assert atoms_under(event, ZERO_OUT) == [(Gaussian(2.0), 5)]
    with pytest.raises(InvalidParameter, match="counts"):
        atoms_under(Composed((Repeated(OnePass(Gaussian(2.0)), 2**52), Repeated(Gaussian(2.0), 2**52))), ZERO_OUT)


@pytest.mark.parametrize("sampled", [lambda e: Poisson(0.1, e), lambda e: WithoutReplacement(5, 9, e), OnePass])
def test_queries_on_one_batch_are_one_mechanism_in_any_order(sampled):
    parts = [
        Gaussian(1.0),
        Laplace(2.0),
        PureDP(0.5),
        Repeated(Gaussian(2.0), 4),
        Laplace(1.0),
        ApproximateDP(0.5, 0.0),
    ]
    forms = {tuple(normal_form(sampled(Composed(p)))) for p in itertools.permutations(parts)}
    assert len(forms) == 1
    if sampled is not OnePass:
        (((atom, count),),) = forms
        inside = normal_form(atom.event)
        assert count == 1 and inside[0][0].noise_multiplier == pytest.approx(0.5**0.5, rel=1e-14)
        assert inside[1:] == [(ApproximateDP(0.5, 0.0), 2), (Laplace(1.0), 1), (Laplace(2.0), 1)]


@pytest.mark.parametrize(
    ("sampled", "kind"),
    [(lambda e: Poisson(0.1, e), Poisson), (lambda e: TruncatedPoisson(0.1, 5, 9, e), TruncatedPoisson)],
)
def test_gaussian_queries_on_one_batch_become_one_gaussian_rounded_down(sampled, kind):
    (atom, count), *rest = normal_form(sampled(Composed((Gaussian(1.0), Repeated(Gaussian(2.0), 4)))))
    assert isinstance(atom, kind) and count == 1 and not rest
    joint = Fraction(atom.event.noise_multiplier)
    assert 0.5 - Fraction(1e-14) <= joint**2 <= 0.5


def test_a_single_query_keeps_its_multiplier_to_the_last_digit():
    for noise in (0.7, 1.1, 1 / 3, 1e-50, 1e50):
        assert normal_form(Poisson(0.1, Composed((Gaussian(noise),)))) == [(Poisson(0.1, Gaussian(noise)), 1)]
        assert atoms_under(MatrixMechanism(noise, 1.0), ZERO_OUT) == [(Gaussian(noise), 1)]


@pytest.mark.parametrize(("steps", "truth", "separately"), [(1000, 1.8282, 1.7401), (10_000, 6.1877, 5.9517)])
def test_clipped_bits_on_the_batch_of_the_gradient_cost_what_both_reveal_together(steps, truth, separately):
    bits = Gaussian(4.0)  # sensitivity 1/2, standard deviation 2
    gradient = Gaussian((1 - 4.0**-2) ** -0.5)
    on_one_batch = Repeated(Poisson(0.01, Composed((gradient, bits))), steps)
    on_two_batches = Repeated(Composed((Poisson(0.01, gradient), Poisson(0.01, bits))), steps)
    # Truths by another library, to four digits.
    for event, true in ((on_one_batch, truth), (on_two_batches, separately)):
        assert true - 1e-4 <= epsilon(event, 1e-5, relation="add_remove").upper <= true + 0.02


def test_full_rate_is_no_sampling_and_rate_zero_is_nothing():
    both = Composed((Gaussian(2.0), Repeated(Laplace(1.0), 2)))
    assert normal_form(Poisson(1.0, both)) == normal_form(both)
    assert normal_form(Repeated(Poisson(0.0, both), 9)) == []
    assert atoms_under(WithoutReplacement(9, 9, both), REPLACE_ONE) == normal_form(both)


@pytest.mark.parametrize(
    "sampled",
    [
        lambda e: Poisson(0.5, e),
        lambda e: TruncatedPoisson(0.5, 3, 9, e),
        lambda e: WithoutReplacement(3, 9, e),
        OnePass,
        lambda e: Select(e, PoissonTrials(3.0)),
        lambda e: Repeated(e, 3),
    ],
)
def test_what_looks_at_nothing_reveals_nothing(sampled):
    for nothing in (Composed(()), PureDP(0.0), ApproximateDP(0.0, 0.0), Poisson(0.0, Gaussian(1.0))):
        if nothing != Poisson(0.0, Gaussian(1.0)) or sampled(nothing).kind in ("select", "repeated", "one_pass"):
            assert normal_form(sampled(nothing)) == []


def test_a_cap_that_cannot_be_reached_cuts_nothing():
    assert normal_form(TruncatedPoisson(0.1, 11, 10, Gaussian(1.0))) == [(Poisson(0.1, Gaussian(1.0)), 1)]
    assert normal_form(TruncatedPoisson(0.1, 10, 10, Gaussian(1.0)))[0][0].kind == "truncated_poisson"


@pytest.mark.parametrize(
    "inner", [atom for atom in ATOMS if not isinstance(atom, Gaussian | Laplace | ApproximateDP)], ids=name_of
)
@pytest.mark.parametrize("outer", ["poisson", "truncated_poisson", "without_replacement", "one_pass"])
def test_sampling_and_whole_runs_inside_sampling_are_unsupported(outer, inner):
    around = {
        "poisson": lambda e: Poisson(0.1, e),
        "truncated_poisson": lambda e: TruncatedPoisson(0.1, 5, 20, e),
        "without_replacement": lambda e: WithoutReplacement(2, 9, e),
        "one_pass": OnePass,
    }[outer]
    with pytest.raises(Unsupported, match=rf"^{outer} around {inner.kind}: .*[Cc]harge"):
        normal_form(around(Repeated(inner, 2)))


def test_truncation_is_for_gaussian_noise_only():
    for inner in (Laplace(1.0), Composed((Gaussian(1.0), PureDP(1.0)))):
        with pytest.raises(
            Unsupported, match="truncated_poisson around (laplace|approximate_dp).*Poisson batches without"
        ):
            normal_form(TruncatedPoisson(0.1, 5, 20, inner))
    assert normal_form(TruncatedPoisson(0.1, 21, 20, Laplace(1.0))) == [(Poisson(0.1, Laplace(1.0)), 1)]


def test_a_selected_run_is_refused_for_what_it_does_inside():
    with pytest.raises(Unsupported, match="sampling inside sampling"):
        normal_form(Select(Poisson(0.1, Poisson(0.1, Gaussian(1.0))), PoissonTrials(3.0)))


def test_epochs_of_one_pass_are_repeated_gaussians():
    assert atoms_under(Repeated(OnePass(Gaussian(4.0)), 3), ZERO_OUT) == [(Gaussian(4.0), 3)]
    assert atoms_under(OnePass(Repeated(Laplace(4.0), 3)), REPLACE_ONE) == [(Laplace(4.0), 3)]


def test_correlated_noise_is_one_gaussian_that_is_never_too_large():
    draw = random.Random(1)
    for _ in range(1000):
        noise, sensitivity = 10 ** draw.uniform(-40, 40), 10 ** draw.uniform(-40, 40)
        ((atom, count),) = atoms_under(MatrixMechanism(noise, sensitivity), ZERO_OUT)
        true = Fraction(noise) / Fraction(sensitivity)
        assert count == 1 and true * (1 - Fraction(1e-15)) <= Fraction(atom.noise_multiplier) <= true


def test_what_is_no_event_has_no_normal_form():
    with pytest.raises(InvalidParameter, match="build one from the classes of accounting.events"):
        normal_form("gaussian")


def test_the_joint_multiplier_is_never_above_the_exact_root():
    draw = random.Random(2)
    for _ in range(1000):
        groups = draw.randint(1, 20)
        norms = [10 ** draw.uniform(-3, 3) for _ in range(groups)]
        stds = [10 ** draw.uniform(-3, 3) for _ in range(groups)]
        total = sum(((Fraction(c) / Fraction(s)) ** 2 for c, s in zip(norms, stds, strict=True)), Fraction(0))
        assert 1 - Fraction(1e-14) <= Fraction(joint_noise_multiplier(norms, stds)) ** 2 * total <= 1
    assert joint_noise_multiplier([1e90, 1e90], [1e-90, 1e-90]) == pytest.approx(0.5**0.5 * 1e-180, rel=1e-14)


@pytest.mark.parametrize("rule", ["global", "equal budget", "least total noise"])
def test_every_allocation_of_noise_to_groups_has_the_joint_multiplier_it_was_made_for(rule):
    draw, z = random.Random(3), 1.3
    norms = [10 ** draw.uniform(-2, 1) for _ in range(12)]
    sizes = [draw.randint(1, 10**6) for _ in norms]
    weights = {
        "global": [1.0] * 12,
        "equal budget": norms,
        "least total noise": [math.sqrt(c / math.sqrt(d)) for c, d in zip(norms, sizes, strict=True)],
    }[rule]
    scale = math.sqrt(math.fsum((c / w) ** 2 for c, w in zip(norms, weights, strict=True)))
    assert joint_noise_multiplier(norms, [z * w * scale for w in weights]) == pytest.approx(z, rel=1e-12)


@pytest.mark.parametrize(
    ("norms", "stds", "said"),
    [
        ([], [], "0 clip_norms and 0 noise_stds"),
        ([1.0], [1.0, 2.0], "1 clip_norms and 2 noise_stds"),
        ([1.0, 0.0], [1.0, 1.0], r"clip_norms\.1 = 0\.0"),
        ([1.0], [float("nan")], r"noise_stds\.0 = nan"),
        ([1.0], [-2.0], r"noise_stds\.0 = -2\.0"),
        ([1.0], ["1"], r"noise_stds\.0 = '1'"),
    ],
)
def test_groups_that_make_no_sense_are_refused_by_name(norms, stds, said):
    with pytest.raises(InvalidParameter, match=said):
        joint_noise_multiplier(norms, stds)
