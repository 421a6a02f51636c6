"""Axes for one column of a paper: their size, steps, scale, title and labels of rows."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import FuncFormatter

from captum_sdi.plotting._text import FONT, SMALL, clip, text_width

COLUMN = 3.4  # inches: one column of a two-column paper
_LABELS = 0.42  # the share of a picture's width that labels of rows may take
_MOST_WRAPPED = 20  # rows: with more of them, names have one line
_BOLD = 1.15  # how much wider bold type is
_SPACING = ("left", "right", "bottom", "top", "wspace", "hspace")
_POWERS = 10 ** np.arange(9)
_ROUND = np.outer(_POWERS, [1, 2, 4, 5, 8])
_STRIDES = np.union1d(_ROUND, [16, 32])


def column_axes(ax: Axes | None, height: float, width: float | None = None) -> Axes:
    """Return the given Axes, or that of a new figure of this size in inches; None: as wide as a column."""
    inches = checked_width(width) or COLUMN
    if ax is None:
        _, ax = plt.subplots(figsize=(inches, height), layout="constrained")
    make_room(ax)
    return small_print(ax)


def make_room(ax: Axes) -> None:
    """Let a layout engine make room in a plain grid of subplots, whose spacing nobody has set."""
    figure = ax.figure.figure  # that of a part of a figure, too
    if has_layout(ax) or ax.get_subplotspec() is None or not isinstance(figure, Figure):
        return
    usual = Figure().subplotpars
    if all(getattr(figure.subplotpars, name) == getattr(usual, name) for name in _SPACING):
        figure.set_layout_engine("constrained")


def divided(
    ax: Axes,
    shape: tuple[int, int],
    count: int,
    widths: Sequence[float] | None = None,
    gap: float = 0.1,
) -> list[Axes]:
    """Divide an Axes into a grid of Axes that share their rows' scale, whether or not it sits in one.

    Args:
        ax: It becomes the first of them.
        shape: Rows and columns.
        count: How many of its places are taken, row by row.
        widths: Of the columns, in any unit; None: all the same.
        gap: Between columns, as a share of their mean width.

    Returns:
        The Axes, row by row.
    """
    subplot, figure = ax.get_subplotspec(), ax.figure
    places = range(1, count)
    if subplot is not None:
        grid = subplot.subgridspec(*shape, width_ratios=widths, wspace=gap)
        ax.set_subplotspec(grid[0])
        return [ax, *(figure.add_subplot(grid[place], sharey=ax) for place in places)]
    corners = ax.get_position()
    outline = {"left": corners.x0, "right": corners.x1, "bottom": corners.y0, "top": corners.y1}
    spaced = GridSpec(*shape, width_ratios=widths, wspace=gap, hspace=0.8, **outline)
    bounds = [spaced[place].get_position(figure.figure).bounds for place in range(count)]
    ax.set_position(bounds[0])
    return [ax, *(figure.add_axes(bounds[place], sharey=ax) for place in places)]


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


def number_steps(ax: Axes, n_steps: int, taken: float = 0.0) -> None:
    """Label the x axis with as many step numbers, from 1, as fit beside labels that take so many points."""
    fitting = int((width_in_points(ax) - taken) / 17)
    number_ticks(ax.xaxis, n_steps, max(3, fitting))
    ax.set_xlabel("loop step", fontsize=FONT)


def note_below(ax: Axes, note: str) -> None:
    """Add a note in brackets to the name of the x axis."""
    name, _, earlier = ax.get_xlabel().rstrip(")").partition(" (")
    notes = [earlier, note] if earlier else [note]
    ax.set_xlabel(f"{name} ({'; '.join(notes)})", fontsize=SMALL if earlier else FONT)


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


def row_height(names: Sequence[str], width: float | None) -> float:
    """Return the inches that a row of a new figure takes, twice as many where a few rows have long names."""
    room = _LABELS * 72 * (width or COLUMN)
    is_long = any(text_width(name) > room for name in names)
    return 0.25 if is_long and len(names) <= _MOST_WRAPPED else 0.135


def label_room(ax: Axes) -> float:
    """Return the points that labels may take: a share of the width, or of the margin there is."""
    width = width_in_points(ax)
    if has_layout(ax):
        return _LABELS * width
    margin = _in_points(ax, ax.bbox.x0) - 20
    return max(20.0, min(margin, 0.2 * width))


def label_rows(
    ax: Axes,
    names: Sequence[str],
    room: float,
    bold: Sequence[int] = (),
) -> None:
    """Label each row within so many points, on two lines where rows are high, in smaller letters where they are close.

    Args:
        ax: Of as many rows as there are names.
        names: Of the rows.
        room: The width of a label, in points.
        bold: Rows whose names are headings.
    """
    n_rows = len(names)
    height = 0.9 * height_in_points(ax) / n_rows
    lines = 2 if height >= 2.1 * SMALL else 1
    labels = []
    for row, name in enumerate(names):
        own_room = room / _BOLD if row in bold else room
        labels.append(clip(name, own_room, lines=lines))
    ax.set_yticks(np.arange(n_rows), labels, fontsize=min(SMALL, height), linespacing=1.0)
    ax.tick_params(axis="y", length=0)
    written = ax.get_yticklabels()
    for row in bold:
        written[row].set_fontweight("bold")
