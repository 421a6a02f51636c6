"""A map along any two of its axes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from captum_sdi.plotting._arguments import Array, check_limit
from captum_sdi.plotting._axes import (
    column_axes,
    height_in_points,
    label_room,
    label_rows,
    number_ticks,
    set_title,
    width_in_points,
)
from captum_sdi.plotting._colours import draw_cells
from captum_sdi.plotting._fonts import readable
from captum_sdi.plotting._maps import check_axis, check_map, names_along, pair_name, values_along, without_empty_ends
from captum_sdi.plotting._text import FONT, SMALL, clip, isolated, text_width
from captum_sdi.scores.influence_map import InfluenceMap

_WORDS = {
    "token": "target token of the test text",
    "train_token": "target token of the train text",
    "position": "position in the test text",
    "train_position": "position in the train text",
    "step": "loop step",
    "train_step": "loop step of the train side",
}


def plot_map(
    map: InfluenceMap,
    x: str,
    y: str | Sequence[str],
    test: int = 0,
    train: int | None = None,
    *,
    limit: float | None = None,
    title: str | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw influence along two axes of a map, summed over all others.

    ``map`` is what `SDIInfluence.influence_map` or `Direction.influence_map` returned, ``x`` and ``y`` name two of its
    axes. Several names in ``y`` are rows within rows: ``("group", "step")`` compares groups step by step. ``train`` is
    the place of a train example among the test example's, from 0; None = their sum. The other arguments are described
    in `captum_sdi.plotting`.

    Returns:
        The Axes: ``x`` to the right, ``y`` downwards. A prelude and coda in which nothing happens are left out.

    Raises:
        ValueError: If the map has no such axes.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> labels = {"layer": ("core.fc", "core.proj"), "step": ("prelude", 0, 1, "coda")}
        >>> values = torch.tensor([[[[0.0, 1.0, 2.0, 0.0], [0.0, 0.5, -1.0, 0.0]]]])
        >>> split = InfluenceMap(values, ("layer", "step"), labels, indices=torch.tensor([[3]]))
        >>> ax = plot_map(split, x="step", y="layer", ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_xticklabels()], [label.get_text() for label in ax.get_yticklabels()]
        (['1', '2'], ['core.fc', 'core.proj'])
    """
    split = check_map(map)
    row_axes = (y,) if isinstance(y, str) else tuple(y)
    for axis in row_axes:
        if check_axis("x", x, split) == check_axis("y", axis, split):
            raise ValueError(f"x and y are both {x!r}: name two axes of {split.axes}.")
    check_limit(limit)
    values, rows = rows_within_rows(split, row_axes, x, test, train)
    columns, names = without_empty_ends(split, x, values.T, names_along(split, x, test, train))
    values = columns.T
    n_rows = len(rows)
    height = max(2.1, 0.9 + 0.135 * n_rows) if n_rows <= 40 else 4.0
    ax = column_axes(ax, height, width)
    room = label_room(ax)
    draw_cells(ax, values, limit)
    _label_columns(ax, names)
    if height_in_points(ax) / n_rows >= 6:
        label_rows(ax, [isolated(name) for name in rows], room)
    else:
        number_ticks(ax.yaxis, n_rows, 8, first_at=0)
    ax.set_xlabel(_WORDS.get(x, x), fontsize=FONT)
    ax.set_ylabel(", ".join(_WORDS.get(axis, axis) for axis in row_axes), fontsize=FONT)
    set_title(ax, title, pair_name(split, test, train), taken=0)
    return readable(ax)


def rows_within_rows(
    split: InfluenceMap,
    row_axes: tuple[str, ...],
    x: str,
    test: int,
    train: int | None,
) -> tuple[Array, list[str]]:
    """Return the values ``(rows, columns)`` along several axes beside one, and the rows' names."""
    values = values_along(split, (*row_axes, x), test, train)
    rows = [""]
    for place, axis in enumerate(row_axes):
        in_front = np.moveaxis(values, place, 0)
        kept, names = without_empty_ends(split, axis, in_front, names_along(split, axis, test, train))
        values = np.moveaxis(kept, 0, place)
        rows = [f"{row} {name}".strip() for row in rows for name in names]
    return values.reshape(len(rows), -1), rows


def _label_columns(ax: Axes, names: list[str]) -> None:
    """Name each column, upright where names are long, or number them where there is no room for that either."""
    n_columns = len(names)
    share = 0.8 * width_in_points(ax) / n_columns
    shown = [clip(isolated(name), 60) for name in names]
    is_short = all(text_width(name) <= 0.8 * share for name in shown)
    if share < SMALL:
        fitting = int(width_in_points(ax) / 17)
        number_ticks(ax.xaxis, n_columns, max(3, fitting))
        return
    ax.set_xticks(range(1, n_columns + 1), shown, rotation=0 if is_short else 90, fontsize=SMALL)
