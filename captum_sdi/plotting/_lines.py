"""Trajectories as lines with bands, and the legend that names them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from captum_sdi.plotting._axes import has_layout, points, scale, step_axis
from captum_sdi.plotting._scores import Array, Scores
from captum_sdi.plotting._text import FONT, SMALL, named, text_width

_Style: TypeAlias = tuple[str, str, str]  # colour, line, marker

# Okabe & Ito's palette. Cold and solid for proponents, warm and dashed for opponents; markers tell lines apart without
# colour. The heat maps' blue and red agree with it.
PROPONENT = [("#0072B2", "-", "o"), ("#56B4E9", "-", "s"), ("#009E73", "-", "^")]
OPPONENT = [("#D55E00", "--", "v"), ("#E69F00", "--", "D"), ("#CC79A7", "--", "X")]
NEUTRAL = "#444444"


@dataclass(frozen=True)
class Block:
    """A part of a legend under its own heading."""

    heading: str
    handles: list[Any]
    names: list[str]


def draw_examples(
    ax: Axes, heading: str, one: Scores, totals: Iterator[str], styles: list[_Style], texts: Sequence[str] | None
) -> Block:
    """A line for each training example; its entry gives its total and its text."""
    block = Block(heading, [], [])
    for rank, (index, n_steps) in enumerate(zip(one.indices, one.n_steps, strict=True)):
        values, errors = one.trajectories[rank, :n_steps], 2 * one.errors[rank, :n_steps]
        block.handles.append(draw_line(ax, values, values - errors, values + errors, styles, rank))
        total = next(totals) + "  "
        block.names.append(total + named(int(index), texts, legend_room(ax) - text_width(total)))
    return block


def draw_line(ax: Axes, values: Array, low: Array, high: Array, styles: list[_Style], rank: int) -> Line2D:
    """One line over steps with its band. Ranks that repeat a colour get another, hollow marker."""
    colour, dash, _ = styles[rank % len(styles)]
    again = rank // len(styles)
    steps = np.arange(1.0, len(values) + 1)
    if len(values) > 1:
        band(ax, steps, low, high, colour, 0.18)
    else:  # one step is no line, and its band would have no width: bars, moved apart
        steps += 0.06 * (rank + 0.5) * (-1 if styles is OPPONENT else 1)
        ax.vlines(steps, low, high, color=colour, linewidth=1)
    (line,) = ax.plot(
        steps, values, color=colour, linestyle=dash, linewidth=1.2, marker=styles[(rank + again) % len(styles)][2],
        markersize=3.5, markerfacecolor="white" if again % 2 else colour, markevery=max(1, round(len(values) / 10)),
    )  # fmt: skip
    return line


def band(ax: Axes, steps: Array, low: Array, high: Array, colour: str, alpha: float) -> None:
    """Nothing where scores are exact."""
    if (high > low).any():
        ax.fill_between(steps, low, high, color=colour, alpha=alpha, linewidth=0)


def finish_lines(ax: Axes, steps: int, label: str) -> None:
    """The axes of influence over loop steps."""
    ax.spines[["top", "right"]].set_visible(False)
    step_axis(ax, steps)
    pad = 0.6 if steps == 1 else 0.03 * (steps - 1)
    ax.set_xlim(1 - pad, steps + pad)
    ax.axhline(0, color=NEUTRAL, linewidth=0.6, zorder=0)
    drawn = max(abs(bound) for bound in ax.dataLim.intervaly)
    if drawn == 0:
        ax.set_ylim(-1, 1)
    ax.set_ylabel(scale(ax.yaxis, drawn, label), fontsize=FONT, linespacing=1.1)


def legend_height(counts: Sequence[int], stacked: bool) -> float:
    """Inches for blocks with so many entries, below each other or side by side."""
    rows = [count + 1 for count in counts if count]
    return 0.14 * (sum(rows) if stacked else max(rows, default=0))


def legend_room(ax: Axes) -> float:
    """Points for the words of an entry, beside its line."""
    return points(ax)[0] * (1.0 if has_layout(ax) else 0.6) - 26


def legend(ax: Axes, blocks: Sequence[Block], stacked: bool) -> None:
    """Below the picture where a layout engine makes room for it, else inside."""
    blocks = [block for block in blocks if block.names]
    rows = 0 if stacked else max(len(block.names) for block in blocks)
    blank = Line2D([], [], linestyle="none")
    handles, names = [], []
    for block in blocks:
        # A legend fills its columns one after the other, in equal parts.
        padding = max(0, rows - len(block.names))
        heading = [block.heading] if block.heading else []
        names += [*heading, *block.names, *[" "] * padding]
        handles += [*[blank] * len(heading), *block.handles, *[blank] * padding]
    style: dict[str, Any] = {"loc": "best", "framealpha": 0.85}
    if has_layout(ax):
        below = ax.transAxes + ScaledTranslation(0, -28 / 72, ax.figure.dpi_scale_trans)
        style = {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": below}
        style |= {"borderaxespad": 0, "frameon": False}
    style |= {"fontsize": SMALL, "borderpad": 0.2, "ncols": 1 if stacked else len(blocks)}
    ax.legend(handles, names, handlelength=2.2, labelspacing=0.25, columnspacing=1.5, **style)
