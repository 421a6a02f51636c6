"""Scores against what was measured: does the test loss move as influence says?"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from torch import Tensor

from captum_sdi.evaluate import correlation
from captum_sdi.plotting._axes import axes, scale, set_title
from captum_sdi.plotting._lines import NEUTRAL, PROPONENT
from captum_sdi.plotting._scores import Array, array
from captum_sdi.plotting._text import FONT

_POINTS = 400  # drawn solid; more become transparent, so that where many lie is seen


def plot_agreement(
    scores: ArrayLike | Tensor, measured: ArrayLike | Tensor, *, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draws influence scores against measured effects, a point for each pair of a test and a training example.

    ``scores`` are totals, or one step of trajectories; ``measured`` is what `captum_sdi.evaluate.leave_one_out` or
    `captum_sdi.evaluate.removal_effects` returned: both ``(q, n)``. The other arguments are described in
    `captum_sdi.plotting`.

    Returns:
        The Axes. Its title is Spearman's correlation for the mean test example, with its interval.

    Raises:
        ValueError: Shapes differ, or a value is NaN or infinite.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_agreement([[0.1, 0.2, 0.9]], [[1.0, 5.0, 7.0]], ax=Figure().subplots())
        >>> ax.get_title(loc="left")
        'Spearman 1.00'
    """
    found, wanted = array("scores", scores), array("measured", measured)
    if found.ndim != 2 or found.shape != wanted.shape or not found.size:
        raise ValueError(
            f"scores and measured must both be (q, n) with no empty axis, got shapes {found.shape} and {wanted.shape}. "
            "Pass totals, or one step of trajectories: trajectories[..., step]."
        )
    ax = axes(ax, 2.4)
    opacity = 0.6 * min(1.0, (_POINTS / found.size) ** 0.5)
    ax.plot(found.ravel(), wanted.ravel(), "o", color=PROPONENT[0][0], markersize=3, alpha=opacity, markeredgewidth=0)
    for draw in (ax.axhline, ax.axvline):
        draw(0, color=NEUTRAL, linewidth=0.6, zorder=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel(scale(ax.xaxis, float(np.abs(found).max()), "influence").replace("\n", " "), fontsize=FONT)
    label = scale(ax.yaxis, float(np.abs(wanted).max()), "measured\n(rise in test loss)")
    ax.set_ylabel(label, fontsize=FONT, linespacing=1.1)
    set_title(ax, title, _spearman(found, wanted))
    return ax


def _spearman(scores: Array, measured: Array) -> str:
    """Nothing where a test example's values are all equal, and no correlation is defined."""
    if any((values == values[:, :1]).all(1).any() for values in (scores, measured)):
        return ""
    found = correlation(scores, measured)
    interval = "" if found.low.isnan() else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"Spearman {found.value:.2f}{interval}"
