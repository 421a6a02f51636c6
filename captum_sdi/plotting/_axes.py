"""Axes for one column of a paper: their size, steps, scale, title and labels of rows."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.ticker import FuncFormatter

from captum_sdi.plotting._text import FONT, SMALL, clip

COLUMN = 3.4  # inches: one column of a two-column paper
_POWERS = 10 ** np.arange(9)
_ROUND = np.outer(_POWERS, [1, 2, 4, 5, 8])
_STRIDES = np.union1d(_ROUND, [16, 32])


def column_axes(ax: Axes | None, height: float, width: float | None = None) -> Axes:
    """Return the given Axes, or that of a new figure of this size in inches; None: as wide as a column."""
    inches = checked_width(width) or COLUMN
    if ax is None:
        _, ax = plt.subplots(figsize=(inches, height), layout="constrained")
    return small_print(ax)


def checked_width(width: float | None) -> float | None:
    """Return a width in inches, or None for one column.

    Raises:
        ValueError: If it is below 1 or above 100.
    """
    if width is not None and not 1 <= width <= 100:
        raise ValueError(f"width must be from 1 to 100 inches, or None for one column ({COLUMN}); got {width!r}.")
    return width


def small_print(ax: Axes) -> Axes:
    """Give an Axes thin lines and small numbers."""
    ax.tick_params(labelsize=SMALL, width=0.6, length=2.5)
    ax.grid(visible=False)
    ax.spines[:].set_linewidth(0.6)
    return ax


def hide_spines(ax: Axes, *sides: str) -> None:
    """Hide the border on some sides."""
    ax.spines[list(sides)].set_visible(b=False)


def has_layout(ax: Axes) -> bool:
    """Tell whether a layout engine makes room for labels and legends."""
    return ax.figure.get_layout_engine() is not None


def width_in_points(ax: Axes) -> float:
    """Return the present width, which a layout engine may still change a little."""
    return _in_points(ax, ax.bbox.width)


def height_in_points(ax: Axes) -> float:
    """Return the present height, which a layout engine may still change a little."""
    return _in_points(ax, ax.bbox.height)


def _in_points(ax: Axes, pixels: float) -> float:
    return pixels / ax.figure.dpi * 72


def set_title(
    ax: Axes,
    title: str | None,
    default: str,
    taken: float = 0.0,
) -> None:
    """Set the title above the left edge of a picture whose labels take ``taken`` points."""
    if title is None:
        title = default
    beside_picture = max(0.0, taken - 20)
    room = width_in_points(ax) - beside_picture
    ax.set_title(clip(title, room, FONT), fontsize=FONT, loc="left")


def number_steps(ax: Axes, n_steps: int) -> None:
    """Label the x axis with as many step numbers, from 1, as fit."""
    fitting = int(width_in_points(ax) / 17)
    number_ticks(ax.xaxis, n_steps, max(3, fitting))
    ax.set_xlabel("loop step", fontsize=FONT)


def number_ticks(
    axis: XAxis | YAxis,
    count: int,
    max_ticks: int,
    first_at: int = 1,
) -> None:
    """Label 1, which stands at ``first_at``, and the multiples of a round stride to ``count``."""
    stride = _round_stride(count, max_ticks)
    multiples = range(max(stride, 2), count + 1, stride)
    numbers = np.array([1, *multiples])
    labels = [str(number) for number in numbers]
    axis.set_ticks(numbers - 1 + first_at, labels)


def _round_stride(count: int, max_ticks: int) -> int:
    """Return a stride of at most ``max_ticks`` multiples, preferring one that divides the count."""
    fitting = _STRIDES[count / _STRIDES <= max_ticks]
    smallest = fitting[0]
    for stride in fitting:
        if count % stride == 0 and stride <= 2 * smallest:
            return int(stride)
    return int(smallest)


def scale_ticks(axis: XAxis | YAxis, largest: float, label: str) -> str:
    """Divide long tick labels by a power of ten, and return the label with this factor in it."""
    # Matplotlib's own factor, at the end of the axis, collides with titles and labels.
    exponent = 0
    if largest != 0 and not 1e-2 < largest < 1e4:
        exponent = int(np.floor(np.log10(largest)))
        exponent = max(-300, exponent)

    def divided(value: float, _: int | None) -> str:
        label = f"{value / 10.0**exponent:.4g}"
        return label.replace("-", "−")

    axis.set_major_formatter(FuncFormatter(divided))
    if exponent == 0:
        return label
    factor = f"$\\times 10^{{{exponent}}}$"
    if ")" in label:
        return label.replace(")", f", {factor})")
    return f"{label}\n({factor})"


def label_room(ax: Axes) -> float:
    """Return the points that labels may take: a share of the width, or of the margin there is."""
    width = width_in_points(ax)
    if has_layout(ax):
        return 0.42 * width
    margin = _in_points(ax, ax.bbox.x0) - 20
    return max(20.0, min(margin, 0.2 * width))


def label_rows(ax: Axes, names: list[str], bold: Sequence[int] = ()) -> None:
    """Label each row, in smaller letters where rows are close."""
    n_rows = len(names)
    row_height = 0.9 * height_in_points(ax) / n_rows
    ax.set_yticks(np.arange(n_rows), names, fontsize=min(SMALL, row_height))
    ax.tick_params(axis="y", length=0)
    labels = ax.get_yticklabels()
    for row in bold:
        labels[row].set_fontweight("bold")
