"""Mean influence by loop step over groups of pairs, beside that of all pairs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from captum_sdi.plotting._axes import axes, set_title
from captum_sdi.plotting._lines import (
    NEUTRAL,
    OPPONENT,
    PROPONENT,
    Block,
    draw_line,
    finish_lines,
    legend,
    legend_height,
    legend_room,
)
from captum_sdi.plotting._scores import Array, Result, Scores, array, read
from captum_sdi.plotting._text import clip

_STYLES = [style for both in zip(PROPONENT, OPPONENT, strict=True) for style in both]


def plot_groups(
    result: Result, groups: Mapping[str, ArrayLike | Tensor], *, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draws mean influence by loop step over groups of pairs: do they differ from pairs at random?

    ``groups`` are booleans ``(q, n)`` under their names: which training example belongs to which test example. Some
    test examples have far larger losses than others, so all points of one are divided by the mean of their absolute
    values first. The other arguments are described in `captum_sdi.plotting`.

    Returns:
        The Axes. Lines are means over test examples of the mean over each one's pairs, bands two standard errors over
        test examples; the grey one is of all pairs. A test example without a pair in a group is left out of it.

    Raises:
        ValueError: A group is no booleans ``(q, n)``, or empty; or there is none.

    Example:
        >>> from matplotlib.figure import Figure
        >>> trajectories = [[[3.0, -1.0], [1.0, -1.0]]]  # (q, n, t) = (1, 2, 2)
        >>> ax = plot_groups(trajectories, {"odd": [[True, False]]}, ax=Figure().subplots())
        >>> [line.get_ydata().tolist() for line in ax.get_lines()[:2]]
        [[1.3333333333333333, -0.6666666666666666], [2.0, -0.6666666666666666]]
    """
    scores = read(result)
    members = {name: _members(name, group, scores.totals.shape) for name, group in groups.items()}
    if not members:
        raise ValueError("groups is an empty mapping. Pass at least one group, name: booleans (q, n).")
    points = _scaled(scores)

    ax = axes(ax, 2.05 + legend_height([len(members) + 1], True))
    block = Block("", [], [])
    everyone = {"all pairs": np.ones(scores.totals.shape, dtype=bool)}
    for rank, (name, member) in enumerate((everyone | members).items()):
        styles, place = ([(NEUTRAL, ":", "")], 0) if rank == 0 else (_STYLES, rank - 1)
        mean, error = _mean(points, member)
        block.handles.append(draw_line(ax, mean, mean - 2 * error, mean + 2 * error, styles, place))
        block.names.append(clip(f"{name} ({int(member.sum())})", legend_room(ax)))
    finish_lines(ax, points.shape[2], "influence\n(mean size = 1)")
    set_title(ax, title, "")
    legend(ax, [block], True)
    return ax


def _members(name: str, group: ArrayLike | Tensor, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """A group as booleans."""
    flags = array(f"groups[{name!r}]", group)
    if flags.shape != shape or not np.isin(flags, (0, 1)).all():
        raise ValueError(f"groups[{name!r}] must be booleans (q, n) = {shape}, got shape {flags.shape}.")
    if not flags.any():
        raise ValueError(f"groups[{name!r}] marks no pair; leave it out.")
    return flags.astype(bool)


def _scaled(scores: Scores) -> Array:
    """``(q, n, t)``, of mean size 1 for each test example; NaN at steps that it did not run."""
    ran = np.arange(scores.trajectories.shape[2]) < scores.n_steps[..., None]
    points = np.where(ran, scores.trajectories, np.nan)
    sizes = np.nanmean(np.abs(points), axis=(1, 2), keepdims=True)
    return points / np.where(sizes > 0, sizes, 1.0)


def _mean(points: Array, member: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Mean and standard error ``(t,)`` over the test examples that have pairs in the group."""
    rows = [row[mine].mean(0) for row, mine in zip(points, member, strict=True) if mine.any()]
    ran = np.ma.masked_invalid(rows)
    error = ran.std(0, ddof=1) / np.sqrt(ran.count(0))
    return ran.mean(0).filled(np.nan), error.filled(0.0)
