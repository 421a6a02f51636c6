"""Influence by loop step in small multiples: a panel for each training example, where lines would cover each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from captum_sdi.plotting._axes import COLUMN, checked_width, hide_spines, number_steps, scale_ticks, small_print
from captum_sdi.plotting._colours import robust_bound
from captum_sdi.plotting._lines import NEUTRAL, OPPONENT, PROPONENT, LineStyle, draw_line, step_padding
from captum_sdi.plotting._scores import Result, Scores, read_scores, strongest, train_texts
from captum_sdi.plotting._text import FONT, SMALL, clip, isolated, signed_numbers

_PANEL = 1.6  # inches: a panel is about so wide, and a little less high
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
) -> Axes:
    r"""Draw influence by loop step for the top proponents and opponents, each in a panel of its own.

    All panels have the same axes. Where a few points would flatten all others they are cut off, and a triangle marks
    them at the edge. The arguments are described in `captum_sdi.plotting`; it makes a figure of its own.

    Returns:
        The Axes of the first panel; ``ax.figure.axes`` has all of them.

    Raises:
        ValueError: If there are more panels than can be read.

    Example:
        >>> trajectories = [[[0.5, 0.25], [-0.5, -1.0]]]  # (q, n, t) = (1, 2, 2)
        >>> ax = plot_trajectory_panels(trajectories, texts=["1 0 1", "0 0 1"])
        >>> [panel.get_title(loc="left") for panel in ax.figure.axes]
        ['+0.750  #0\n1 0 1', '−1.500  #1\n0 0 1']
        >>> plt.close(ax.figure)
    """
    texts = train_texts(result, texts)
    scores = read_scores(result, texts).of_test_example(test, train)
    proponents, opponents = strongest(scores.totals, k if train is None else None)
    order = np.concatenate([proponents, opponents])
    n_panels = len(order)
    if n_panels > _MOST_PANELS:
        raise ValueError(f"train or k asks for {n_panels} panels, more than can be read ({_MOST_PANELS}).")
    drawn = scores.select(order)
    inches = checked_width(width) or COLUMN
    n_columns = min(n_panels, max(1, round(inches / _PANEL)))
    figure, panels = _panels(n_panels, n_columns, inches)
    room = (72 * inches - 44) / n_columns - 10
    totals = signed_numbers(drawn.totals)
    bound = robust_bound(np.abs(drawn.trajectories) + 2 * drawn.errors)
    for number, panel in enumerate(panels):
        style = PROPONENT[0] if number < len(proponents) else OPPONENT[0]
        _draw_panel(panel, drawn, number, style, bound)
        index = int(drawn.indices[number])
        name = clip(f"{totals[number]}  #{index}", room)
        words = "" if texts is None else "\n" + clip(isolated(texts[index]), room)
        panel.set_title(name + words, fontsize=SMALL, loc="left", linespacing=1.1)
    heading = clip(f"test example {test}" if title is None else title, 72 * inches - 20)
    figure.suptitle(heading, fontsize=FONT, x=0.02, ha="left")
    figure.supxlabel("loop step", fontsize=FONT)
    figure.supylabel(scale_ticks(panels[0].yaxis, bound, "influence (drop in test loss)"), fontsize=FONT)
    return panels[0]


def _panels(n_panels: int, n_columns: int, inches: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels that share their axes; the lowest of each column have numbers below them."""
    n_rows = math.ceil(n_panels / n_columns)
    size = (inches, 0.5 + 1.3 * n_rows)
    figure, grid = plt.subplots(
        n_rows, n_columns, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    panels = list(grid.flatten())
    for panel in panels[n_panels:]:
        panel.remove()
    for panel in panels[max(0, n_panels - n_columns) : n_panels]:
        panel.tick_params(labelbottom=True)
    return figure, panels[:n_panels]


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
    for marker, sign in (("^", 1), ("v", -1)):
        clipped_steps = np.flatnonzero(sign * values > edge)
        panel.scatter(
            clipped_steps + 1, np.full(len(clipped_steps), 0.95 * sign * edge), marker=marker, s=18, color=style.colour
        )
    number_steps(panel, n_steps)
    panel.set_xlabel("")
    padding = step_padding(n_steps)
    panel.set_xlim(1 - padding, n_steps + padding)
    panel.set_ylim(-edge, edge)
