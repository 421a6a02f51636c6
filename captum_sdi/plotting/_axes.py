"""Axes for one column of a paper: their size, steps, scale, title and labels of rows."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.ticker import FuncFormatter

from captum_sdi.plotting._text import FONT, SMALL, clip

_COLUMN = 3.4  # inches: one column of a two-column paper


def axes(ax: Axes | None, height: float) -> Axes:
    """The given Axes, or that of a new figure of column width."""
    if ax is None:
        ax = plt.subplots(figsize=(_COLUMN, height), layout="constrained")[1]
    return small_print(ax)


def small_print(ax: Axes) -> Axes:
    """Thin lines and small numbers."""
    ax.tick_params(labelsize=SMALL, width=0.6, length=2.5)
    ax.grid(False)
    ax.spines[:].set_linewidth(0.6)
    return ax


def has_layout(ax: Axes) -> bool:
    """Whether an engine makes room for labels and legends."""
    return ax.figure.get_layout_engine() is not None


def points(ax: Axes) -> tuple[float, float]:
    """Width and height in points; the Axes as it is now, which a layout engine may still change a little."""
    return ax.bbox.width / ax.figure.dpi * 72, ax.bbox.height / ax.figure.dpi * 72


def set_title(ax: Axes, words: str | None, default: str, taken: float = 0.0) -> None:
    """At the left edge of the picture, whose labels will take ``taken`` points of its width."""
    room = points(ax)[0] - max(0.0, taken - 20)
    ax.set_title(clip(default if words is None else words, room, FONT), fontsize=FONT, loc="left")


def step_axis(ax: Axes, steps: int) -> None:
    """Numbers the steps from 1, as many as fit."""
    number(ax.xaxis, steps, max(3, int(points(ax)[0] / 17)))
    ax.set_xlabel("loop step", fontsize=FONT)


def number(axis: XAxis | YAxis, count: int, most: int, at: int = 1) -> None:
    """Labels 1, standing ``at`` a place, and about ``most`` multiples of a round stride, the last one if possible."""
    strides = sorted([base * 10**power for power in range(9) for base in (1, 2, 4, 5, 8)] + [16, 32])
    fitting = [stride for stride in strides if count / stride <= most]
    stride = next((stride for stride in fitting if count % stride == 0 and stride <= 2 * fitting[0]), fitting[0])
    ticks = np.array([1, *range(max(stride, 2), count + 1, stride)])
    axis.set_ticks(ticks - 1 + at, [str(tick) for tick in ticks])


def scale(axis: XAxis | YAxis, largest: float, label: str) -> str:
    """Divides long tick labels by a power of ten, and gives the label "what (unit)" with this factor in it."""
    # Matplotlib's own factor, at the end of the axis, collides with titles and labels.
    power = 0 if largest == 0 or 1e-2 < largest < 1e4 else max(-300, int(np.floor(np.log10(largest))))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10.0**power:.4g}".replace("-", "−")))
    if not power:
        return label
    factor = f"$\\times 10^{{{power}}}$"
    return label.replace(")", f", {factor})") if ")" in label else f"{label}\n({factor})"


def label_room(ax: Axes) -> float:
    """Points for labels left of an Axes: some of its width, or of the margin that is there."""
    width = points(ax)[0]
    if has_layout(ax):
        return 0.42 * width
    return max(20.0, min(ax.bbox.x0 / ax.figure.dpi * 72 - 20, 0.2 * width))


def label_rows(ax: Axes, names: list[str], bold: Sequence[int] = ()) -> None:
    """One label per row, smaller where rows are close."""
    ax.set_yticks(np.arange(len(names)), names, fontsize=min(SMALL, 0.9 * points(ax)[1] / len(names)))
    ax.tick_params(axis="y", length=0)
    for row in bold:
        ax.get_yticklabels()[row].set_fontweight("bold")
