"""Heat maps over loop steps: of training examples, and of their own loop steps."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from torch import Tensor

from captum_sdi.plotting import _axes
from captum_sdi.plotting._scores import Array, Result, array, position, ranked, read
from captum_sdi.plotting._text import FONT, named, text_width


def plot_heatmap(
    result: Result,
    test: int = 0,
    *,
    train: Sequence[int] | None = None,
    k: int | None = None,
    sort: str = "total",
    texts: Sequence[str] | None = None,
    limit: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws influence on one test example as a heat map, training examples by loop steps.

    Rows are sorted by "total", largest first, or by the "step" at which an example is strongest, which shows groups
    that act early and late. Rows too many to be named are counted instead. ``k=None`` draws all training examples in
    ``result``. The other arguments are described in `captum_sdi.plotting`.

    Returns:
        The Axes.

    Raises:
        ValueError: ``sort`` is something else.

    Example:
        >>> from matplotlib.figure import Figure
        >>> trajectories = [[0.5, 0.25], [-0.5, -1.0], [2.0, 0.1]]  # (n, t) = (3, 2)
        >>> ax = plot_heatmap(trajectories, ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['#2', '#0', '#1']
    """
    if sort not in ("total", "step"):
        raise ValueError(f'sort must be "total" or "step", got {sort!r}.')
    check_limit(limit)
    one = read(result, texts).of(test, train)
    one = one.at(ranked(one.totals, k))
    if sort == "step":
        sizes = np.abs(one.trajectories)
        one = one.at(np.lexsort((-sizes.max(1), sizes.argmax(1))))
    rows = len(one.totals)
    ax = _axes.axes(ax, max(2.1, 0.7 + 0.135 * rows) if rows <= 40 else 2.8)
    room = _axes.label_room(ax)
    draw_heatmap(ax, one.trajectories[:, : one.n_steps[0]], limit)
    if _axes.points(ax)[1] / rows >= 6:
        _axes.label_rows(ax, [named(int(index), texts, room) for index in one.indices])
    else:
        room = 20
        _axes.number(ax.yaxis, rows, 6, at=0)
    by = ", by total" if sort == "total" else ",\nby strongest step"
    ax.set_ylabel(f"train examples{by}", fontsize=FONT, linespacing=1.1)
    _axes.set_title(ax, title, f"test example {test}", taken=room)
    return ax


def plot_step_matrix(
    matrix: ArrayLike | Tensor,
    pair: tuple[int, int] | None = None,
    *,
    limit: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws which loop step of the training example acts on which loop step of the test example.

    ``matrix`` is ``(s, t)``, or ``(q, n, s, t)`` as `SDIInfluence.step_matrix` returns it; ``pair`` then picks the
    positions (test, train), None the mean over all pairs. The rest is described in `captum_sdi.plotting`.

    Returns:
        The Axes: train steps upwards, test steps to the right; a column sums to one point of the trajectory.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_step_matrix([[1.0, 0.0], [0.5, -0.5]], ax=Figure().subplots())
        >>> ax.get_xlabel(), ax.get_images()[0].get_clim()
        ('loop step of the test example', (-1.0, 1.0))
    """
    values, default = _one_matrix(array("matrix", matrix), pair)
    check_limit(limit)
    ax = _axes.axes(ax, 2.7)
    draw_heatmap(ax, values, limit)
    rows, columns = values.shape
    lost = 0.0
    if rows == columns:
        ax.set_aspect("equal")
        width, height = _axes.points(ax)
        lost = max(0.0, width - height)
    ax.set_ylim(-0.5, rows - 0.5)  # step 1 at the bottom, as on every other axis
    _axes.number(ax.yaxis, rows, 10, at=0)
    ax.set_xlabel("loop step of the test example", fontsize=FONT)
    ax.set_ylabel("loop step of the train example", fontsize=FONT)
    _axes.set_title(ax, title, default, taken=20 + lost)
    return ax


def _one_matrix(values: Array, pair: tuple[int, int] | None) -> tuple[Array, str]:
    """The (s, t) matrix that is asked for, and what it is."""
    if values.ndim not in (2, 4) or not values.size:
        raise ValueError(
            f"matrix must be (s, t) or (q, n, s, t) with no empty axis, got shape {values.shape}. Pass what "
            "SDIInfluence.step_matrix returned, or one pair of it."
        )
    if values.ndim == 2 and pair is not None:
        raise ValueError(f"pair={pair} picks from (q, n, s, t), but matrix is (s, t). Leave pair out.")
    if pair is None:
        pairs = values.reshape(-1, *values.shape[-2:])
        return pairs.mean(0), f"mean of {len(pairs)} pairs" if len(pairs) > 1 else ""
    if isinstance(pair, int) or len(pair) != 2:
        raise ValueError(f"pair must be two positions, (test, train), got {pair!r}.")
    test, train = (position("pair", i, size) for i, size in zip(pair, values.shape[:2], strict=True))
    return values[test, train], f"test example {test}, train position {train}"


def check_limit(limit: float | None) -> None:
    """Colours need a positive one."""
    if limit is not None and not (np.isfinite(limit) and limit > 0):
        raise ValueError(f"limit must be a positive number or None, got {limit!r}.")


def draw_heatmap(ax: Axes, values: Array, limit: float | None) -> None:
    """Rows as they come, the first on top; columns at 1..t, NaN did not run; colours symmetric about zero."""
    largest = float(np.nanmax(np.abs(values)))
    bound = float(limit or largest or 1.0)  # all zero: the colour of zero, on a scale that has a centre
    rows, steps = values.shape
    image = ax.imshow(
        np.ma.masked_invalid(values),
        cmap=matplotlib.colormaps["RdBu"].with_extremes(bad="0.82"),  # no diverging map contains grey
        vmin=-bound,
        vmax=bound,
        aspect="auto",
        extent=(0.5, steps + 0.5, rows - 0.5, -0.5),
    )
    width, height = _axes.points(ax)
    # 6 points wide; the fraction leaves it room, or it would be shorter than the picture.
    room, extend = min(0.3, 12 / width), "both" if largest > bound else "neither"
    bar = ax.figure.colorbar(image, ax=ax, fraction=room, aspect=max(5.0, height / 6), pad=0.03, extend=extend)
    _axes.small_print(bar.ax)
    label = _axes.scale(bar.ax.yaxis, bound, "influence\n(drop in test loss)")
    if text_width(label.replace("\n", " "), FONT) <= height:
        label = label.replace("\n", " ")
    bar.set_label(label, fontsize=FONT, linespacing=1.1)
    _axes.step_axis(ax, steps)
