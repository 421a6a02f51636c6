"""Influence between loop steps: of the training example on those of the test example."""

from __future__ import annotations

from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from torch import Tensor

from captum_sdi.plotting._arguments import Array, check_limit, check_position, finite_array
from captum_sdi.plotting._axes import column_axes, height_in_points, number_ticks, set_title, width_in_points
from captum_sdi.plotting._colours import draw_colours
from captum_sdi.plotting._fonts import readable
from captum_sdi.plotting._text import FONT


def plot_step_matrix(
    matrix: ArrayLike | Tensor,
    pair: tuple[int, int] | None = None,
    *,
    limit: float | None = None,
    title: str | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw which loop step of the training example acts on which loop step of the test example.

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
    values, default_title = _pick_matrix(finite_array("matrix", matrix), pair)
    check_limit(limit)
    ax = column_axes(ax, 2.7, width)
    draw_colours(ax, values, limit)
    train_steps, test_steps = values.shape
    margin = 0.0
    if train_steps == test_steps:
        ax.set_aspect("equal")
        margin = max(0.0, width_in_points(ax) - height_in_points(ax))
    ax.set_ylim(-0.5, train_steps - 0.5)  # step 1 at the bottom, as on every other axis
    number_ticks(ax.yaxis, train_steps, 10, first_at=0)
    ax.set_xlabel("loop step of the test example", fontsize=FONT)
    ax.set_ylabel("loop step of the train example", fontsize=FONT)
    set_title(ax, title, default_title, taken=20 + margin)
    return readable(ax)


def _pick_matrix(values: Array, pair: tuple[int, int] | None) -> tuple[Array, str]:
    """Return one (s, t) matrix, of a pair or the mean over pairs, and a title that says which."""
    if values.ndim not in (2, 4) or not values.size:
        raise ValueError(
            f"matrix must be (s, t) or (q, n, s, t) with no empty axis, got shape {values.shape}. Pass what "
            "SDIInfluence.step_matrix returned, or one pair of it."
        )
    if values.ndim == 2 and pair is not None:
        raise ValueError(f"pair={pair} picks from (q, n, s, t), but matrix is (s, t). Leave pair out.")
    if pair is None:
        matrices = values.reshape(-1, *values.shape[-2:])
        n_pairs = len(matrices)
        title = f"mean of {n_pairs} pairs" if n_pairs > 1 else ""
        return matrices.mean(0), title
    if isinstance(pair, int) or len(pair) != 2:
        raise ValueError(f"pair must be two positions, (test, train), got {pair!r}.")
    n_tests, n_train, *_ = values.shape
    test = check_position("pair", pair[0], n_tests)
    train = check_position("pair", pair[1], n_train)
    return values[test, train], f"test example {test}, train position {train}"
