"""A map along any two of its axes."""

from __future__ import annotations

from matplotlib.axes import Axes

from captum_sdi.plotting._arguments import check_limit
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
    y: str,
    test: int = 0,
    train: int | None = None,
    *,
    limit: float | None = None,
    title: str | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw influence along two axes of a map, summed over all others.

    ``map`` is what `SDIInfluence.influence_map` returned, ``x`` and ``y`` name two of its axes. ``train`` is the place
    of a train example among the test example's, from 0; None = their sum. The other arguments are described in
    `captum_sdi.plotting`.

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
    if check_axis("x", x, split) == check_axis("y", y, split):
        raise ValueError(f"x and y are both {x!r}: name two axes of {split.axes}.")
    check_limit(limit)
    values = values_along(split, (y, x), test, train)
    values, rows = without_empty_ends(split, y, values, names_along(split, y, test, train))
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
    ax.set_ylabel(_WORDS.get(y, y), fontsize=FONT)
    set_title(ax, title, pair_name(split, test, train), taken=0)
    return readable(ax)


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
