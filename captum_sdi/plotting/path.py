"""The path through a loop: which link of a chain is the strongest at which step."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from torch import Tensor

from captum_sdi.plotting._arguments import Array, finite_array
from captum_sdi.plotting._axes import COLUMN, checked_width, number_steps, number_ticks, small_print
from captum_sdi.plotting._text import FONT, SMALL, clip

DARK = 0.6
"""From here on a cell is so dark that its number is white."""


def plot_path(
    shares: Mapping[str, ArrayLike | Tensor],
    *,
    title: str | None = None,
    width: float | None = None,
) -> Axes:
    """Draw in which share of questions the example of hop j is the strongest at loop step t.

    A model that uses one example after the other has a diagonal. ``shares`` maps the name of each panel, such as
    "trained", to ``(j, t)``. The other arguments are described in `captum_sdi.plotting`; it makes a figure of its own.

    Returns:
        The Axes of the first panel; ``ax.figure.axes`` has all of them.

    Raises:
        ValueError: If there is no panel, or one is no matrix of numbers from 0 to 1.

    Example:
        >>> ax = plot_path({"trained": [[1.0, 0.0], [0.25, 0.75]], "untrained": [[0.5, 0.25], [0.0, 0.5]]})
        >>> [text.get_text() for text in ax.texts]
        ['1', '.00', '.25', '.75']
        >>> plt.close(ax.figure)
    """
    panels = {name: checked_shares(name, values) for name, values in shares.items()}
    if not panels:
        raise ValueError("shares names no panel; pass such as {'trained': shares}.")
    inches = checked_width(width) or COLUMN
    size = (inches, 0.5 + inches / len(panels))
    figure, grid = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
    room = 72 * inches / len(panels) - 10
    for ax, (name, values) in zip(grid[0], panels.items(), strict=True):
        draw_shares(ax, values)
        ax.set_title(clip(name, room), fontsize=FONT, loc="left")
    first: Axes = grid[0, 0]
    first.set_ylabel("example of hop", fontsize=FONT)
    heading = "share of questions in which it is the strongest" if title is None else title
    figure.suptitle(clip(heading, 72 * inches - 20), fontsize=FONT, x=0.02, ha="left")
    return first


def checked_shares(name: str, values: ArrayLike | Tensor) -> Array:
    """Return a panel's shares as an array, (j, t).

    Raises:
        ValueError: If they are no matrix of numbers from 0 to 1.
    """
    numbers = finite_array("shares", values)
    if numbers.ndim != 2 or not numbers.size or numbers.min() < 0 or numbers.max() > 1:
        raise ValueError(
            f"shares[{name!r}] must be a matrix (hops, loop steps) of numbers from 0 to 1, got shape {numbers.shape}."
        )
    return numbers


def draw_shares(ax: Axes, values: Array) -> None:
    """Draw one panel, (j, t), the first hop on top, with a number in each cell."""
    n_hops, n_steps = values.shape
    small_print(ax)
    ax.imshow(values, cmap="Blues", vmin=0, vmax=1, extent=(0.5, n_steps + 0.5, n_hops - 0.5, -0.5))
    for hop in range(n_hops):
        for step in range(n_steps):
            share = values[hop, step]
            number = "1" if share == 1 else f"{share:.2f}".removeprefix("0")
            colour = "white" if share > DARK else "black"
            ax.text(step + 1, hop, number, ha="center", va="center", fontsize=SMALL, color=colour)
    number_steps(ax, n_steps)
    number_ticks(ax.yaxis, n_hops, n_hops, first_at=0)
