"""A picture of a low-pass filter: how much past gradients weigh, and which frequencies pass.

Guarantees: both curves are divided by the filter's gain for a constant gradient, as its output is in the steady state,
so that filters can be compared; the same filter gives the same bytes with the same version of matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dpkit.errors import InvalidArgument
from dpkit.filters import LowPass

from .plots import BLUE, MOST_POINTS, SOFT, _figure

SUFFIXES = (".png", ".svg")

_LOWEST_DECIBELS = -60.0
_FREQUENCIES = (1e-5, 1e-2)
"""Between these the frequency axis begins."""
_SHOWN_ENERGY = 0.9999
"""Part of Σ h² that the first panel shows."""


def plot_filter(filter: LowPass, path: str | Path) -> None:
    """Draws the impulse response over the frequency response into the file ``path``, a ``.png`` or an ``.svg``.

    Raises:
      InvalidArgument: the name of the file ends otherwise.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InvalidArgument(f"path is {str(path)!r}; a picture's name ends with {' or '.join(SUFFIXES)}.")
    from matplotlib.ticker import FuncFormatter, NullFormatter

    with _figure(5.6) as (figure, axes):
        axes.remove()
        above, below = figure.subplots(2, 1)

        weights = _weights(filter)
        few = len(weights) <= 60
        above.axhline(0, color=SOFT, linewidth=0.8)
        above.plot(weights, color=BLUE, marker="o" if few else None, markersize=4, linewidth=1 if few else 2)
        above.set(xlabel="k, age of a gradient in steps", ylabel="weight h(k) / Σ h")
        above.set_title(f"noise variance × {filter.noise_gain:.3g}", loc="right", fontsize=13)
        above.xaxis.get_major_locator().set_params(integer=True)

        frequencies = np.geomspace(_lowest_frequency(filter), 0.5, MOST_POINTS)
        gains = np.abs(filter.frequency_response(frequencies)) / filter.dc_gain
        decibels = 20 * np.log10(np.maximum(gains, np.finfo(float).tiny))
        below.semilogx(frequencies, decibels, color=BLUE)
        below.set(xlabel="frequency, cycles per step", ylabel="gain, dB")
        below.set_ylim(max(_LOWEST_DECIBELS, min(-20.0, decibels.min() - 3)), max(3.0, decibels.max() + 3))
        below.set_xlim(frequencies[0], 0.5)
        below.xaxis.set_major_formatter(FuncFormatter(lambda frequency, _: f"{frequency:g}"))
        below.xaxis.set_minor_formatter(NullFormatter())

        if path.suffix == ".svg":
            figure.savefig(path, metadata={"Date": None})
        else:
            figure.savefig(path, dpi=200, metadata={"Software": None})


def _weights(filter: LowPass) -> np.ndarray:
    """h(k) / Σ h for as many k as show nearly all of the filter."""
    length = 64
    while True:
        energy = np.cumsum(filter.impulse_response(length) ** 2) / (filter.noise_gain * filter.dc_gain**2)
        if energy[-1] >= _SHOWN_ENERGY:
            shown = max(int(np.searchsorted(energy, _SHOWN_ENERGY)) + 1, len(filter.b) + 1, 8)
            return filter.impulse_response(shown) / filter.dc_gain
        length *= 2


def _lowest_frequency(filter: LowPass) -> float:
    """A power of ten well below the bandwidth of the slowest pole: a frequency that passes."""
    bandwidth = (1 - filter.largest_pole) / (2 * np.pi)
    return float(np.clip(10 ** np.floor(np.log10(bandwidth / 5)), *_FREQUENCIES))
