"""Influence on one test example as a heat map: training examples by loop steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from captum_sdi.plotting._arguments import check_limit
from captum_sdi.plotting._axes import (
    column_axes,
    height_in_points,
    label_room,
    label_rows,
    number_ticks,
    row_height,
    set_title,
)
from captum_sdi.plotting._colours import draw_colours
from captum_sdi.plotting._fonts import readable
from captum_sdi.plotting._scores import Result, influence_label, ranked, read_scores, train_texts
from captum_sdi.plotting._text import FONT, example_name


def plot_heatmap(
    result: Result,
    test: int = 0,
    *,
    train: Sequence[int] | None = None,
    k: int | None = None,
    sort: str = "total",
    texts: Sequence[str] | None = None,
    limit: float | None = None,
    title: str | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw influence on one test example as a heat map, training examples by loop steps.

    Rows are sorted by "total", largest first, or by the "step" at which an example is strongest, which shows groups
    that act early and late. Rows too many to be named are counted instead. ``k=None`` draws all training examples in
    ``result``. The other arguments are described in `captum_sdi.plotting`.

    Returns:
        The Axes.

    Raises:
        ValueError: If ``sort`` is neither "total" nor "step".

    Example:
        >>> from matplotlib.figure import Figure
        >>> trajectories = [[0.5, 0.25], [-0.5, -1.0], [2.0, 0.1]]  # (n, t) = (3, 2)
        >>> ax = plot_heatmap(trajectories, ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['#2', '#0', '#1']
    """
    if sort not in ("total", "step"):
        raise ValueError(f'sort must be "total" or "step", got {sort!r}.')
    check_limit(limit)
    texts = train_texts(result, texts)
    scores = read_scores(result, texts).of_test_example(test, train)
    scores = scores.select(ranked(scores.totals, k))
    if sort == "step":
        sizes = np.abs(scores.trajectories)
        largest = sizes.max(1)
        strongest_step = sizes.argmax(1)
        scores = scores.select(np.lexsort((-largest, strongest_step)))
    names = [example_name(int(index), texts) for index in scores.indices]
    n_rows = len(names)
    height = max(2.1, 0.7 + row_height(names, width) * n_rows) if n_rows <= 40 else 2.8
    ax = column_axes(ax, height, width)
    room = label_room(ax)
    n_steps = scores.n_steps[0]
    is_named = height_in_points(ax) / n_rows >= 6
    draw_colours(
        ax,
        scores.trajectories[:, :n_steps],
        limit,
        taken=room if is_named else 0,
        label=influence_label(result),
    )
    if is_named:
        label_rows(ax, names, room)
    else:
        room = 20
        number_ticks(ax.yaxis, n_rows, 6, first_at=0)
    order = ", by total" if sort == "total" else ",\nby strongest step"
    ax.set_ylabel(f"train examples{order}", fontsize=FONT, linespacing=1.1)
    set_title(ax, title, f"test example {test}", taken=room)
    return readable(ax)
