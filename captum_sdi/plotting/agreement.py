"""Scores against what was measured: does the test loss move as influence says?"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from torch import Tensor

from captum_sdi.evaluate import two_way_correlation
from captum_sdi.plotting._arguments import Array, finite_array
from captum_sdi.plotting._axes import column_axes, hide_spines, scale_ticks, set_title
from captum_sdi.plotting._lines import NEUTRAL, PROPONENT
from captum_sdi.plotting._text import FONT

_SOLID_POINTS = 400


def plot_agreement(
    scores: ArrayLike | Tensor,
    measured: ArrayLike | Tensor,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw influence scores against measured effects, a point for each pair of examples.

    ``scores`` are totals, or one step of trajectories; ``measured`` is what `captum_sdi.evaluate.leave_one_out` or
    `captum_sdi.evaluate.removal_effects` returned: both ``(q, n)``. The other arguments are described in
    `captum_sdi.plotting`.

    Returns:
        The Axes. Its title is Spearman's correlation for the mean test example, and of several its interval over
        tests and effects at once (`captum_sdi.evaluate.two_way_correlation`).

    Raises:
        ValueError: If shapes differ, or a value is NaN or infinite.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_agreement([[0.1, 0.2, 0.9]], [[1.0, 5.0, 7.0]], ax=Figure().subplots())
        >>> ax.get_title(loc="left")
        'Spearman 1.00'
    """
    predicted = finite_array("scores", scores)
    effects = finite_array("measured", measured)
    if predicted.ndim != 2 or predicted.shape != effects.shape or not predicted.size:
        raise ValueError(
            f"scores and measured must both be (q, n) with no empty axis, got shapes {predicted.shape} and "
            f"{effects.shape}. Pass totals, or one step of trajectories: trajectories[..., step]."
        )
    ax = column_axes(ax, 2.4)
    _draw_points(ax, predicted, effects)
    ax.axhline(0, color=NEUTRAL, linewidth=0.6, zorder=0)
    ax.axvline(0, color=NEUTRAL, linewidth=0.6, zorder=0)
    hide_spines(ax, "top", "right")
    largest_score = float(np.abs(predicted).max())
    largest_effect = float(np.abs(effects).max())
    xlabel = scale_ticks(ax.xaxis, largest_score, "influence")
    ylabel = scale_ticks(ax.yaxis, largest_effect, "measured\n(rise in test loss)")
    ax.set_xlabel(xlabel.replace("\n", " "), fontsize=FONT)
    ax.set_ylabel(ylabel, fontsize=FONT, linespacing=1.1)
    set_title(ax, title, _correlation_title(predicted, effects))
    return ax


def _draw_points(ax: Axes, scores: Array, measured: Array) -> None:
    """Draw a point for each pair; many are transparent, so that one sees where most lie."""
    share_opaque = (_SOLID_POINTS / scores.size) ** 0.5
    ax.plot(
        scores.ravel(),
        measured.ravel(),
        "o",
        color=PROPONENT[0].colour,
        alpha=0.6 * min(1.0, share_opaque),
        markersize=3,
        markeredgewidth=0,
    )


def _correlation_title(scores: Array, measured: Array) -> str:
    """Return Spearman's correlation as a title; "" where it is not defined."""
    for values in (scores, measured):
        constant = (values == values[:, :1]).all(1)
        if constant.any():
            return ""
    spearman = two_way_correlation(scores, measured)
    title = f"Spearman {spearman.value:.2f}"
    if len(scores) > 1 and not spearman.low.isnan():
        title += f" [{spearman.low:.2f}, {spearman.high:.2f}]"
    return title
