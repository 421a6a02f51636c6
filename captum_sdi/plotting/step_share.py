"""At which loop steps absolute influence acts, over groups of test examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from captum_sdi.plotting._arguments import Array, check_positions
from captum_sdi.plotting._axes import column_axes, hide_spines, number_steps, set_title
from captum_sdi.plotting._legend import LegendBlock, count_entry, draw_legend, legend_height
from captum_sdi.plotting._lines import CATEGORY, draw_line, step_padding
from captum_sdi.plotting._scores import Result, Scores, read_scores
from captum_sdi.plotting._text import FONT


def plot_step_share(
    result: Result,
    tests: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    *,
    title: str | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the share of absolute influence at each loop step, over groups of test examples.

    A test example's share at a step is the sum of absolute influence over the training examples in ``result``, divided
    by that sum over all steps, the prelude and the coda. A step it did not run has share 0; a test example without any
    influence is left out. Noise of the sketch is absolute influence too: where standard errors are as large as the
    scores, shares are pulled towards uniform.

    ``tests`` are positions of test examples, None = all; or several groups of them, each under its name. The other
    arguments are described in `captum_sdi.plotting`.

    Returns:
        The Axes. Lines are means over test examples, bands their 10th to 90th percentile. Prelude and coda stand beside
        the steps where they are not zero.

    Raises:
        ValueError: If ``tests`` is an empty mapping.

    Example:
        >>> from matplotlib.figure import Figure
        >>> trajectories = [[[3.0, -1.0]], [[0.0, 2.0]]]  # (q, n, t) = (2, 1, 2)
        >>> ax = plot_step_share(trajectories, {"even": [0], "late": [1]}, ax=Figure().subplots())
        >>> [line.get_ydata().tolist() for line in ax.get_lines()]
        [[0.75, 0.25], [0.0, 1.0]]
    """
    shares = _shares(read_scores(result))
    members = tests if isinstance(tests, Mapping) else {"": tests}
    if not members:
        raise ValueError("tests is an empty mapping. Pass at least one group, name: positions, or None for all.")
    groups = {name: _select_tests(shares, positions) for name, positions in members.items()}
    drawn = np.concatenate(list(groups.values()))
    n_steps = shares.shape[1] - 2
    gap = max(1.0, 0.15 * n_steps)  # the words must not touch the numbers
    prelude = _OuterBin("prelude", column=0, place=1 - gap)
    coda = _OuterBin("coda", column=n_steps + 1, place=n_steps + gap)
    outer_bins = [outer for outer in (prelude, coda) if drawn[:, outer.column].any()]

    named = isinstance(tests, Mapping)
    height = legend_height([len(groups)], stacked=True) if named else 0
    ax = column_axes(ax, 2.1 + height, width)
    block = LegendBlock()
    middle = (len(groups) - 1) / 2
    for rank, (name, group) in enumerate(groups.items()):
        offset = 0.15 * gap * (rank - middle)
        line = _draw_share(ax, group, rank, outer_bins, offset)
        block.add(line, count_entry(ax, name, len(group)))
    padding = 0.5 * gap if outer_bins else step_padding(n_steps)
    _finish_axes(ax, n_steps, outer_bins, padding)
    if named:
        set_title(ax, title, "")
        draw_legend(ax, [block], stacked=True)
    else:
        n_tests = len(drawn)
        examples = "test example" if n_tests == 1 else "test examples"
        set_title(ax, title, f"{n_tests} {examples}")
    return ax


@dataclass(frozen=True)
class _OuterBin:
    """The prelude or the coda: its column among the shares, and its place on the axis of steps."""

    name: str
    column: int
    place: float


def _shares(scores: Scores) -> Array:
    """Return ``(q, 1 + t + 1)`` shares of prelude, steps and coda; zeros without influence."""
    prelude = scores.prelude[..., None]
    coda = scores.coda[..., None]
    influence = np.concatenate([prelude, scores.trajectories, coda], axis=-1)
    sizes = np.abs(influence).sum(1)
    sums = sizes.sum(-1, keepdims=True)
    zeros = np.zeros_like(sizes)
    return np.divide(sizes, sums, out=zeros, where=sums > 0)


def _select_tests(shares: Array, tests: Sequence[int] | None) -> Array:
    """Return the shares of the test examples at these positions that have any influence."""
    selected = shares[check_positions("tests", tests, len(shares))]
    return selected[selected.any(1)]


def _draw_share(
    ax: Axes,
    shares: Array,
    rank: int,
    outer_bins: Sequence[_OuterBin],
    offset: float,
) -> Line2D:
    """Draw mean and spread of one group's shares; outer bins stand alone, moved by ``offset``."""
    if not len(shares):
        shares = np.zeros((1, shares.shape[1]))
    mean = shares.mean(0)
    lower, upper = np.quantile(shares, [0.1, 0.9], axis=0)
    steps = slice(1, -1)  # between prelude and coda
    line = draw_line(ax, mean[steps], lower[steps], upper[steps], CATEGORY, rank)
    colour = line.get_color()
    marker = line.get_marker()
    for outer in outer_bins:
        place = outer.place + offset
        column = outer.column
        ax.vlines(place, lower[column], upper[column], color=colour, linewidth=1)
        ax.plot(place, mean[column], color=colour, marker=marker, markersize=3.5)
    return line


def _finish_axes(
    ax: Axes,
    n_steps: int,
    outer_bins: Sequence[_OuterBin],
    padding: float,
) -> None:
    """Set up the axes of shares over loop steps, when all lines are drawn."""
    hide_spines(ax, "top", "right")
    number_steps(ax, n_steps)
    places = [outer.place for outer in outer_bins]
    if outer_bins:
        labels = [label.get_text() for label in ax.get_xticklabels()]
        labels += [outer.name for outer in outer_bins]
        ax.set_xticks([*ax.get_xticks(), *places], labels)
    first = min([1.0, *places])
    last = max([n_steps, *places])
    ax.set_xlim(first - padding, last + padding)
    top = None if ax.dataLim.y1 > 0 else 1
    ax.set_ylim(0, top)
    percent = FuncFormatter(lambda share, _: f"{100 * share:.4g}%")
    ax.yaxis.set_major_formatter(percent)
    ax.set_ylabel("share of |influence|", fontsize=FONT)
