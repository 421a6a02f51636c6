"""Mean influence by loop step over groups of pairs, beside that of all pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from captum_sdi.plotting._arguments import Array, finite_array
from captum_sdi.plotting._axes import column_axes, set_title
from captum_sdi.plotting._fonts import readable
from captum_sdi.plotting._legend import LegendBlock, count_entry, draw_legend, legend_height
from captum_sdi.plotting._lines import CATEGORY, NEUTRAL, LineStyle, draw_line, finish_lines
from captum_sdi.plotting._scores import Result, Scores, read_scores

Flags: TypeAlias = NDArray[np.bool_]


def plot_groups(
    result: Result,
    groups: Mapping[str, ArrayLike | Tensor],
    *,
    title: str | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw mean influence by loop step over groups of pairs, beside that of all pairs.

    ``groups`` are booleans ``(q, n)`` under their names: which training example belongs to which test example. Some
    test examples have far larger losses than others, so all points of one are divided by the mean of their absolute
    values first. The other arguments are described in `captum_sdi.plotting`.

    Returns:
        The Axes. Lines are means over test examples of the mean over each one's pairs, bands two standard errors over
        test examples; the grey one is of all pairs. A test example without a pair in a group is left out of it.

    Raises:
        ValueError: If a group is not booleans ``(q, n)``, or marks no pair; or if there is no group.

    Example:
        >>> from matplotlib.figure import Figure
        >>> trajectories = [[[3.0, -1.0], [1.0, -1.0]]]  # (q, n, t) = (1, 2, 2)
        >>> ax = plot_groups(trajectories, {"odd": [[True, False]]}, ax=Figure().subplots())
        >>> [line.get_ydata().tolist() for line in ax.get_lines()[:2]]
        [[1.3333333333333333, -0.6666666666666666], [2.0, -0.6666666666666666]]
    """
    scores = read_scores(result)
    shape = scores.totals.shape
    if not groups:
        raise ValueError("groups is an empty mapping. Pass at least one group, name: booleans (q, n).")
    members = {name: _read_group(name, group, shape) for name, group in groups.items()}
    points = _scale_points(scores)
    height = legend_height([1 + len(members)], stacked=True)
    ax = column_axes(ax, 2.05 + height, width)
    block = LegendBlock()
    all_pairs = np.ones(shape, dtype=bool)
    dotted = LineStyle(NEUTRAL, ":", "")
    line = _draw_mean(ax, points, all_pairs, [dotted], 0)
    block.add(line, count_entry(ax, "all pairs", all_pairs.size))
    for rank, (name, member) in enumerate(members.items()):
        line = _draw_mean(ax, points, member, CATEGORY, rank)
        n_pairs = int(member.sum())
        block.add(line, count_entry(ax, name, n_pairs))
    finish_lines(ax, points.shape[2], "influence\n(mean size = 1)")
    set_title(ax, title, "")
    draw_legend(ax, [block], stacked=True)
    return readable(ax)


def _read_group(name: str, group: ArrayLike | Tensor, shape: tuple[int, ...]) -> Flags:
    """Check a group and return it as booleans."""
    argument = f"groups[{name!r}]"
    flags = finite_array(argument, group)
    if flags.shape != shape or not np.isin(flags, (0, 1)).all():
        raise ValueError(f"{argument} must be booleans (q, n) = {shape}, got shape {flags.shape}.")
    if not flags.any():
        raise ValueError(f"{argument} marks no pair; leave it out.")
    return flags.astype(bool)


def _scale_points(scores: Scores) -> Array:
    """Return ``(q, n, t)`` of mean size 1 per test example; NaN at steps it did not run."""
    points = scores.steps_run
    sizes = np.nanmean(np.abs(points), axis=(1, 2), keepdims=True)
    return points / np.where(sizes > 0, sizes, 1.0)


def _draw_mean(
    ax: Axes,
    points: Array,
    member: Flags,
    styles: Sequence[LineStyle],
    rank: int,
) -> Line2D:
    """Draw the mean over the pairs of a group, with two standard errors."""
    mean, standard_error = _mean_over_test_examples(points, member)
    margin = 2 * standard_error
    return draw_line(ax, mean, mean - margin, mean + margin, styles, rank)


def _mean_over_test_examples(points: Array, member: Flags) -> tuple[Array, Array]:
    """Return mean and standard error ``(t,)`` over the test examples with pairs in a group."""
    means = []
    for trajectories, in_group in zip(points, member, strict=True):
        if in_group.any():
            means.append(trajectories[in_group].mean(0))
    steps_run = np.ma.masked_invalid(means)
    mean = steps_run.mean(0)
    deviation = steps_run.std(0, ddof=1)
    standard_error = deviation / np.sqrt(steps_run.count(0))
    return mean.filled(np.nan), standard_error.filled(0.0)
