"""The low-pass filter against scipy, closed forms and brute force; what it refuses; and its picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from scipy import signal, stats
from torch import Tensor

from dpkit.engine.packing import pack, unpack
from dpkit.errors import InvalidArgument
from dpkit.filters import LowPass, LowPassState, butterworth, first_order, momentum, nyquist_zero
from dpkit.types import Named, Released

# With its coefficients rounded to eight digits, as its authors' code has it; gain 0.316 for a constant gradient.
SECOND_ORDER = LowPass(b=(0.00016332, 0.00032665, 0.00016332), a=(1.0, -1.98342955, 0.98549544))

PRESETS = {
    "identity": LowPass(b=(1.0,)),
    "momentum 0.9": momentum(0.9),
    "momentum 0": momentum(0.0),
    "momentum 0.9999": momentum(0.9999),
    "first order": first_order(),
    "zero at Nyquist": nyquist_zero(),
    "second order": SECOND_ORDER,
    "moving average": LowPass(b=(1.0, 1.0, 1.0, 1.0, 1.0)),
    "Butterworth 1": butterworth(1, 0.1),
    "Butterworth 2": butterworth(2, 0.05),
    "Butterworth 4": butterworth(4, 0.005),
    "scaled": LowPass(b=(3.0, 1.0), a=(2.0, -1.8)),
}


def random_coefficients(seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """b with up to five weights, and a with up to five poles inside of the unit circle."""
    random = np.random.default_rng(seed)
    poles = []
    for _ in range(random.integers(0, 3)):
        pole = random.uniform(0.1, 0.98) * np.exp(1j * random.uniform(0, 1.2))
        poles += [pole, pole.conjugate()]
    if random.random() < 0.5:
        poles.append(random.uniform(-0.5, 0.98))
    return tuple(random.uniform(-0.2, 1.0, random.integers(1, 6))), tuple(np.atleast_1d(np.real(np.poly(poles))))


def random_filters(number: int) -> list[LowPass]:
    found = []
    for seed in range(100 * number):
        try:
            found.append(LowPass(*random_coefficients(seed)))
        except InvalidArgument:
            continue
        if len(found) == number:
            break
    return found


RANDOM = random_filters(12)
ALL = [*PRESETS.values(), *RANDOM]
IDS = [*PRESETS, *(f"random {i} ({len(f.b) - 1}, {len(f.a) - 1})" for i, f in enumerate(RANDOM))]
every_filter = pytest.mark.parametrize("filter_", ALL, ids=IDS)


def run(
    filter_: LowPass, gradients: list[Named], state: LowPassState | None = None
) -> tuple[list[Named], LowPassState]:
    state = filter_.init(gradients[0]) if state is None else state
    values = []
    for gradient in gradients:
        released, state = filter_.update(Released(gradient), state)
        values.append(released.value)
    return values, state


def scipy_filtered(b: tuple[float, ...], a: tuple[float, ...], values: np.ndarray) -> np.ndarray:
    return np.asarray(signal.lfilter(b, a, values, axis=0))


def noise(steps: int, *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Named]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"weight": torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), "bias": torch.ones(2)}
        for _ in range(steps)
    ]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one: Named, other: Named) -> bool:
    return one.keys() == other.keys() and all(
        (one[name].dtype, bits(one[name])) == (other[name].dtype, bits(other[name])) for name in one
    )


# -- what it computes -----------------------------------------------------------------------------------------------


@every_filter
def test_a_constant_gradient_passes_unchanged_from_the_first_step_on(filter_: LowPass) -> None:
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 2.0**-8)):
        constant = torch.tensor([[0.7, -3e-5], [1e-12, 1e4]], dtype=dtype)
        values, _ = run(filter_, [{"weight": constant, "zero": torch.zeros(3, dtype=dtype)}] * 300)
        off = max(float((value["weight"] / constant - 1).abs().max()) for value in values)
        assert off <= tolerance, off
        assert not any(bool(value["zero"].any()) for value in values)


def test_the_random_filters_have_past_inputs_and_past_outputs() -> None:
    assert len(RANDOM) == 12
    assert len({(len(f.b), len(f.a)) for f in RANDOM}) >= 8
    assert sum(len(f.b) > 1 and len(f.a) > 1 for f in RANDOM) >= 8


def test_the_full_sum_of_b_in_the_first_steps_would_be_seen() -> None:
    """The misprint that goes round: Σ_{r<=nb} b_r instead of Σ_{r<=min(t, nb)} b_r in the step response."""
    filter_ = nyquist_zero()
    values, _ = run(filter_, [{"w": torch.ones(1, dtype=torch.float64)}])
    right = float(values[0]["w"])
    wrong = filter_.b[0] / sum(filter_.b)
    assert right == 1.0 and wrong == 0.5


@every_filter
def test_the_outputs_are_scipys_divided_by_scipys_step_response(filter_: LowPass) -> None:
    steps = 300
    gradients = noise(steps, 2, 3)
    values, _ = run(filter_, gradients)
    given = np.stack([gradient["weight"].numpy() for gradient in gradients])
    responses = scipy_filtered(filter_.b, filter_.a, np.ones(steps))
    expected = scipy_filtered(filter_.b, filter_.a, given) / responses[:, None, None]
    got = np.stack([value["weight"].numpy() for value in values])
    scale = np.abs(expected).max(axis=0)
    assert np.abs((got - expected) / scale).max() < 1e-7


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999])
def test_momentum_is_the_bias_corrected_exponential_average(beta: float) -> None:
    gradients = noise(200, 5)
    values, _ = run(momentum(beta), gradients)
    average = torch.zeros(5, dtype=torch.float64)
    for step, (gradient, value) in enumerate(zip(gradients, values, strict=True), start=1):
        average = beta * average + (1 - beta) * gradient["weight"]
        assert torch.allclose(value["weight"], average / (1 - beta**step), rtol=1e-9, atol=1e-12)


def test_the_filter_that_does_nothing_returns_every_bit() -> None:
    special = torch.tensor([-0.0, 0.0, 1e-45, -1e-39, 3.4e38, 0.1, float("inf"), -float("inf")])
    for filter_ in (LowPass(b=(1.0,)), LowPass(b=(1.0,), a=(1.0,))):
        gradients = [{"w": special}, *({"w": gradient["weight"]} for gradient in noise(5, 8, dtype=torch.float32))]
        values, state = run(filter_, gradients)
        assert all(same(value, gradient) for value, gradient in zip(values, gradients, strict=True))
        assert state == LowPassState({"w": ()}, ())


def test_sgd_behind_the_filter_that_does_nothing_is_sgd_bit_for_bit() -> None:
    def trained(filtered: bool) -> Tensor:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        optimizer = torch.optim.SGD([weight], lr=0.3)
        gradients = [{"w": gradient["weight"]} for gradient in noise(20, 7, dtype=torch.float32)]
        for value in run(LowPass(b=(1.0,)), gradients)[0] if filtered else gradients:
            weight.grad = value["w"]
            optimizer.step()
        return weight.detach()

    assert bits(trained(True)) == bits(trained(False))


def test_the_first_weight_of_a_divides_all_coefficients() -> None:
    assert LowPass(b=(3.0, 1.0), a=(2.0, -1.0)) == LowPass(b=(1.5, 0.5), a=(1.0, -0.5))
    assert repr(LowPass(b=[1, 0.5], a=np.array([2.0, -1.0]))) == "LowPass(b=(0.5, 0.25), a=(1.0, -0.5))"  # pyright: ignore


# -- its state --------------------------------------------------------------------------------------------------------


@every_filter
def test_a_state_that_went_through_a_checkpoint_goes_on_identically(filter_: LowPass) -> None:
    gradients = noise(40, 3, dtype=torch.float32)
    _, halfway = run(filter_, gradients[:17])
    tensors: dict[str, Tensor] = {}
    text = json.dumps(pack(halfway, "filter", tensors), allow_nan=False)
    stored = safetensors.torch.load(safetensors.torch.save(tensors)) if tensors else {}
    resumed = unpack(json.loads(text), "filter", stored, like=filter_.init(gradients[0]))
    assert type(resumed) is LowPassState
    continued, expected = (run(filter_, gradients[17:], state)[0] for state in (resumed, halfway))
    assert all(map(same, continued, expected))


@every_filter
def test_states_and_releases_are_never_changed_in_place(filter_: LowPass) -> None:
    gradients = noise(20, 3, dtype=torch.float32)
    _, state = run(filter_, gradients[:10])
    before = [t.clone() for taps in state.taps.values() for t in taps], state.ones
    once, _ = run(filter_, gradients[10:], state)
    for value in once:
        value["weight"].zero_()  # what a user does to p.grad
    twice, _ = run(filter_, gradients[10:], state)
    assert all(map(torch.equal, before[0], (t for taps in state.taps.values() for t in taps)))
    assert before[1] == state.ones
    assert all(map(same, gradients, noise(20, 3, dtype=torch.float32)))
    assert not any(bool((value["weight"] == 0).all()) for value in twice)


def test_everything_else_of_a_release_passes_untouched() -> None:
    released = Released({"w": torch.ones(2)}, (torch.zeros(1),), {"w": 0.5}, {"w": torch.full((2,), 7.0)})
    after, _ = first_order().update(released, first_order().init(released.value))
    assert after[1:] == released[1:]


def test_what_is_kept_is_one_tensor_for_each_step_of_the_longer_memory() -> None:
    parameters: Named = {"w": torch.nn.Parameter(torch.ones(3, 2))}
    for filter_, kept in ((momentum(0.9), 1), (nyquist_zero(), 1), (butterworth(2, 0.1), 2), (LowPass((1.0, 1.0)), 1)):
        taps = filter_.init(parameters).taps["w"]
        assert [(tap.shape, tap.dtype, tap.requires_grad) for tap in taps] == [((3, 2), torch.float32, False)] * kept


def test_half_precision_comes_back_in_single_precision() -> None:
    gradient = {"w": torch.tensor([0.1, -2.0], dtype=torch.bfloat16)}
    for filter_ in (first_order(), butterworth(4, 0.005), LowPass(b=(1.0,))):
        values, _ = run(filter_, [gradient] * 3)
        assert [value["w"].dtype for value in values] == [torch.float32] * 3
        assert all(torch.allclose(value["w"], gradient["w"].float(), rtol=1e-6) for value in values)


def test_a_steep_filter_is_kept_in_double_precision_since_single_would_not_do() -> None:
    steep = butterworth(4, 0.005)
    state = steep.init({"w": torch.zeros(1)})
    assert state.taps["w"][0].dtype is torch.float64
    # The same recursion in float32: the constant gradient does not come back.
    taps, ones, worst = tuple(torch.zeros(1) for _ in range(4)), (0.0,) * 4, 0.0
    for _ in range(2000):
        response, ones = steep._advance(1.0, ones)
        value, taps = steep._advance(torch.ones(1), taps)
        worst = max(worst, abs(float(value) / response - 1))
    assert worst > 2.0**-8, worst


# -- what it says about itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filter_", "gain", "raw_noise", "pole"),
    [
        (SECOND_ORDER, 0.316, 0.00712, 0.9927),
        (first_order(), 1.0, 0.0605, 0.9),
        (momentum(0.9), 1.0, 0.0526, 0.9),
        (nyquist_zero(), 1.0, 0.0909, 0.818),
    ],
    ids=["second order", "first order", "momentum", "zero at Nyquist"],
)
def test_gains_and_poles_are_those_of_the_published_table(
    filter_: LowPass, gain: float, raw_noise: float, pole: float
) -> None:
    assert filter_.dc_gain == pytest.approx(gain, rel=2e-3)
    assert filter_.noise_gain * filter_.dc_gain**2 == pytest.approx(raw_noise, rel=2e-3)
    assert filter_.largest_pole == pytest.approx(pole, abs=1e-3)


@pytest.mark.parametrize("beta", [0.1, 0.9, 0.999])
def test_the_noise_gain_of_momentum_is_its_closed_form(beta: float) -> None:
    assert momentum(beta).noise_gain == pytest.approx((1 - beta) / (1 + beta), rel=1e-9)


def test_the_noise_gain_of_a_moving_average_is_one_over_its_length() -> None:
    assert LowPass(b=(0.3,) * 8).noise_gain == pytest.approx(1 / 8, rel=1e-12)


@pytest.mark.parametrize("name", ["momentum 0.9", "first order", "zero at Nyquist", "Butterworth 2", "moving average"])
def test_filtered_noise_has_the_variance_that_the_noise_gain_says(name: str) -> None:
    filter_, coordinates = PRESETS[name], 50_000
    values, _ = run(filter_, noise(80, coordinates, dtype=torch.float32, seed=3))
    squares = float(values[-1]["weight"].double().square().sum()) / filter_.noise_gain
    # Independent coordinates: chi-squared with 50,000 degrees of freedom. False alarm 2e-7.
    assert 1e-7 < stats.chi2.cdf(squares, coordinates) < 1 - 1e-7, squares / coordinates


@every_filter
def test_responses_are_those_of_scipy_and_of_the_definition(filter_: LowPass) -> None:
    impulse, step = filter_.impulse_response(2000), filter_.step_response(2000)
    assert np.allclose(np.cumsum(impulse), step, rtol=1e-9, atol=1e-12 * filter_.dc_gain)
    frequencies = [0.0, 0.01, 0.2, 0.5]
    z = np.exp(-2j * np.pi * np.array(frequencies))
    expected = np.polyval(filter_.b[::-1], z) / np.polyval(filter_.a[::-1], z)
    got = filter_.frequency_response(frequencies)
    assert np.abs(got - expected).max() <= 1e-6 * filter_.dc_gain
    assert filter_.dc_gain == pytest.approx(got[0].real, rel=1e-6)
    assert filter_.largest_pole < 1


def test_the_zero_at_nyquist_is_there_and_a_butterworth_passes_half_of_the_power_at_its_cutoff() -> None:
    assert abs(nyquist_zero().frequency_response([0.5])[0]) < 1e-15
    for order, cutoff in ((1, 0.1), (2, 0.05), (3, 0.01), (4, 0.2)):
        assert abs(butterworth(order, cutoff).frequency_response([cutoff])[0]) ** 2 == pytest.approx(0.5, rel=1e-6)


# -- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b", "a", "why"),
    [
        ((1.0,), (1.0, -1.0), r"pole at 1 \(magnitude 1\)"),
        ((1.0,), (1.0, -2.0, 1.0), "pole"),
        ((1.0,), (1.0, 1.5), r"pole at -1.5 \(magnitude 1.5\)"),
        ((1.0,), (1.0, -0.5, 1.01), r"pole at 0\.25[+-]0\.97\d*j \(magnitude 1\.00499\)"),
        ((1.0,), (1.0, -1.0 + 1e-7), "largest pole has magnitude 0.9999999.*131072 steps"),
        ((1.0,), (0.0, 1.0), r"a\[0\]"),
        ((0.0, 1.0), (1.0,), "step response of 0 at step 0"),
        ((1.0, -2.0, 1.5), (1.0,), "step response of -1 at step 1"),
        ((1.0, -1.0), (1.0,), "gain 0 for a constant"),
        ((-1.0,), (1.0, -0.9), "gain -10 for a constant"),
        ((1e-30,), (1.0, -0.9), "gain 1e-29 .*must be positive, and in"),
        ((1.0,), (1.0, math.nan), "a is .*finite"),
        ((math.inf,), (1.0,), "b is .*finite"),
        ((1.0,), (1e-320, 1.0), r"b / a\[0\] is .*finite"),
        ((), (1.0,), "b is"),
        ((1.0,), (), "a is"),
        ("11", (1.0,), "b is '11'"),
        (1.0, (1.0,), "b is 1.0"),
    ],
)
def test_a_filter_that_would_break_the_guarantee_is_refused(b: object, a: object, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        LowPass(b, a)  # pyright: ignore[reportArgumentType]


def test_a_step_response_that_turns_negative_late_is_refused() -> None:
    late = tuple([1.0] + [0.0] * 39 + [-1.5] + [0.0] * 19 + [1.0])
    with pytest.raises(InvalidArgument, match="step response of -0.5 at step 40"):
        LowPass(b=late)


@pytest.mark.parametrize("slow", [0.9, 0.99, 0.9995])
def test_the_border_between_accepted_and_refused_is_where_the_closed_form_has_it(slow: float) -> None:
    """c_t = 1 + 5 f^t - β s^t begins at 6 - β, dips when the fast mode f has gone, and ends at 1."""
    fast = 0.5
    steps = np.arange(int(30 / (1 - slow)))
    border = float(((1 + 5 * fast**steps) / slow**steps).min())
    for beta in (border * (1 - 1e-6), border * (1 + 1e-6)):
        b = (
            np.polymul([1, -fast], [1, -slow])
            + 5 * np.polymul([1, -1], [1, -slow])
            - beta * np.polymul([1, -1], [1, -fast])
        )
        a = np.polymul([1, -fast], [1, -slow])
        if beta < border:
            dipped = LowPass(tuple(b), tuple(a)).step_response(1000)
            assert dipped[0] == pytest.approx(6 - beta) and 0 < dipped.min() < 1e-4
        else:
            with pytest.raises(InvalidArgument, match="step response of -"):
                LowPass(tuple(b), tuple(a))


def test_random_filters_are_refused_exactly_if_brute_force_finds_a_reason() -> None:
    accepted = refused = 0
    for seed in range(1000, 1400):
        b, a = random_coefficients(seed)
        if seed % 4 == 0:  # blow the poles up, over the circle at times
            a = tuple(weight * 1.03**power for power, weight in enumerate(a))
        stable = max(np.abs(np.roots(a)), default=0.0) < 1
        positive = stable and scipy_filtered(b, a, np.ones(20_000)).min() > 0 and sum(b) / sum(a) > 1e-9
        if positive:
            LowPass(b, a)
            accepted += 1
        else:
            with pytest.raises(InvalidArgument):
                LowPass(b, a)
            refused += 1
    assert min(accepted, refused) > 80, (accepted, refused)


def test_what_even_double_precision_cannot_compute_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="order 8 .*lower order.*pole"):
        butterworth(8, 0.0025)
    with pytest.raises(InvalidArgument, match="order 8 .*lower order.*relative rounding error of up to 0.97 in double"):
        butterworth(8, 0.005)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: momentum(1.0), "beta is 1.0"),
        (lambda: momentum(-0.1), "beta is -0.1"),
        (lambda: momentum(math.nan), "beta is nan"),
        (lambda: butterworth(0, 0.1), "order is 0"),
        (lambda: butterworth(1.5, 0.1), "order is 1.5"),  # pyright: ignore[reportArgumentType]
        (lambda: butterworth(2, 0.5), "cutoff is 0.5"),
        (lambda: butterworth(2, 0.0), "cutoff is 0.0"),
        (lambda: first_order().impulse_response(0), "length is 0"),
        (lambda: first_order().step_response(-1), "length is -1"),
    ],
)
def test_arguments_outside_their_domain_are_refused(make: object, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        make()  # pyright: ignore[reportCallIssue]


# -- its picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["identity", "second order"])
def test_the_picture_is_drawn_and_the_same_every_time(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib (extra `report`)")
    from dpkit.report.filter_plot import plot_filter

    one, two, raster = tmp_path / "one.svg", tmp_path / "two.svg", tmp_path / "one.png"
    for file in (one, two, raster):
        plot_filter(PRESETS[name], file)
    assert one.read_bytes() == two.read_bytes()
    assert raster.read_bytes().startswith(b"\x89PNG")
    text = one.read_text(encoding="utf-8")
    assert "cycles per step" in text and f"noise variance × {PRESETS[name].noise_gain:.3g}" in text


def test_a_picture_of_another_format_is_refused(tmp_path: Path) -> None:
    from dpkit.report.filter_plot import plot_filter

    with pytest.raises(InvalidArgument, match=r"\.png or \.svg"):
        plot_filter(first_order(), tmp_path / "filter.docx")
