"""At which loop steps absolute influence acts, over groups of test examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from captum_sdi.plotting._axes import axes, set_title, step_axis
from captum_sdi.plotting._lines import OPPONENT, PROPONENT, Block, draw_line, legend, legend_height, legend_room
from captum_sdi.plotting._scores import Array, Result, Scores, positions, read
from captum_sdi.plotting._text import FONT, clip

_STYLES = [style for both in zip(PROPONENT, OPPONENT, strict=True) for style in both]


def plot_step_share(
    result: Result,
    tests: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the share of absolute influence that acts at each loop step, over groups of test examples.

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
        ValueError: ``tests`` is an empty mapping.

    Example:
        >>> from matplotlib.figure import Figure
        >>> trajectories = [[[3.0, -1.0]], [[0.0, 2.0]]]  # (q, n, t) = (2, 1, 2)
        >>> ax = plot_step_share(trajectories, {"even": [0], "late": [1]}, ax=Figure().subplots())
        >>> [line.get_ydata().tolist() for line in ax.get_lines()]
        [[0.75, 0.25], [0.0, 1.0]]
    """
    shares = _shares(read(result))
    groups = tests if isinstance(tests, Mapping) else {"": tests}
    if not groups:
        raise ValueError("tests is an empty mapping. Pass at least one group, name: positions, or None for all.")
    parts = {name: shares[positions("tests", group, len(shares))] for name, group in groups.items()}
    parts = {name: part[part.any(1)] for name, part in parts.items()}
    depth = shares.shape[1] - 2
    gap = max(1.0, 0.15 * depth)  # the words must not touch the numbers
    ends = {0: ("prelude", 1 - gap), depth + 1: ("coda", depth + gap)}
    ends = {column: end for column, end in ends.items() if any(part[:, column].any() for part in parts.values())}
    named = isinstance(tests, Mapping)

    ax = axes(ax, 2.1 + legend_height([len(parts)] if named else [], True))
    block = Block("", [], [])
    for rank, (name, part) in enumerate(parts.items()):
        apart = 0.15 * gap * (rank - (len(parts) - 1) / 2)
        block.handles.append(_draw_share(ax, part, rank, {column: at + apart for column, (_, at) in ends.items()}))
        block.names.append(clip(f"{name} ({len(part)})", legend_room(ax)))
    _finish(ax, depth, dict(ends.values()), 0.5 * gap)
    count = len(next(iter(parts.values())))
    set_title(ax, title, "" if named else f"{count} test example{'s' * (count != 1)}")
    if named:
        legend(ax, [block], True)
    return ax


def _shares(scores: Scores) -> Array:
    """``(q, 1 + t + 1)`` shares of prelude, steps and coda; zeros where there is no influence."""
    parts = [scores.prelude[..., None], scores.trajectories, scores.coda[..., None]]
    sizes = np.abs(np.concatenate(parts, axis=-1)).sum(1)
    whole = sizes.sum(-1, keepdims=True)
    return np.divide(sizes, whole, out=np.zeros_like(sizes), where=whole > 0)


def _draw_share(ax: Axes, shares: Array, rank: int, ends: dict[int, float]) -> Line2D:
    """Mean and spread of one group's ``(q, 1 + t + 1)``; the columns of ``ends`` stand alone at their places."""
    if not len(shares):
        shares = np.zeros((1, shares.shape[1]))
    mean, (low, high) = shares.mean(0), np.quantile(shares, [0.1, 0.9], axis=0)
    line = draw_line(ax, mean[1:-1], low[1:-1], high[1:-1], _STYLES, rank)
    colour = line.get_color()
    for column, place in ends.items():
        ax.vlines(place, low[column], high[column], color=colour, linewidth=1)
        ax.plot([place], [mean[column]], color=colour, marker=line.get_marker(), markersize=3.5)
    return line


def _finish(ax: Axes, depth: int, ends: dict[str, float], pad: float) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    step_axis(ax, depth)
    if ends:
        steps = [label.get_text() for label in ax.get_xticklabels()]
        ax.set_xticks([*ax.get_xticks(), *ends.values()], [*steps, *ends])
    else:
        pad = 0.6 if depth == 1 else 0.03 * (depth - 1)
    ax.set_xlim(min([1.0, *ends.values()]) - pad, max([depth, *ends.values()]) + pad)
    ax.set_ylim(0, None if ax.dataLim.y1 > 0 else 1)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g}%"))
    ax.set_ylabel("share of |influence|", fontsize=FONT)
