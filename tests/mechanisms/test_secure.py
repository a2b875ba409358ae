"""The noise of the hardened and the exact tier: its bits, its law, its grid, its sensitivity, and who can draw it."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import os
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpkit.errors import InvalidArgument, OutOfOrder
from dpkit.mechanisms import DiscreteGaussian, Gaussian, HardenedGaussian, NoiseKey, discrete, secure
from dpkit.mechanisms.chacha import MOST_WORDS, KeyStream, key_stream_in_torch
from dpkit.mechanisms.discrete import discrete_gaussian
from dpkit.mechanisms.secure import grids_of, on_grid, rounded, standard_normal
from dpkit.types import ClippedSum, Participation, Query

KEY = bytes(range(32))
FALSE_ALARM = 1e-7
MECHANISMS = (HardenedGaussian, DiscreteGaussian)


def key_of(number: int) -> bytes:
    return hashlib.sha256(f"test key {number}".encode()).digest()


def query(value: Tensor, bound: float = 0.7, share: float = 1.0) -> Query:
    return Query({"p": value}, {"p": 0}, {0: bound}, share)


def noise_of(mechanism: Any, count: int, key: bytes = KEY) -> np.ndarray:
    """The noise on ``count`` zeros in standard deviations of the released value."""
    released, _ = mechanism.release(ClippedSum((query(torch.zeros(count, dtype=torch.float64)),)), (), NoiseKey(key))
    return (released.value["p"] / released.noise_std["p"]).numpy()


# ------------------------------------------------------------------------------------------------------------- bits

VECTORS = {  # nonce, block -> key stream: RFC 8439, sections 2.3.2 and 2.4.2, and two of appendix A.1
    ("000000090000004a00000000", 1, KEY): (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    ),
    ("000000000000000000000000", 0, bytes(32)): (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    ),
    ("000000000000000000000000", 1, bytes(32)): (
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    ),
}
PLAIN = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    b"sunscreen would be it."
)
CIPHERED = (
    "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593dabcd62b357"
    "1639d624e65152ab8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
    "5af90bbf74a35be6b40b8eedf2785e42874d"
)


@pytest.mark.parametrize(("nonce", "block", "key"), VECTORS)
def test_blocks_are_those_of_the_standard(nonce: str, block: int, key: bytes) -> None:
    wanted = VECTORS[nonce, block, key]
    stream = KeyStream(key, int.from_bytes(bytes.fromhex(nonce), "little")).words(8 * (block + 1))[-8:]
    in_torch = key_stream_in_torch(key, bytes.fromhex(nonce), block, 1, "cpu")
    for words in (stream, in_torch):
        assert words.numpy().astype("<i8").tobytes().hex() == wanted


def test_the_text_of_the_standard_is_enciphered_as_there() -> None:
    nonce = bytes.fromhex("000000000000004a00000000")
    for words in (
        KeyStream(KEY, int.from_bytes(nonce, "little")).words(24)[8:],
        key_stream_in_torch(KEY, nonce, 1, 2, "cpu"),
    ):
        stream = words.numpy().astype("<i8").tobytes()
        assert bytes(a ^ b for a, b in zip(PLAIN, stream, strict=False)).hex() == CIPHERED


@pytest.mark.parametrize("first", [0, 1, 12_345, 2**31 - 3, 2**31, 2**32 - 8])
def test_torch_makes_the_bits_that_openssl_makes(first: int) -> None:
    for number in range(3):
        key, nonce = key_of(number), key_of(number + 100)[:12]
        encryptor = Cipher(algorithms.ChaCha20(key, first.to_bytes(4, "little") + nonce), mode=None).encryptor()
        assert key_stream_in_torch(key, nonce, first, 8, "cpu").numpy().tobytes() == encryptor.update(bytes(512))


def test_other_devices_get_the_stream_that_the_cpu_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of other devices, on tensors of the CPU: all that a device changes is where the operations run."""
    on_cpu, elsewhere = KeyStream(KEY, 3), KeyStream(KEY, 3)
    monkeypatch.setattr(elsewhere, "_device", torch.device("meta"))
    calls: list[int] = []

    def in_torch(key: bytes, nonce: bytes, first: int, blocks: int, device: Any) -> Tensor:
        calls.append(blocks)
        return key_stream_in_torch(key, nonce, first, blocks, "cpu")

    monkeypatch.setattr("dpkit.mechanisms.chacha.key_stream_in_torch", in_torch)
    for count in (1, 7, 8, 9, 0, 1000, 3):
        assert torch.equal(elsewhere.words(count), on_cpu.words(count))
    assert len(calls) == 7


@pytest.mark.parametrize("parts", [(5000,), (1, 4999), (8,) * 625, (2**17 + 3, 10), (7, 2**17, 11)])
def test_words_do_not_depend_on_how_they_are_asked_for(parts: tuple[int, ...]) -> None:
    stream = KeyStream(KEY, 1)
    together = torch.cat([stream.words(part) for part in parts])
    assert torch.equal(together, KeyStream(KEY, 1).words(sum(parts)))
    assert len(torch.unique(together)) == len(together)  # two equal words among 131,085 have probability 5e-10


def test_a_stream_ends_with_its_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = KeyStream(KEY)
    monkeypatch.setattr(stream, "_given", MOST_WORDS - 5)
    with pytest.raises(InvalidArgument, match=r"34359738368.*fewer numbers"):
        stream.words(6)
    stream.words(5)
    with pytest.raises(InvalidArgument):
        stream.words(1)


# ---------------------------------------------------------------------------------------------------- who can draw


def in_a_child(act: Callable[[], object]) -> str:
    """What a forked process raises when it acts; "" if nothing."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            act()
            answer = b""
        except BaseException as error:  # whatever it is, the parent looks at it
            answer = type(error).__name__.encode()
        os.write(write, answer)
        os._exit(0)
    os.close(write)
    os.waitpid(process, 0)
    with os.fdopen(read, "rb") as pipe:
        return pipe.read().decode()


def test_a_forked_process_draws_nothing_also_in_the_middle_of_a_stream() -> None:
    key, stream = NoiseKey(KEY), KeyStream(KEY)
    before = stream.words(5)
    clipped = ClippedSum((query(torch.zeros(3)),))
    acts: list[Callable[[], object]] = [
        lambda: stream.words(1),
        lambda: key.generator(0, "p"),
        lambda: key.cipher_key(0, "p"),
        *(
            lambda mechanism=mechanism: mechanism(1.3).release(clipped, (), key)
            for mechanism in (Gaussian, *MECHANISMS)
        ),
    ]
    for act in acts:
        assert in_a_child(act) == "OutOfOrder"
        act()  # and the parent may
    assert in_a_child(lambda: KeyStream(KEY).words(1)) == "", "the test would see everything refused"
    assert torch.equal(before, KeyStream(KEY).words(5))


class Drawing(Dataset[Any]):
    def __init__(self, key: NoiseKey) -> None:
        self.key = key

    def __getitem__(self, index: int) -> float:
        released, _ = HardenedGaussian(1.3).release(ClippedSum((query(torch.zeros(1)),)), (), self.key)
        return float(released.value["p"])

    def __len__(self) -> int:
        return 2


def test_a_worker_of_a_loader_draws_nothing() -> None:
    data = Drawing(NoiseKey(KEY))
    assert data[0] == data[1]  # in this process it can
    with pytest.raises(OutOfOrder, match="another process"):
        list(DataLoader(data, num_workers=1, multiprocessing_context="fork"))


@pytest.mark.parametrize("secret", [NoiseKey(KEY), KeyStream(KEY)], ids=["key", "stream"])
def test_no_key_or_stream_is_copied_stored_or_printed(secret: Any) -> None:
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never copied or stored"):
            act(secret)
    assert KEY.hex() not in repr(secret) and repr(KEY)[2:-1] not in repr(secret)


def test_keys_of_queries_tensors_shards_and_generators_are_all_different() -> None:
    key = NoiseKey(KEY)
    places = [(0, "p"), (1, "p"), (0, "q"), (0, "p", 1), (1, "p0"), (10, "p")]
    keys = {key.cipher_key(*place) for place in places} | {NoiseKey(key_of(1)).cipher_key(0, "p")}
    assert len(keys) == 7 and all(len(one) == 32 for one in keys)
    states = [key.generator(*place).get_state().numpy().tobytes() for place in places]
    assert not any(one[:16] in state for one in keys for state in states)


# ------------------------------------------------------------------------------------- the double-precision Gaussian


class Words:
    """A stream that gives what it is told: for nonce 0 the draws, for nonce 1 what follows of those far out."""

    def __init__(self, draws: list[int], further: list[int]) -> None:
        self.left = {0: draws, 1: further}

    def __call__(self, key: bytes, nonce: int, device: Any) -> Any:
        words = self.left[nonce]

        class Stream:
            def words(self, count: int) -> Tensor:
                given, words[:] = words[:count], words[count:]
                return torch.from_numpy(np.array(given, dtype=np.uint64).view(np.int64).copy())

        return Stream()


def made_of(monkeypatch: pytest.MonkeyPatch, draws: list[int], further: list[int]) -> list[float]:
    words = Words(draws[:], further[:])
    monkeypatch.setattr(secure, "KeyStream", words)
    found = standard_normal(len(draws), KEY).tolist()
    assert words.left == {0: [], 1: []}, "every word is used once"
    return found


def quantile(word: int, further: int | None) -> Any:
    """The number beyond which a normal variable has the tail (v + 1/2)/2^64 or, with more bits, /2^128."""
    with mpmath.workdps(60):
        v = word % 2**63
        tail = mpmath.mpf(2 * v + 1) / 2**65 if further is None else mpmath.mpf(2 * (v * 2**64 + further) + 1) / 2**129
        found = mpmath.sqrt(2) * mpmath.erfinv(1 - 2 * tail)
        return -found if word >= 2**63 else found


def test_draws_are_quantiles_to_the_last_digits_out_to_thirteen_standard_deviations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng(1)
    plain = [int(2**63 * u) for u in generator.random(80)] + [2**53, 2**53 + 1, 2**62, 2**63 - 1]
    far = [int(2.0**bits * (1 + u)) for bits in range(53) for u in generator.random(1)] + [0, 0, 0, 0, 1, 2**53 - 1]
    further = [int(word) for word in generator.integers(0, 2**64, len(far), dtype=np.uint64)]
    further[-6:-2] = [0, 1, 2**63, 2**64 - 1]
    for sign in (0, 2**63):
        draws = [sign + v for v in plain if v >= 2**53] + [sign + v for v in far if v < 2**53]
        follow = [word for v, word in zip(far, further, strict=True) if v < 2**53]
        follows: list[int | None] = [None] * (len(draws) - len(follow)) + list(follow)
        found = made_of(monkeypatch, draws, follow)
        wanted = [quantile(word, more) for word, more in zip(draws, follows, strict=True)]
        for value, true in zip(found, wanted, strict=True):
            assert abs(value - true) <= 4e-15 * abs(true) + 2e-16, (value, true)
        assert 13.09 < max(abs(value) for value in found) < 13.11
    assert made_of(monkeypatch, [0], [0]) == [-made_of(monkeypatch, [2**63], [0])[0]]


def test_draws_fall_as_their_tail_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    edges = [2**53 - 1, 2**53, 2**53 + 1, 2**62]
    far = sorted({max(0, int(2.0**bits * k)) for bits in range(0, 53, 2) for k in (1, 1.3, 1.9)} | {2**53 - 1})
    plain = sorted({int(2.0**bits * k) for bits in np.arange(53, 63, 0.02) for k in (1, 1.001)} | set(edges[1:]))
    found = made_of(monkeypatch, [0, 0, *far, *plain], [0, 2**60, *[2**63] * len(far)])
    assert all(later <= earlier for earlier, later in itertools.pairwise(found))
    assert len(set(found)) > 0.99 * len(found)


def check_law(z: np.ndarray, alarm: float = FALSE_ALARM) -> None:
    """False alarms: below 5 times ``alarm`` for independent standard normal numbers."""
    n = len(z)
    squares = float((z**2).sum())
    assert stats.chi2.cdf(squares, n) > alarm, "too little noise"
    assert stats.chi2.sf(squares, n) > alarm, "too much noise"
    assert stats.kstest(z, "norm").pvalue > alarm
    # Cells of probability 1/64, the outer ones cut into cells of 2^-7 .. 2^-k, the last one the tail itself.
    outer = [2.0**-k for k in range(6, max(7, int(math.log2(n)) - 5))]
    inner = np.arange(1, 64) / 64
    edges = stats.norm.ppf(np.unique(np.concatenate([outer, inner])))
    edges = np.unique(np.concatenate([edges, -edges]))
    probabilities = np.diff(np.concatenate([[0.0], stats.norm.cdf(edges), [1.0]]))
    counts = np.bincount(np.searchsorted(edges, z), minlength=len(edges) + 1)
    assert stats.chisquare(counts, n * probabilities).pvalue > alarm
    # Anderson and Darling's statistic weighs the tails; above 30 has probability below e^-30 (its tail falls faster).
    ordered = np.sort(z)
    i = np.arange(1, n + 1)
    statistic = -n - float(np.mean((2 * i - 1) * (stats.norm.logcdf(ordered) + stats.norm.logsf(ordered[::-1]))))
    assert statistic < 30


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_noise_is_normal(mechanism: Any) -> None:
    """2e5 draws each, with a fixed key: false alarm below 1e-6, once and for all."""
    check_law(noise_of(mechanism(1.3), 200_000))


def test_the_test_above_would_notice_coarse_or_cut_noise() -> None:
    z = noise_of(HardenedGaussian(1.3), 200_000)
    for wrong in (z * 0.98, np.round(z / 0.05) * 0.05, np.clip(z, -3.2, 3.2), np.abs(z), z + 0.02):
        with pytest.raises(AssertionError):
            check_law(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_ten_million_draws_are_normal(mechanism: Any) -> None:
    """False alarm below 1e-6 with a fixed key, once and for all."""
    draws = np.concatenate([noise_of(mechanism(1.3), 1_000_000, key_of(number)) for number in range(10)])
    check_law(draws)
    lags = [float(draws[:-lag] @ draws[lag:]) / math.sqrt(len(draws)) for lag in (1, 2, 3, 8)]
    assert max(map(abs, lags)) < 6  # four normal numbers: 8e-9


# ------------------------------------------------------------------------------------------- the exact sampler's law


@pytest.mark.parametrize("scale", [1, 2, 3, 7, 40])
def test_integers_have_the_probabilities_of_the_definition(scale: int) -> None:
    """Chi-squared over all values expected five times or more; false alarm 1e-7 for each scale."""
    n = 100_000
    drawn = discrete_gaussian(scale, n, KeyStream(key_of(scale)))
    x = np.arange(-40 * scale, 40 * scale + 1)
    weights = np.exp(-(x**2) / (2 * scale**2))
    expected = n * weights / weights.sum()
    most = int(x[expected >= 5].max())
    inside = (abs(x) <= most).nonzero()[0]
    tails = [expected[x < -most].sum(), expected[x > most].sum()]
    cells = np.concatenate([[tails[0]], expected[inside], [tails[1]]])
    counts = np.bincount(np.clip(drawn, -most - 1, most + 1) + most + 1, minlength=len(cells))
    assert stats.chisquare(counts, cells).pvalue > FALSE_ALARM
    wrong = expected[inside] * (1 + 0.1 * (np.arange(len(inside)) % 2 - 0.5))  # every second a tenth more likely
    wrong *= counts[1:-1].sum() / wrong.sum()
    assert stats.chisquare(counts[1:-1], wrong).pvalue < FALSE_ALARM, "the test above would notice nothing"


@pytest.mark.parametrize("scale", [2**20, 1_500_001, 2**22])
def test_large_scales_are_normal_and_their_low_bits_are_uniform(scale: int) -> None:
    """Ten uniform low bits, chi-squared: false alarm 1e-7, besides those of the law."""
    drawn = discrete_gaussian(scale, 100_000, KeyStream(key_of(scale)))
    check_law(drawn / scale)
    counts = np.bincount(drawn & 1023, minlength=1024)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


@pytest.mark.parametrize(("above", "below"), [(0, 5), (1, 7), (5, 7), (7, 7), (9, 7), (40, 9), (1, 10**12), (3, 1)])
def test_something_happens_with_probability_exp_of_minus_a_fraction(above: int, below: int) -> None:
    """Binomial, two-sided at 1e-7."""
    n = 50_000
    happened = int(discrete._happens(np.full(n, above), below, KeyStream(key_of(above + below))).sum())
    assert stats.binomtest(happened, n, math.exp(-above / below)).pvalue > FALSE_ALARM


class Given:
    """A stream of the words that it was given."""

    def __init__(self, *words: int) -> None:
        self.left = list(words)

    def words(self, count: int) -> Tensor:
        given, self.left = self.left[:count], self.left[count:]
        return torch.from_numpy(np.array(given, dtype=np.uint64).view(np.int64).copy())


def test_words_beyond_the_last_multiple_are_drawn_again() -> None:
    last = 2**64 // 6 * 6
    stream: Any = Given(last - 1, last, 2**64 - 1, 5, last + 1, 7, 3)
    assert discrete._uniform(6, 4, stream).tolist() == [5, 3, 1, 5] and stream.left == []
    assert discrete._uniform(2**32, 1, Given(2**64 - 1)).tolist() == [2**32 - 1]  # pyright: ignore[reportArgumentType]
    big = 2**63 - 25
    assert discrete._uniform(big, 1, Given(2 * big - 1)).tolist() == [big - 1]  # pyright: ignore[reportArgumentType]
    for below in (3, 1000, 3 * 2**40 + 1):
        drawn = discrete._uniform(below, 60_000, KeyStream(key_of(below)))
        assert drawn.min() >= 0 and drawn.max() < below
        counts = np.bincount(drawn * 3 // below if below < 2**40 else drawn // (below // 3 + 1), minlength=3)
        assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_random_words_that_are_not_random_end_in_an_error_and_not_in_a_loop() -> None:
    class Zeros:
        def words(self, count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int64)

    with pytest.raises(RuntimeError, match="not random"):
        discrete_gaussian(2**20, 4, Zeros())  # pyright: ignore[reportArgumentType]


# ----------------------------------------------------------------------------------------------- the grid and the sum

finite = st.floats(allow_nan=False, allow_infinity=False, width=64)


@given(st.one_of(finite, st.integers(-(2**54), 2**54).map(lambda n: n / 2), st.floats(-2, 2)))
def test_rounding_is_half_up_without_an_error_of_its_own(x: float) -> None:
    (found,) = rounded(torch.tensor([x], dtype=torch.float64)).tolist()
    assert found == math.floor(Fraction(x) + Fraction(1, 2))


def test_numbers_just_below_one_half_are_rounded_down() -> None:
    below = math.nextafter(0.5, 0)
    x = torch.tensor([below, 0.5, 1.5, 2.5, -0.5, -1.5, -below, 2.0**51 + 0.5], dtype=torch.float64)
    assert rounded(x).tolist() == [0, 1, 2, 3, 0, -1, 0, 2.0**51 + 1]


@given(st.integers(-(2**40), 2**40), st.floats(-(2.0**40), 2.0**40), st.integers(-200, 200))
def test_a_rounded_sum_is_the_sum_of_what_was_rounded(steps: int, noise: float, exponent: int) -> None:
    """The lemma, in exact arithmetic: S + g·round(Y/g) = g·round((S + Y)/g) for S on the grid."""
    g = Fraction(2) ** exponent
    y = Fraction(noise) * g
    ours = int(rounded(torch.tensor([noise], dtype=torch.float64)).to(torch.int64))
    assert g * steps + g * ours == g * math.floor((g * steps + y) / g + Fraction(1, 2))


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bound", [0.7, 1e-3, 3e5])
def test_every_released_number_is_a_multiple_of_a_step_that_no_value_of_the_sum_changes(
    mechanism: Any, dtype: torch.dtype, bound: float
) -> None:
    steps = set()
    generator = torch.Generator().manual_seed(3)
    for sums in (
        torch.zeros(3000, dtype=dtype),
        torch.randn(3000, generator=generator).to(dtype) * bound,
        torch.full((3000,), 0.1 * bound, dtype=dtype),
        torch.tensor([1e30, -1e30, 1e-30]).to(dtype).repeat(1000),
    ):
        asked = query(sums, bound)
        released, _ = mechanism(1.3).release(ClippedSum((asked,)), (), NoiseKey(KEY))
        bits = 30 if mechanism is HardenedGaussian else 20
        step = 2.0 ** (math.floor(math.log2(1.3 * bound)) - bits)
        value = released.value["p"]
        assert value.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        multiples = value.double() / step
        assert bool((multiples == multiples.round()).all())
        steps.add(grids_of(asked, 1.3, bits, 2.0**50)[0].step)
        assert released.noise_std["p"] >= 1.3 * bound
    assert steps == {step}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_neighbours_can_release_the_same_numbers(mechanism: Any) -> None:
    """With keys of their own, each lands on numbers of one and the same grid; floating-point noise does not."""
    one, other = torch.full((2000,), 0.1234567), torch.full((2000,), 0.1234567 + 0.7 / math.sqrt(2000))
    released = [
        mechanism(1.3).release(ClippedSum((query(value.double()),)), (), NoiseKey(key_of(number)))[0].value["p"]
        for number, value in enumerate((one, other))
    ]
    step = 2.0 ** (math.floor(math.log2(1.3 * 0.7)) - (30 if mechanism is HardenedGaussian else 20))
    assert all(bool((value / step == (value / step).round()).all()) for value in released)
    plain = [
        Gaussian(1.3).release(ClippedSum((query(value.double()),)), (), NoiseKey(key_of(number)))[0].value["p"]
        for number, value in enumerate((one, other))
    ]
    assert not any(bool((value / step == (value / step).round()).any()) for value in plain)


def random_query(generator: np.random.Generator, share: float, spread: bool) -> Query:
    groups = int(generator.integers(1, 4))
    sizes = generator.integers(1, 400, groups)
    sensitivity = {k: float(10 ** generator.uniform(-3, 3)) for k in range(groups)}
    gamma = {k: float(10 ** generator.uniform(-1, 1)) for k in range(groups)} if spread else None
    value = {f"p{k}": torch.zeros(int(size)) for k, size in enumerate(sizes)}
    return Query(value, {f"p{k}": k for k in range(groups)}, sensitivity, share, gamma)


@pytest.mark.parametrize(("bits", "widest", "whole"), [(30, 2.0**50, False), (20, 2.0**22, True)])
def test_noise_covers_every_query_with_rounding_in_every_group_together(bits: int, widest: float, whole: bool) -> None:
    """Of two neighbours in the worst place, each coordinate of which rounding takes a step further apart."""
    generator = np.random.default_rng(5)
    for number in range(300):
        z = float(10 ** generator.uniform(-1, 1.5))
        shares = generator.dirichlet(np.ones(int(generator.integers(1, 4)))).clip(1e-3)
        shares /= shares.sum()
        cost = Fraction(0)
        for share in shares:
            asked = random_query(generator, float(share), number % 2 == 0)
            grids = grids_of(asked, z, bits, widest)
            for group, (step, std) in grids.items():
                width = math.ceil(std) if whole else std
                size = asked.value[f"p{group}"].numel()
                apart = Fraction(asked.sensitivity[group]) / Fraction(step) + Fraction(
                    math.isqrt(size * 10**24) + 1, 10**12
                )
                cost += (apart / Fraction(width)) ** 2
                assert math.frexp(step)[0] == 0.5  # a power of two
                assert 2**bits <= std
        assert cost <= 1 / Fraction(z) ** 2
        assert cost >= (1 - (0.1 if whole else 1e-3)) / Fraction(z) ** 2  # and no more noise than that takes


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("bound", [0.7, 0.31, 1e-3, 55.5])
def test_what_is_said_to_be_the_noise_of_a_release_covers_its_rounding(mechanism: Any, bound: float) -> None:
    for size in (1, 77, 4000):
        released, _ = mechanism(1.3).release(ClippedSum((query(torch.zeros(size), bound),)), (), NoiseKey(KEY))
        step = Fraction(2) ** (math.floor(math.log2(1.3 * bound)) - (30 if mechanism is HardenedGaussian else 20))
        std = Fraction(released.noise_std["p"])
        root = Fraction(math.isqrt(size * 10**24) + (math.isqrt(size) ** 2 != size), 10**12)
        assert std >= Fraction(1.3) * (Fraction(bound) + step * root)
        if mechanism is DiscreteGaussian:
            assert (std / step).denominator == 1


def test_rounding_moves_neighbours_apart_by_the_root_of_the_dimension_and_no_more() -> None:
    """Brute force at the worst places, half-way between steps: √d steps are reached, and never exceeded."""
    step, d = 2.0**-10, 400
    generator = torch.Generator().manual_seed(9)
    reached = 0.0
    for scale in (1e-9, 1e-3, 0.3, 0.9999, 1.5, 40.0):
        for _ in range(50):
            centre = (torch.randint(-1000, 1000, (d,), generator=generator) + 0.5) * step
            moved = torch.randn(d, generator=generator, dtype=torch.float64)
            moved *= scale * step / moved.norm() * math.sqrt(d)
            left, right = (centre - moved / 2).double(), (centre + moved / 2).double()
            distance = float((right - left).norm()) / step
            apart = float((on_grid(left, step) - on_grid(right, step)).double().norm())
            assert apart <= distance + math.sqrt(d)
            reached = max(reached, (apart - distance) / math.sqrt(d))
    assert reached > 0.99


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_sum_however_large_overflows(mechanism: Any, dtype: torch.dtype) -> None:
    """Largest and infinite sums come out large, of the right sign and finite in double precision, and never wrap."""
    most = torch.finfo(dtype).max
    sums = torch.tensor([most, -most, math.inf, -math.inf, 1e18, -1e18, 0.0], dtype=dtype)
    for key in range(20):
        asked = query(sums, 1e-6)
        value = mechanism(1.3).release(ClippedSum((asked,)), (), NoiseKey(key_of(key)))[0].value["p"]
        assert bool(value.isfinite().all())
        assert value[:6].sign().tolist() == [1, -1] * 3
        assert float(value[:6].abs().min()) > 2**31 * 1.3e-6
        assert float(value[6].abs()) < 20 * 1.3e-6


def test_a_cut_sum_moves_no_two_values_apart() -> None:
    sums = torch.tensor([-math.inf, -3e38, -1e12, -5.0, 0.3, 7.0, 1e12, 3e38, math.inf], dtype=torch.float64)
    steps = on_grid(sums, 2.0**-31)
    assert steps.tolist() == sorted(steps.tolist())
    assert [abs(int(steps[0])), abs(int(steps[-1]))] == [2**62, 2**62]
    # The noise is at most 2^54 steps away from them, so that the sum of both has room in 64 bits.
    assert 2**62 + 14 * 2**50 < 2**63


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize(
    ("bound", "multiplier", "size", "message"),
    [
        (1e-290, 1.3, 5, "no grid.*ordinary range"),
        (1e290, 1.3, 5, "no grid.*ordinary range"),
        (1.0, 1e16, 200_000, "most of it.*smaller noise multiplier"),
    ],
)
def test_a_grid_that_would_not_hold_is_refused_by_public_numbers(
    mechanism: Any, bound: float, multiplier: float, size: int, message: str
) -> None:
    clipped = ClippedSum((query(torch.zeros(size), bound),))
    with pytest.raises(InvalidArgument, match=message):
        mechanism(multiplier).release(clipped, (), NoiseKey(KEY))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_values_outside_the_domain_are_refused(mechanism: Any) -> None:
    for wrong in (0.0, -1.0, math.inf, math.nan, True, "1"):
        with pytest.raises(InvalidArgument, match="noise_multiplier"):
            mechanism(wrong)
    shares = ClippedSum((query(torch.zeros(2)), query(torch.zeros(2))))
    with pytest.raises(InvalidArgument, match="shares"):
        mechanism(1.3).release(shares, (), NoiseKey(KEY))


def test_the_exact_tier_says_how_long_it_takes_and_refuses_large_models() -> None:
    participation = Participation(10, 1, 10, True)
    small = {"w": torch.zeros(1000, 1000)}
    assert DiscreteGaussian(1.3).init(small, participation) == ()
    with pytest.raises(InvalidArgument, match=r"at most 1000000 parameters, about a second.*1000001.*HardenedGaussian"):
        DiscreteGaussian(1.3).init(small | {"b": torch.zeros(1)}, participation)
    assert HardenedGaussian(1.3).init(small | {"b": torch.zeros(1)}, participation) == ()


# ------------------------------------------------------------------------------------------------------ repeatability


def expected_words(query_number: int, name: str, nonce: int, count: int) -> list[int]:
    """The words of one tensor, by the definition of its key: SHAKE-256 over labels with their lengths."""
    digest = hashlib.shake_256(KEY)
    for label in (b"str:cipher", b"int:%d" % query_number, b"str:" + name.encode(), b"int:0"):
        digest.update(len(label).to_bytes(8, "little") + label)
    algorithm = algorithms.ChaCha20(digest.digest(32), bytes(4) + nonce.to_bytes(12, "little"))
    stream = Cipher(algorithm, mode=None).encryptor().update(bytes(8 * count))
    return [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(count)]


def test_hardened_noise_is_what_its_definition_makes_of_the_key() -> None:
    """Keys, words, quantiles, grid and sum, computed apart in 60 digits: every released number is the same."""
    count = 2000
    sums = torch.randn(count, generator=torch.Generator().manual_seed(2))
    asked = (query(torch.zeros(2), 0.3, 0.25), query(sums, 0.7, 0.75))
    released, _ = HardenedGaussian(1.3).release(ClippedSum(asked), (), NoiseKey(KEY))
    words = expected_words(1, "p", 0, count)
    far = [i for i, word in enumerate(words) if word % 2**63 < 2**53]
    assert far, "none of the draws is far out: take another key"
    more = dict(zip(far, expected_words(1, "p", 1, len(far)), strict=True))
    step = Fraction(2) ** (math.floor(math.log2(1.3 * 0.7 / math.sqrt(0.75))) - 30)
    with mpmath.workdps(60):
        apart = mpmath.mpf(0.7) + float(step) * mpmath.sqrt(count)
        std = mpmath.mpf(1.3) * apart * (1 + mpmath.mpf(2) ** -40) / mpmath.sqrt(mpmath.mpf(0.75))
        for i, word in enumerate(words):
            noise = mpmath.floor(quantile(word, more.get(i)) * std / float(step) + 0.5)
            steps = math.floor(Fraction(float(sums[i])) / step + Fraction(1, 2)) + int(noise)
            assert float(released.queries[0][i]) == np.float32(float(steps * step)), i


GOLDEN = {  # steps of the grid; no machine may disagree, or a seeded run could not be repeated
    HardenedGaussian: [-166193860, -2563279118, 3074990878, -1148584130, 1239058726, -934543080],
    DiscreteGaussian: [-2728353, 350123, -2791734, 301470, -2135463, -484199],
}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_one_key_makes_the_same_noise_on_every_machine_and_another_key_other_noise(mechanism: Any) -> None:
    clipped = ClippedSum((query(torch.zeros(5000, dtype=torch.float64)),))
    one, again, other = (
        mechanism(1.3).release(clipped, (), NoiseKey(key))[0].value["p"] for key in (KEY, KEY, key_of(1))
    )
    assert torch.equal(one, again)
    assert int((one == other).sum()) < 5  # 5000 pairs, each equal by chance once in three million
    step = 2.0 ** (math.floor(math.log2(1.3 * 0.7)) - (30 if mechanism is HardenedGaussian else 20))
    assert (one[:6] / step).long().tolist() == GOLDEN[mechanism]
