"""Numbers as colours: rows by loop steps, with a colour bar."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from captum_sdi.plotting._arguments import Array
from captum_sdi.plotting._axes import height_in_points, number_steps, scale_ticks, small_print, width_in_points
from captum_sdi.plotting._text import FONT, text_width

_OUTLYING = 4.0
"""How many times as large as the 95th percentile a value is that may not set the colours of all others."""


def draw_colours(
    ax: Axes,
    values: Array,
    limit: float | None,
    taken: float = 0.0,
    label: str = "influence",
) -> None:
    """Draw ``(rows, t)``, the first row on top, in colours symmetric about zero; labels take so many points."""
    draw_cells(ax, values, limit, label)
    number_steps(ax, values.shape[1], taken)


def draw_cells(
    ax: Axes,
    values: Array,
    limit: float | None,
    label: str = "influence",
) -> None:
    """Draw ``(rows, columns)``, the first row on top and columns from 1 on, in colours symmetric about zero.

    NaN, a step that did not run, is grey: no diverging colour map contains it. Values beyond the limit are marked with
    a dot, which the colour bar explains.
    """
    bound = float(limit or robust_bound(values) or 1.0)  # all zero: the colour of zero, on a scale that has a centre
    n_rows, n_columns = values.shape
    image = ax.imshow(
        np.ma.masked_invalid(values),
        cmap=matplotlib.colormaps["RdBu"].with_extremes(bad="0.82"),
        vmin=-bound,
        vmax=bound,
        aspect="auto",
        extent=(0.5, n_columns + 0.5, n_rows - 0.5, -0.5),
    )
    with np.errstate(invalid="ignore"):
        rows, columns = np.nonzero(np.abs(values) > bound)
    if len(rows):
        ax.scatter(columns + 1, rows, s=4, color="white", linewidths=0)
    _draw_colour_bar(ax, image, bound, label, exceeded=bool(len(rows)))


def robust_bound(values: Array) -> float:
    """Return the largest absolute value, or where a few outliers would hide all others the largest of those."""
    sizes = np.abs(values[np.isfinite(values)])
    largest = float(sizes.max(initial=0))
    if sizes.size < 20:
        second = float(np.partition(sizes, -2)[-2]) if sizes.size >= 5 else 0.0
        return second if largest > 10 * second > 0 else largest
    usual = float(np.quantile(sizes, 0.95))
    if largest <= _OUTLYING * usual or usual == 0:
        return largest
    return float(sizes[sizes <= _OUTLYING * usual].max())


def _draw_colour_bar(
    ax: Axes,
    image: AxesImage,
    bound: float,
    label: str,
    *,
    exceeded: bool,
) -> None:
    """Draw a colour bar 6 points wide, with its label on one line where that fits."""
    height = height_in_points(ax)
    aspect = max(5.0, height / 6)
    fraction = min(0.3, 12 / width_in_points(ax))  # leaves room, or the bar would be shorter than the picture
    colour_bar = ax.figure.colorbar(
        image,
        ax=ax,
        fraction=fraction,
        aspect=aspect,
        pad=0.03,
        extend="both" if exceeded else "neither",
    )
    small_print(colour_bar.ax)
    label = scale_ticks(colour_bar.ax.yaxis, bound, label)
    one_line = label.replace("\n", " ")
    if text_width(one_line, FONT) <= height:
        label = one_line
    if exceeded:
        label += "\ndots: beyond the colours"
    colour_bar.set_label(label, fontsize=FONT, linespacing=1.1)
