"""Influence by loop step in small multiples: a panel for each training example, where lines would cover each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from captum_sdi.plotting._axes import (
    COLUMN,
    checked_width,
    column_axes,
    divided,
    hide_spines,
    number_steps,
    scale_ticks,
    small_print,
    width_in_points,
)
from captum_sdi.plotting._colours import robust_bound
from captum_sdi.plotting._fonts import readable
from captum_sdi.plotting._lines import (
    ERRORS,
    NEUTRAL,
    OPPONENT,
    PROPONENT,
    LineStyle,
    draw_line,
    limit_line,
    step_padding,
)
from captum_sdi.plotting._scores import Result, Scores, influence_label, read_scores, strongest, train_texts
from captum_sdi.plotting._text import FONT, SMALL, clip, isolated, signed_numbers

_PANEL = 115  # points: a panel is about so wide, and a little less high
_MOST_PANELS = 60


def plot_trajectory_panels(
    result: Result,
    test: int = 0,
    *,
    train: Sequence[int] | None = None,
    k: int = 6,
    texts: Sequence[str] | None = None,
    title: str | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Draw influence by loop step for the top proponents and opponents, each in a panel of its own.

    All panels have the same axes. Where a few points would flatten all others they are cut off, and a triangle marks
    them at the edge. ``ax`` is divided into panels. The arguments are described in `captum_sdi.plotting`.

    Returns:
        The Axes of the first panel; ``ax.figure.axes`` has all of them.

    Raises:
        ValueError: If there are more panels than can be read.

    Example:
        >>> from matplotlib.figure import Figure
        >>> trajectories = [[[0.5, 0.25], [-0.5, -1.0]]]  # (q, n, t) = (1, 2, 2)
        >>> ax = plot_trajectory_panels(trajectories, texts=["1 0 1", "0 0 1"], ax=Figure().subplots())
        >>> [panel.get_title(loc="left") for panel in ax.figure.axes]
        ['test example 0\n+0.750  #0\n1 0 1', '−1.500  #1\n0 0 1']
    """
    texts = train_texts(result, texts)
    scores = read_scores(result, texts).of_test_example(test, train)
    proponents, opponents = strongest(scores.totals, k if train is None else None)
    drawn = scores.select(np.concatenate([proponents, opponents]))
    n_panels = len(drawn.totals)
    if n_panels > _MOST_PANELS:
        raise ValueError(f"train or k asks for {n_panels} panels, more than can be read ({_MOST_PANELS}).")
    is_new = ax is None
    points = 72 * (checked_width(width) or COLUMN) if ax is None else width_in_points(ax)
    n_columns = min(n_panels, max(1, round(points / _PANEL)))
    n_rows = math.ceil(n_panels / n_columns)
    ax = column_axes(ax, 0.5 + (1.3 if texts is None else 1.6) * n_rows, width)
    panels = divided(ax, (n_rows, n_columns), n_panels)
    bound = robust_bound(np.abs(drawn.trajectories) + 2 * drawn.errors)
    for number, panel in enumerate(panels):
        style = PROPONENT[0] if number < len(proponents) else OPPONENT[0]
        _draw_panel(panel, drawn, number, style, bound)
        panel.tick_params(labelleft=number % n_columns == 0, labelbottom=number + n_columns >= n_panels)
    headings = _headings(drawn, texts, (points - 60) / n_columns - 6)
    said = [f"test example {test}" if title is None else title]
    if drawn.errors.any():
        said.append(f"(bands: {ERRORS})")
    if np.nanmax(np.abs(drawn.steps_run)) > panels[0].get_ylim()[1]:
        said.append("(triangles: off axis)")
    heading = "\n".join([clip(line, points - 60) for line in said])
    if is_new:
        ax.figure.suptitle(heading, fontsize=FONT, x=0.02, ha="left")
    else:
        headings[0] = f"{heading}\n{headings[0]}"
    for panel, words in zip(panels, headings, strict=True):
        panel.set_title(words, fontsize=SMALL, loc="left", linespacing=1.1)
    for panel in panels[max(0, n_panels - n_columns) :]:
        panel.set_xlabel("loop step", fontsize=SMALL)
    label = influence_label(result).replace(" in ", " in\n").replace(" unit ", " unit\n")
    ax.set_ylabel(scale_ticks(ax.yaxis, bound, label), fontsize=SMALL)
    return readable(ax)


def _headings(scores: Scores, texts: Sequence[str] | None, room: float) -> list[str]:
    """Return what stands above each panel: total, index, and two lines of text."""
    headings = []
    for total, index in zip(signed_numbers(scores.totals), scores.indices.tolist(), strict=True):
        lines = [clip(f"{total}  #{index}", room)]
        if texts is not None:
            lines.append(clip(isolated(texts[index]), room, lines=2))
        headings.append("\n".join(lines))
    return headings


def _draw_panel(
    panel: Axes,
    scores: Scores,
    number: int,
    style: LineStyle,
    bound: float,
) -> None:
    """Draw one example's line with its band, and what lies beyond the bound at the edge."""
    n_steps = int(scores.n_steps[number])
    values = scores.trajectories[number, :n_steps]
    margin = 2 * scores.errors[number, :n_steps]
    small_print(panel)
    hide_spines(panel, "top", "right")
    panel.axhline(0, color=NEUTRAL, linewidth=0.6, zorder=0)
    draw_line(panel, values, values - margin, values + margin, [style], 0)
    edge = 1.15 * bound or 1.0
    panel.set_ylim(-edge, edge)
    limit_line(panel, values, style.colour, bound)
    number_steps(panel, n_steps)
    panel.set_xlabel("")
    padding = step_padding(n_steps)
    panel.set_xlim(1 - padding, n_steps + padding)
