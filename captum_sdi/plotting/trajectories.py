"""Influence by loop step as lines, for one test example."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from captum_sdi.plotting._axes import axes, set_title
from captum_sdi.plotting._lines import OPPONENT, PROPONENT, draw_examples, finish_lines, legend, legend_height
from captum_sdi.plotting._scores import Result, read, strongest
from captum_sdi.plotting._text import signed


def plot_trajectories(
    result: Result,
    test: int = 0,
    *,
    train: Sequence[int] | None = None,
    k: int = 3,
    texts: Sequence[str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws influence by loop step for the top proponents and opponents of one test example.

    The arguments are described in `captum_sdi.plotting`.

    Returns:
        The Axes. Its legend gives each line's total, which includes the prelude and coda parts.

    Example:
        >>> from matplotlib.figure import Figure
        >>> trajectories = [[[0.5, 0.25], [-0.5, -1.0]]]  # (q, n, t) = (1, 2, 2)
        >>> ax = plot_trajectories(trajectories, texts=["1 0 1", "0 0 1"], ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['proponents: total', '+0.750  #0: 1 0 1', 'opponents: total', '−1.500  #1: 0 0 1']
    """
    one = read(result, texts).of(test, train)
    groups = strongest(one.totals, k if train is None else None)
    stacked = texts is not None or one.has_ends
    ax = axes(ax, 2.05 + legend_height([len(group) for group in groups], stacked))
    totals = iter(signed(one.totals[np.concatenate(groups)]))
    blocks = []
    for group, styles, name in zip(groups, (PROPONENT, OPPONENT), ("proponents", "opponents"), strict=True):
        heading = f"{name}: total incl. prelude, coda" if one.has_ends else f"{name}: total"
        blocks.append(draw_examples(ax, heading, one.at(group), totals, styles, texts))
    finish_lines(ax, int(one.n_steps[0]), "influence\n(drop in test loss)")
    set_title(ax, title, f"test example {test}")
    legend(ax, blocks, stacked)
    return ax
