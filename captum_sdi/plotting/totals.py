"""Totals as bars, beside the trajectories that they are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from captum_sdi.plotting._axes import axes, label_room, label_rows, points, scale, set_title, small_print
from captum_sdi.plotting._lines import NEUTRAL, OPPONENT, PROPONENT
from captum_sdi.plotting._scores import Array, Positions, Result, check_texts, positions, ranked, read
from captum_sdi.plotting._text import FONT, clip, named
from captum_sdi.plotting.heatmaps import check_limit, draw_heatmap

_BOLD = 1.15  # how much wider bold type is


def plot_totals(
    result: Result,
    tests: Sequence[int] | None = None,
    *,
    train: Sequence[int] | None = None,
    k: int = 2,
    texts: Sequence[str] | None = None,
    test_texts: Sequence[str] | None = None,
    limit: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws totals as bars and, beside them, the trajectories they are made of.

    ``tests`` are positions of test examples, None = all; ``test_texts`` all test examples of ``result`` as text. ``ax``
    is divided into two, bars and heat map. The other arguments are described in `captum_sdi.plotting`.

    Returns:
        The Axes of the bars; ``ax.figure.axes[-2]`` is that of the heat map. Steps that a test example did not run are
        grey.

    Raises:
        ValueError: There are more rows than can be read.

    Example:
        >>> from matplotlib.figure import Figure
        >>> trajectories = [[[0.5, 0.25], [-0.5, -1.0]], [[1.0, 1.0], [2.0, 0.0]]]  # (q, n, t)
        >>> ax = plot_totals(trajectories, k=1, ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['test 0', '#0', '#1', 'test 1', '#0']
    """
    scores = read(result, texts)
    chosen = positions("tests", tests, len(scores.totals)).tolist()
    check_texts("test_texts", test_texts, len(scores.totals))
    check_limit(limit)
    groups = [scores.of(test, train) for test in chosen]
    groups = [one.at(ranked(one.totals, k if train is None else None)) for one in groups]
    rows = sum(1 + len(one.totals) for one in groups)
    if rows > 80:
        raise ValueError(
            f"tests and k ask for {rows} rows, more than can be read (80). Pass fewer tests or a smaller k."
        )

    ax = axes(ax, max(2.2, 0.85 + 0.135 * rows))
    room = label_room(ax)
    bars, heat = _split(ax)
    steps = np.arange(scores.trajectories.shape[2])
    cells = np.zeros((rows, len(steps)))
    names: list[str] = []
    headings, places = [], []
    for test, one in zip(chosen, groups, strict=True):
        headings.append(len(names))
        words = f"test {test}" + (f": {test_texts[test]}" if test_texts is not None else "")
        names.append(clip(words, room / _BOLD))
        places.append(np.arange(len(names), len(names) + len(one.totals)))
        names += [named(int(index), texts, room) for index in one.indices]
        cells[places[-1]] = np.where(steps < one.n_steps[:, None], one.trajectories, np.nan)
    totals, errors = (np.concatenate([getattr(one, of) for one in groups]) for of in ("totals", "total_errors"))
    _draw_bars(bars, np.concatenate(places), totals, 2 * errors, scores.has_ends)
    draw_heatmap(heat, cells, limit)
    for row in headings:  # zero has almost, but not quite, the background's colour
        heat.axhspan(row - 0.5, row + 0.5, color=heat.get_facecolor(), linewidth=0)
    heat.tick_params(left=False, labelleft=False)
    heat.spines[:].set_visible(False)
    bars.set_ylim(rows - 0.5, -0.5)  # the first row on top
    label_rows(bars, names, bold=headings)
    bars.set_ylabel("train examples", fontsize=FONT)
    set_title(bars, title, "", taken=room - points(heat)[0])
    return bars


def _draw_bars(ax: Axes, places: Positions, totals: Array, errors: Array, has_ends: bool) -> None:
    ax.barh(places, totals, height=0.7, color=np.where(totals >= 0, PROPONENT[0][0], OPPONENT[0][0]))
    if errors.any():
        ax.errorbar(totals, places, xerr=errors, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
    ax.axvline(0, color=NEUTRAL, linewidth=0.6)
    if not totals.any() and not errors.any():
        ax.set_xlim(-1, 1)
    ax.spines[["left", "top", "right"]].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 3, 5, 10]))
    label = "total with\nprelude, coda" if has_ends else "total"
    ax.set_xlabel(scale(ax.xaxis, np.abs(totals).max() + errors.max(), label), fontsize=FONT)


def _split(ax: Axes) -> tuple[Axes, Axes]:
    """Divides an Axes into two that share rows, whether or not it sits in a grid of subplots."""
    bars, heat = ratios = (1.0, 1.7)
    if (place := ax.get_subplotspec()) is not None:
        grid = place.subgridspec(1, 2, width_ratios=ratios, wspace=0.05)
        ax.set_subplotspec(grid[0])
        other = ax.figure.add_subplot(grid[1], sharey=ax)
    else:
        left, bottom, width, height = ax.get_position().bounds
        unit = width / (bars + heat + 0.1)
        ax.set_position((left, bottom, unit * bars, height))
        other = ax.figure.add_axes((left + width - unit * heat, bottom, unit * heat, height), sharey=ax)
    return ax, small_print(other)
