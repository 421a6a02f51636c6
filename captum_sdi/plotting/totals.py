"""Totals as bars, beside the trajectories that they are made of."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from captum_sdi.plotting._arguments import Positions, check_limit, check_positions, check_texts
from captum_sdi.plotting._axes import (
    column_axes,
    divided,
    hide_spines,
    label_room,
    label_rows,
    row_height,
    scale_ticks,
    set_title,
    small_print,
    width_in_points,
)
from captum_sdi.plotting._colours import draw_colours
from captum_sdi.plotting._fonts import readable
from captum_sdi.plotting._lines import NEUTRAL, OPPONENT, PROPONENT
from captum_sdi.plotting._scores import Result, Scores, influence_label, ranked, read_scores, test_texts_of, train_texts
from captum_sdi.plotting._text import FONT, example_name, isolated

_MOST_ROWS = 80


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
    width: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw totals as bars and, beside them, the trajectories they are made of.

    ``tests`` are positions of test examples, None = all; ``test_texts`` all test examples of ``result`` as text. ``ax``
    is divided into two, bars and heat map. The other arguments are described in `captum_sdi.plotting`.

    Returns:
        The Axes of the bars; ``ax.figure.axes[-2]`` is that of the heat map. Steps that a test example did not run are
        grey.

    Raises:
        ValueError: If there are more rows than can be read.

    Example:
        >>> from matplotlib.figure import Figure
        >>> trajectories = [[[0.5, 0.25], [-0.5, -1.0]], [[1.0, 1.0], [2.0, 0.0]]]  # (q, n, t)
        >>> ax = plot_totals(trajectories, k=1, ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['test 0', '#0', '#1', 'test 1', '#0']
    """
    texts = train_texts(result, texts)
    test_texts = test_texts_of(result, test_texts)
    scores = read_scores(result, texts)
    n_tests = len(scores.totals)
    chosen = check_positions("tests", tests, n_tests).tolist()
    check_texts("test_texts", test_texts, n_tests)
    check_limit(limit)
    groups = [_pick_examples(scores, test, train, k) for test in chosen]
    group_rows = [1 + len(group.totals) for group in groups]  # a heading, then the training examples
    n_rows = sum(group_rows)
    if n_rows > _MOST_ROWS:
        raise ValueError(
            f"tests and k ask for {n_rows} rows, more than can be read ({_MOST_ROWS}). Pass fewer tests or a smaller k."
        )
    headings = np.cumsum([0, *group_rows[:-1]])
    example_rows = np.setdiff1d(np.arange(n_rows), headings)
    examples = Scores.concatenate(groups)

    names = _row_names(chosen, groups, texts, test_texts)
    below = 0.25 if examples.total_errors.any() else 0.0  # inches, for two more lines below the bars
    ax = column_axes(ax, below + max(2.2, 0.85 + row_height(names, width) * n_rows), width)
    room = label_room(ax)
    bar_axes, heat_axes = divided(ax, (1, 2), 2, widths=(1.0, 1.7), gap=0.05)
    small_print(heat_axes)
    is_narrow = width_in_points(bar_axes) - room / 2.7 < 45
    _draw_bars(bar_axes, example_rows, examples, has_outer_bins=scores.has_outer_bins, is_narrow=is_narrow)
    depth = examples.trajectories.shape[1]
    cells = np.zeros((n_rows, depth))
    cells[example_rows] = examples.steps_run
    draw_colours(heat_axes, cells, limit, label=influence_label(result))
    _part_rows(heat_axes, headings)
    bar_axes.set_ylim(n_rows - 0.5, -0.5)  # the first row on top
    label_rows(bar_axes, names, room, bold=headings.tolist())
    bar_axes.set_ylabel("train examples", fontsize=FONT)
    set_title(bar_axes, title, "", taken=room - width_in_points(heat_axes))
    return readable(bar_axes)


def _part_rows(ax: Axes, headings: Positions) -> None:
    """Leave the rows of headings empty in the heat map."""
    for row in headings:  # zero has almost, but not quite, the background's colour
        ax.axhspan(row - 0.5, row + 0.5, color=ax.get_facecolor(), linewidth=0)
    ax.tick_params(left=False, labelleft=False)
    ax.spines[:].set_visible(b=False)


def _pick_examples(
    scores: Scores,
    test: int,
    train: Sequence[int] | None,
    k: int,
) -> Scores:
    """Return the scores of the strongest, or of the chosen, training examples by falling total."""
    group = scores.of_test_example(test, train)
    rows = ranked(group.totals, k if train is None else None)
    return group.select(rows)


def _row_names(
    tests: Sequence[int],
    groups: Sequence[Scores],
    texts: Sequence[str] | None,
    test_texts: Sequence[str] | None,
) -> list[str]:
    """Return the names of all rows: each test example, followed by its training examples."""
    names = []
    for test, group in zip(tests, groups, strict=True):
        heading = f"test {test}"
        if test_texts is not None:
            heading += f": {isolated(test_texts[test])}"
        names.append(heading)
        names += [example_name(int(index), texts) for index in group.indices]
    return names


def _draw_bars(
    ax: Axes,
    rows: Positions,
    scores: Scores,
    *,
    has_outer_bins: bool,
    is_narrow: bool,
) -> None:
    """Draw totals as bars, with two standard errors where there are any."""
    totals = scores.totals
    errors = 2 * scores.total_errors
    blue = PROPONENT[0].colour
    orange = OPPONENT[0].colour
    ax.barh(rows, totals, height=0.7, color=np.where(totals >= 0, blue, orange))
    if errors.any():
        ax.errorbar(
            totals, rows, xerr=errors, fmt="none", ecolor=matplotlib.rcParams["text.color"], elinewidth=0.8, capsize=1.5
        )
    ax.axvline(0, color=NEUTRAL, linewidth=0.6)
    if not totals.any() and not errors.any():
        ax.set_xlim(-1, 1)
    hide_spines(ax, "left", "top", "right")
    few_round_ticks = MaxNLocator(1 if is_narrow else 3, steps=[1, 2, 3, 5, 10], prune="lower" if is_narrow else None)
    ax.xaxis.set_major_locator(few_round_ticks)
    label = "total with\nprelude, coda" if has_outer_bins and not is_narrow else "total"
    if errors.any():
        label += "\n± 2 s.e. of\nthe sketch"
    largest = np.abs(totals).max() + errors.max()
    ax.set_xlabel(scale_ticks(ax.xaxis, largest, label), fontsize=FONT)
