"""At which loop steps absolute influence acts, over groups of test examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from captum_sdi.features import Bins
from captum_sdi.plotting._arguments import Array, check_positions, finite_array
from captum_sdi.plotting._axes import column_axes, hide_spines, number_steps, set_title, width_in_points
from captum_sdi.plotting._fonts import readable
from captum_sdi.plotting._legend import LegendBlock, count_entry, draw_legend, legend_height
from captum_sdi.plotting._lines import CATEGORY, draw_line, step_padding
from captum_sdi.plotting._scores import Result, Scores, read_scores
from captum_sdi.plotting._text import FONT
from captum_sdi.scores.result import StepInfluence

NORMS = "#B0B0B0"


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

    The grey line is the same share of the norm of the test example's own gradient, at each checkpoint, averaged with
    the checkpoints' shares of the scores: where coloured lines follow it, they say how large the test gradient is at
    each step, and nothing of the train examples. It needs ``result.checkpoints`` with its norms, which plain
    trajectories, files of earlier versions and reranked results lack.

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
    norm_shares = _norm_shares(result, shares)
    members = _members(tests)
    groups = {name: _select_tests(shares, positions) for name, positions in members.items()}
    drawn = np.concatenate(list(groups.values()))
    n_steps = shares.shape[1] - 2
    named = isinstance(tests, Mapping)
    n_entries = len(groups) * named + (norm_shares is not None)
    height = legend_height([n_entries], stacked=True)
    ax = column_axes(ax, 2.1 + height, width)
    gap = max(1.0, 0.15 * n_steps, 40 * n_steps / width_in_points(ax))  # the words must not touch the numbers
    outer_bins = _outer_bins(drawn, gap)
    lines = _draw_groups(ax, groups, outer_bins, gap)
    block = LegendBlock()
    if named:
        for line, (name, group) in zip(lines, groups.items(), strict=True):
            block.add(line, count_entry(ax, name, len(group)))
    if norm_shares is not None:
        chosen_groups = [_select_tests(shares, positions, norm_shares) for positions in members.values()]
        chosen = np.concatenate(chosen_groups)
        line = _draw_norms(ax, chosen, outer_bins)
        block.add(line, "share of the test gradient's norm")
    padding = 0.5 * gap if outer_bins else step_padding(n_steps)
    _finish_axes(ax, n_steps, outer_bins, padding)
    set_title(ax, title, "" if named else _count_tests(drawn))
    if n_entries:
        draw_legend(ax, [block], stacked=True)
    return readable(ax)


@dataclass(frozen=True)
class _OuterBin:
    """The prelude or the coda: its column among the shares, and its place on the axis of steps."""

    name: str
    column: int
    place: float


def _members(tests: Sequence[int] | Mapping[str, Sequence[int]] | None) -> Mapping[str, Sequence[int] | None]:
    """Return the positions of each group's test examples, None for all of them; of one group the name is empty."""
    if not isinstance(tests, Mapping):
        return {"": tests}
    if not tests:
        raise ValueError("tests is an empty mapping. Pass at least one group, name: positions, or None for all.")
    return tests


def _outer_bins(drawn: Array, gap: float) -> list[_OuterBin]:
    """Return the prelude and the coda where they are not zero, a gap before the first step and behind the last."""
    n_steps = drawn.shape[1] - 2
    prelude = _OuterBin("prelude", column=0, place=1 - gap)
    coda = _OuterBin("coda", column=n_steps + 1, place=n_steps + gap)
    return [outer for outer in (prelude, coda) if drawn[:, outer.column].any()]


def _shares(scores: Scores) -> Array:
    """Return ``(q, 1 + t + 1)`` shares of prelude, steps and coda; zeros without influence."""
    prelude = scores.prelude[..., None]
    coda = scores.coda[..., None]
    influence = np.concatenate([prelude, scores.trajectories, coda], axis=-1)
    sizes = np.abs(influence).sum(1)
    sums = sizes.sum(-1, keepdims=True)
    zeros = np.zeros_like(sizes)
    return np.divide(sizes, sums, out=zeros, where=sums > 0)


def _norm_shares(result: Result, shares: Array) -> Array | None:
    """Return ``(q, 1 + t + 1)`` shares of the test gradients' norms of prelude, steps and coda; None if unknown."""
    checkpoints = result.checkpoints if isinstance(result, StepInfluence) else None
    if checkpoints is None or checkpoints.test_norms is None:
        return None
    norms = finite_array("result.checkpoints.test_norms", checkpoints.test_norms)  # (q, c, 2 + t)
    n_bins = shares.shape[1]
    if norms.shape != (len(shares), len(checkpoints.names), n_bins):
        raise ValueError(f"result.checkpoints.test_norms must have {len(shares)} x {n_bins} norms, got {norms.shape}.")
    in_order = [Bins.PRELUDE, *range(Bins.of_step(0), n_bins), Bins.CODA]
    ordered = norms[:, :, in_order]
    sums = ordered.sum(-1, keepdims=True)
    zeros = np.zeros_like(ordered)
    of_checkpoints = np.divide(ordered, sums, out=zeros, where=sums > 0)
    weights = finite_array("result.checkpoints.shares", checkpoints.shares)
    return np.einsum("c,qcb->qb", weights, of_checkpoints)


def _select_tests(
    shares: Array,
    tests: Sequence[int] | None,
    drawn: Array | None = None,
) -> Array:
    """Return what is drawn, the shares, of the test examples at these positions that have any influence."""
    positions = check_positions("tests", tests, len(shares))
    has_influence = shares[positions].any(1)
    rows = shares if drawn is None else drawn
    return rows[positions[has_influence]]


def _draw_groups(
    ax: Axes,
    groups: Mapping[str, Array],
    outer_bins: Sequence[_OuterBin],
    gap: float,
) -> list[Line2D]:
    """Draw a line for each group; their outer bins stand side by side."""
    middle = (len(groups) - 1) / 2
    lines = []
    for rank, group in enumerate(groups.values()):
        offset = 0.15 * gap * (rank - middle)
        line = _draw_share(ax, group, rank, outer_bins, offset)
        lines.append(line)
    return lines


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


def _count_tests(drawn: Array) -> str:
    n_tests = len(drawn)
    return f"{n_tests} test example" if n_tests == 1 else f"{n_tests} test examples"


def _draw_norms(ax: Axes, shares: Array, outer_bins: Sequence[_OuterBin]) -> Line2D:
    """Draw the mean share of the test gradients' norms behind all other lines."""
    mean = shares.mean(0) if len(shares) else np.zeros(shares.shape[1])
    steps = np.arange(1.0, len(mean) - 1)
    marker = "_" if len(steps) == 1 else ""
    (line,) = ax.plot(
        steps,
        mean[1:-1],
        color=NORMS,
        linewidth=2.5,
        marker=marker,
        markersize=12,
        zorder=1,
    )
    for outer in outer_bins:
        ax.plot(
            outer.place,
            mean[outer.column],
            color=NORMS,
            marker="_",
            markersize=12,
            markeredgewidth=2.5,
            zorder=1,
        )
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
    first_place = min([1.0, *places])
    last_place = max([n_steps, *places])
    ax.set_xlim(first_place - padding, last_place + padding)
    top = None if ax.dataLim.y1 > 0 else 1
    ax.set_ylim(0, top)
    percent = FuncFormatter(lambda share, _: f"{100 * share:.4g}%")
    ax.yaxis.set_major_formatter(percent)
    ax.set_ylabel("share of |influence|", fontsize=FONT)
