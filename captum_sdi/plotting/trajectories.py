"""Influence by loop step as lines, for one test example."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from captum_sdi.plotting._axes import column_axes, note_below, set_title
from captum_sdi.plotting._colours import robust_bound
from captum_sdi.plotting._fonts import readable
from captum_sdi.plotting._legend import LegendBlock, draw_legend, legend_height
from captum_sdi.plotting._lines import OPPONENT, PROPONENT, draw_examples, finish_lines, limit_line, note_errors
from captum_sdi.plotting._scores import Result, Scores, influence_label, read_scores, strongest, train_texts
from captum_sdi.plotting._text import signed_numbers
from captum_sdi.plotting.trajectory_panels import plot_trajectory_panels

MOST_LINES = 5
"""Lines in one picture."""


def plot_trajectories(
    result: Result,
    test: int = 0,
    *,
    train: Sequence[int] | None = None,
    k: int = 2,
    texts: Sequence[str] | None = None,
    title: str | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw influence by loop step for the top proponents and opponents of one test example.

    More than five lines would cover each other: `plot_trajectory_panels` then gives each a panel. Where a few points
    would flatten all others the axis ends before them, and triangles mark them. The arguments are described in
    `captum_sdi.plotting`.

    Returns:
        The Axes. Its legend gives each line's total, which includes the prelude and coda parts. Of panels, the first.

    Example:
        >>> from matplotlib.figure import Figure
        >>> trajectories = [[[0.5, 0.25], [-0.5, -1.0]]]  # (q, n, t) = (1, 2, 2)
        >>> ax = plot_trajectories(trajectories, texts=["1 0 1", "0 0 1"], ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['proponents: total', '+0.750  #0: 1 0 1', 'opponents: total', '−1.500  #1: 0 0 1']
    """
    texts = train_texts(result, texts)
    scores = read_scores(result, texts).of_test_example(test, train)
    proponents, opponents = strongest(scores.totals, k if train is None else None)
    drawn = np.concatenate([proponents, opponents])
    if len(drawn) > MOST_LINES:
        return plot_trajectory_panels(
            result,
            test,
            train=train,
            k=k,
            texts=texts,
            title=title,
            width=width,
            ax=ax,
        )
    stacked = texts is not None or scores.has_outer_bins
    height = legend_height([len(proponents), len(opponents)], stacked=stacked)
    ax = column_axes(ax, 2.05 + height, width)
    totals = dict(zip(drawn.tolist(), signed_numbers(scores.totals[drawn]), strict=True))
    meaning = "total incl. prelude, coda" if scores.has_outer_bins else "total"
    sign = "proponents" if scores.totals[proponents].any() else "no influence"
    blocks = []
    for name, rows, styles in ((sign, proponents, PROPONENT), ("opponents", opponents, OPPONENT)):
        own_totals = [totals[row] for row in rows.tolist()]
        block = draw_examples(
            ax,
            f"{name}: {meaning}",
            scores.select(rows),
            own_totals,
            styles,
            texts,
        )
        blocks.append(block)
    finish_lines(ax, int(scores.n_steps[0]), influence_label(result))
    note_errors(ax, scores.errors[drawn], "bands" if scores.n_steps[0] > 1 else "bars")
    _limit(ax, scores.select(drawn), blocks)
    set_title(ax, title, f"test example {test}")
    draw_legend(ax, blocks, stacked=stacked)
    return readable(ax)


def _limit(ax: Axes, scores: Scores, blocks: Sequence[LegendBlock]) -> None:
    """End the axis where a few points would flatten all others."""
    bound = robust_bound(np.abs(scores.trajectories) + 2 * scores.errors)
    handles = [handle for block in blocks for handle in block.handles]
    is_limited = False
    for values, line in zip(scores.trajectories, handles, strict=True):
        is_limited |= limit_line(ax, values, line.get_color(), bound)
    if is_limited:
        note_below(ax, "triangles: off axis")
