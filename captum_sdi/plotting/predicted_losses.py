"""Runs that were simulated from one against runs that took place: predicted and measured test losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from torch import Tensor

from captum_sdi.plotting._arguments import Array, finite_array
from captum_sdi.plotting._axes import column_axes, hide_spines, set_title
from captum_sdi.plotting._lines import CATEGORY, NEUTRAL
from captum_sdi.plotting._text import FONT, SMALL


def plot_predicted_losses(
    predicted: ArrayLike | Tensor,
    measured: ArrayLike | Tensor,
    *,
    times: Sequence[str] = (),
    gauge: Any = None,
    title: str | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the test losses of runs on other subsets as predicted from one run, against those measured by training.

    ``predicted`` is what `captum_sdi.unrolled.UnrolledInfluence.predicted_losses` returned, ``measured`` the losses of
    models that were trained on these subsets: ``(m, q)``; or ``(c, m, q)`` at several points of training, which
    ``times`` names. ``gauge`` is what ``check()`` returned; where it says no, so does the picture. The other arguments
    are described in `captum_sdi.plotting`.

    Returns:
        The Axes: a point for each run and test example; on the dotted line the prediction was right.

    Raises:
        ValueError: If shapes differ, a value is not finite, or there is not one name for each point of training.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_predicted_losses([[0.5], [0.75], [1.0]], [[0.5], [0.7], [1.1]], ax=Figure().subplots())
        >>> ax.get_title(loc="left")
        'correlation 0.98'
    """
    of_predictions = finite_array("predicted", predicted)
    of_runs = finite_array("measured", measured)
    if of_predictions.ndim not in (2, 3) or of_predictions.shape != of_runs.shape or not of_runs.size:
        raise ValueError(
            f"predicted and measured must both be (m, q), or (c, m, q), with no empty axis; got shapes "
            f"{of_predictions.shape} and {of_runs.shape}."
        )
    if of_runs.ndim == 2:
        of_predictions, of_runs = of_predictions[None], of_runs[None]
    if len(times) != len(of_runs) and (times or len(of_runs) > 1):
        raise ValueError(f"times names {len(times)} points of training, and there are {len(of_runs)}.")
    ax = column_axes(ax, 2.6, width)
    for place, (predictions, losses) in enumerate(zip(of_predictions, of_runs, strict=True)):
        ax.plot(
            predictions.ravel(),
            losses.ravel(),
            "o",
            color=CATEGORY[place % len(CATEGORY)].colour,
            label=times[place] if times else None,
            alpha=0.6,
            markersize=3,
            markeredgewidth=0,
        )
    ends = np.array([min(of_predictions.min(), of_runs.min()), max(of_predictions.max(), of_runs.max())])
    ax.plot(ends, ends, ":", color=NEUTRAL, linewidth=0.8, zorder=0)
    hide_spines(ax, "top", "right")
    ax.set_xlabel("predicted test loss", fontsize=FONT)
    ax.set_ylabel("measured test loss", fontsize=FONT)
    if times:
        ax.legend(fontsize=SMALL, frameon=False)
    if gauge is not None and not gauge.is_trusted:
        doubt = f"not to be believed:\nmetasmoothness {gauge.metasmoothness:.2f}"
        ax.text(0.98, 0.02, doubt, transform=ax.transAxes, ha="right", va="bottom", fontsize=SMALL)
    set_title(ax, title, agreement(of_predictions[-1], of_runs[-1]))
    return ax


def agreement(predicted: Array, measured: Array) -> str:
    """Say how the runs' losses correlate, each test about its own mean; nothing where none of them varies."""
    deviations = [values - values.mean(0) for values in (predicted, measured)]
    if not all(deviation.any() for deviation in deviations):
        return ""
    correlation = np.corrcoef(deviations[0].ravel(), deviations[1].ravel())[0, 1]
    return f"correlation {correlation:.2f}"
