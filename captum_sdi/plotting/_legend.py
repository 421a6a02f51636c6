"""The legend that names lines: in blocks, below the picture where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from captum_sdi.plotting._axes import has_layout, width_in_points
from captum_sdi.plotting._text import SMALL, clip, text_width


@dataclass(frozen=True)
class LegendBlock:
    """A part of a legend under its own heading."""

    heading: str = ""
    handles: list[Any] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, handle: Any, name: str) -> None:
        """Add an entry: what was drawn, and its name."""
        self.handles.append(handle)
        self.names.append(name)


def legend_height(counts: Sequence[int], *, stacked: bool) -> float:
    """Return the inches that blocks of these entries take, below each other or side by side."""
    rows = [count + 1 for count in counts if count]
    longest = sum(rows) if stacked else max(rows, default=0)
    return 0.14 * longest


def total_entry(ax: Axes, total: str, name: str) -> str:
    """Return the words of an entry: a total and, as far as there is room, the name."""
    total += "  "
    room = _entry_room(ax) - text_width(total)
    return total + clip(name, room)


def count_entry(ax: Axes, name: str, count: int) -> str:
    """Return the words of an entry, as far as there is room: a group's name and how many it has."""
    return clip(f"{name} ({count})", _entry_room(ax))


def _entry_room(ax: Axes) -> float:
    """Return the points for the words of an entry, beside its line."""
    width = width_in_points(ax)
    usable = width if has_layout(ax) else 0.6 * width
    return usable - 26


def draw_legend(ax: Axes, blocks: Sequence[LegendBlock], *, stacked: bool) -> None:
    """Draw a legend of blocks, below each other or side by side, without the empty ones."""
    blocks = [block for block in blocks if block.names]
    longest = max(len(block.names) for block in blocks)
    blank = Line2D([], [], linestyle="none")
    handles: list[Any] = []
    names: list[str] = []
    for block in blocks:
        if block.heading:
            handles.append(blank)
            names.append(block.heading)
        handles += block.handles
        names += block.names
        if not stacked:
            # A legend fills its columns one after the other, in equal parts.
            padding = longest - len(block.names)
            handles += [blank] * padding
            names += [" "] * padding
    ax.legend(
        handles,
        names,
        ncols=1 if stacked else len(blocks),
        fontsize=SMALL,
        borderpad=0.2,
        handlelength=2.2,
        labelspacing=0.25,
        columnspacing=1.5,
        **_placement(ax),
    )


def _placement(ax: Axes) -> dict[str, Any]:
    """Return where a legend stands: below the picture if a layout makes room, else inside."""
    if not has_layout(ax):
        return {"loc": "best", "framealpha": 0.85}
    downwards = ScaledTranslation(0, -28 / 72, ax.figure.dpi_scale_trans)
    anchor = {"bbox_to_anchor": (0, 0), "bbox_transform": ax.transAxes + downwards}
    return {"loc": "upper left", "borderaxespad": 0, "frameon": False, **anchor}
