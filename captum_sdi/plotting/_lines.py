"""Trajectories as lines with bands."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D

from captum_sdi.plotting._arguments import Array
from captum_sdi.plotting._axes import hide_spines, note_below, number_steps, scale_ticks
from captum_sdi.plotting._legend import LegendBlock, total_entry
from captum_sdi.plotting._scores import Scores
from captum_sdi.plotting._text import FONT, example_name


class LineStyle(NamedTuple):
    """How a line is drawn, so that it can be told apart with and without colour."""

    colour: str
    dash: str
    marker: str


# Okabe & Ito's palette. Cold and solid for proponents, warm and dashed for opponents; markers tell lines apart without
# colour. The heat maps' blue and red agree with it.
PROPONENT = [
    LineStyle("#0072B2", "-", "o"),
    LineStyle("#56B4E9", "-", "s"),
    LineStyle("#009E73", "-", "^"),
]
OPPONENT = [
    LineStyle("#D55E00", "--", "v"),
    LineStyle("#E69F00", "--", "D"),
    LineStyle("#CC79A7", "--", "X"),
]
CATEGORY = list(chain(*zip(PROPONENT, OPPONENT, strict=True)))  # for lines without a sign
ERRORS = "2 s.e. of the sketch"
NEUTRAL = "#7A7A7A"  # as far from white as from black


def draw_examples(
    ax: Axes,
    heading: str,
    scores: Scores,
    totals: Sequence[str],
    styles: Sequence[LineStyle],
    texts: Sequence[str] | None,
) -> LegendBlock:
    """Draw a line for each training example; its legend entry gives its total and its text."""
    block = LegendBlock(heading)
    for rank, total in enumerate(totals):
        n_steps = scores.n_steps[rank]
        values = scores.trajectories[rank, :n_steps]
        margin = 2 * scores.errors[rank, :n_steps]
        line = draw_line(ax, values, values - margin, values + margin, styles, rank)
        name = example_name(int(scores.indices[rank]), texts)
        block.add(line, total_entry(ax, total, name))
    return block


def draw_line(
    ax: Axes,
    values: Array,
    lower: Array,
    upper: Array,
    styles: Sequence[LineStyle],
    rank: int,
) -> Line2D:
    """Draw one line over steps with its band; a colour used again gets another, hollow marker."""
    n_steps, n_styles = len(values), len(styles)
    style = styles[rank % n_styles]
    repeats = rank // n_styles
    marker = styles[(rank + repeats) % n_styles].marker
    hollow = repeats % 2 == 1
    steps = np.arange(1.0, n_steps + 1)
    if n_steps > 1:
        draw_band(ax, steps, lower, upper, style.colour, 0.12, edge=0.5)
    else:  # one step is no line, and its band would have no width: bars, moved apart
        direction = -1 if styles is OPPONENT else 1
        steps += 0.06 * (rank + 0.5) * direction
        ax.vlines(steps, lower, upper, color=style.colour, linewidth=1)
    (line,) = ax.plot(
        steps,
        values,
        color=style.colour,
        linestyle=style.dash,
        linewidth=1.2,
        marker=marker,
        markersize=3.5,
        markerfacecolor=ax.get_facecolor() if hollow else style.colour,
        markevery=max(1, round(n_steps / 10)),
    )
    return line


def draw_band(
    ax: Axes,
    steps: Array,
    lower: Array,
    upper: Array,
    colour: str,
    alpha: float,
    edge: float = 0.0,
) -> None:
    """Draw a band over steps, with edges this wide where several overlap; nothing where scores are exact."""
    if (upper > lower).any():
        edges = to_rgba(colour, 0.6)
        ax.fill_between(
            steps,
            lower,
            upper,
            facecolor=to_rgba(colour, alpha),
            edgecolor=edges,
            linewidth=edge,
        )


def finish_lines(ax: Axes, n_steps: int, label: str) -> None:
    """Set up the axes of influence over loop steps, when all lines are drawn."""
    hide_spines(ax, "top", "right")
    number_steps(ax, n_steps)
    padding = step_padding(n_steps)
    ax.set_xlim(1 - padding, n_steps + padding)
    ax.axhline(0, color=NEUTRAL, linewidth=0.6, zorder=0)
    largest = np.abs(ax.dataLim.intervaly).max()
    if largest == 0:
        ax.set_ylim(-1, 1)
    ax.set_ylabel(scale_ticks(ax.yaxis, largest, label), fontsize=FONT, linespacing=1.1)


def note_errors(ax: Axes, errors: Array, shape: str) -> None:
    """Say what bands or bars are, where there are any: errors of the sketch, not of training again."""
    if np.nan_to_num(errors).any():
        note_below(ax, f"{shape}: {ERRORS}")


def limit_line(
    ax: Axes,
    values: Array,
    colour: str,
    bound: float,
) -> bool:
    """End the axis a little beyond a bound where a line goes farther, and mark with triangles where it does.

    Args:
        ax: With the line.
        values: Its values ``(t,)``, at steps from 1.
        colour: The line's.
        bound: The largest absolute value that is to be seen.

    Returns:
        Whether there are triangles.
    """
    edge = 1.15 * bound
    exceeds_edge = np.abs(values) > edge
    if not bound or not exceeds_edge.any():
        return False
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, -edge), min(high, edge))
    for marker, sign in (("^", 1), ("v", -1)):
        steps = np.flatnonzero(exceeds_edge & (sign * values > 0))
        heights = np.full(len(steps), 0.95 * sign * edge)
        ax.scatter(steps + 1, heights, marker=marker, s=18, color=colour)
    return True


def step_padding(n_steps: int) -> float:
    """Return the room, in steps, before the first step and after the last one."""
    return 0.6 if n_steps == 1 else 0.03 * (n_steps - 1)
