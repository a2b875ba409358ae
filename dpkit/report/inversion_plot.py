"""The picture of a gradient inversion: what was trained on, and what an attacker got back from each update.

One row for each image and attack, one column for each way in which the update was made. A panel shows its numbers
below it; one made without noise has a red frame, so that it is not taken for a private one. The same panels give the
same bytes with the same version of matplotlib. What the numbers mean, says ``dpkit.audit.inversion``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpkit.errors import InvalidArgument

_INK, _SOFT, _RED = "#1b2733", "#55616e", "#a3181e"
_PANEL = 1.28  # inches


class Panel(NamedTuple):
    """One image of the grid.

    Attributes:
      image: grey values (height, width) in [0, 1]; others are cut to that.
      caption: under the image.
      unsafe: made without noise.
    """

    image: NDArray[np.floating]
    caption: str
    unsafe: bool = False


def draw_inversion(
    columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Panel]]], title: str, form: str = "png"
) -> bytes:
    """The grid as a file of the kind ``form``, "png" or "svg".

    Args:
      columns: heads of the columns.
      rows: (name, one panel for each column).
    Raises:
      InvalidArgument: no rows, a row that has not one panel for each column, or an image that is none.
    """
    if not rows or not columns:
        raise InvalidArgument("there is nothing to draw; give at least one row of panels.")
    for name, panels in rows:
        if len(panels) != len(columns):
            raise InvalidArgument(f"row {name!r} has {len(panels)} panels, and there are {len(columns)} columns.")
        for panel in panels:
            if np.ndim(panel.image) != 2 or not np.isfinite(panel.image).all():
                raise InvalidArgument(
                    f"a panel of row {name!r} has shape {np.shape(panel.image)}; it is a finite grey image "
                    "(height, width)."
                )
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", {"svg.hashsalt": "dpkit", "svg.fonttype": "none"}]):
        figure = Figure(figsize=(_PANEL * len(columns) + 0.4, (_PANEL + 0.42) * len(rows) + 0.7), layout="constrained")
        figure.suptitle(title, fontsize=10, color=_INK)
        grid = figure.subplots(len(rows), len(columns), squeeze=False)
        for line, (name, panels) in zip(grid, rows, strict=True):
            for axes, panel in zip(line, panels, strict=True):
                axes.imshow(np.clip(panel.image, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                colour = _RED if panel.unsafe else _SOFT
                for spine in axes.spines.values():
                    spine.set(color=colour, linewidth=2 if panel.unsafe else 0.8)
                axes.set_xlabel(panel.caption, fontsize=7.5, color=_RED if panel.unsafe else _INK, labelpad=3)
            line[0].set_ylabel(name, fontsize=8, color=_INK)
        for axes, head, panel in zip(grid[0], columns, rows[0][1], strict=True):
            axes.set_title(head, fontsize=8.5, color=_RED if panel.unsafe else _INK)
        picture = io.BytesIO()
        # Without the date, the same panels give the same bytes.
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(picture, format=form, dpi=130, metadata=metadata)
    return picture.getvalue()
