"""One pair's trajectory in several results: sketches of different sizes, and the exact one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import Container

from captum_sdi.plotting._arguments import Array
from captum_sdi.plotting._axes import column_axes, set_title
from captum_sdi.plotting._fonts import readable
from captum_sdi.plotting._legend import LegendBlock, draw_legend, legend_height, total_entry
from captum_sdi.plotting._lines import CATEGORY, NEUTRAL, LineStyle, finish_lines, note_errors
from captum_sdi.plotting._scores import Result, Scores, influence_label, read_scores
from captum_sdi.plotting._text import signed_numbers

_HALF_WIDTH = 0.35  # of a step: what its points share on either side of it


def plot_comparison(
    results: Mapping[str, Result],
    test: int = 0,
    *,
    train: int,
    title: str | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what several results say of one pair, side by side at each step.

    ``results`` are results under their names, drawn as points with two standard errors. One without errors (`Exact`,
    plain trajectories) is a bar across its step, to measure the others against. ``train`` is the training example's
    index in the training set. The other arguments are described in `captum_sdi.plotting`.

    Returns:
        The Axes. Its legend gives each result's total.

    Raises:
        ValueError: If ``results`` is empty, or they differ in the number of loop steps.

    Example:
        >>> from matplotlib.figure import Figure
        >>> results = {"exact": [[[0.5, 0.25]]], "sketched": [[[0.5, 0.5]]]}  # (q, n, t) = (1, 1, 2)
        >>> ax = plot_comparison(results, train=0, ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['total', '+0.750  exact', '+1.000  sketched']
    """
    pairs = {}
    for name, result in results.items():
        scores = read_scores(result).of_test_example(test, [train])
        pairs[name] = scores.select(0)
    n_steps = _common_steps(pairs)

    height = legend_height([len(pairs)], stacked=True)
    ax = column_axes(ax, 2.05 + height, width)
    has_outer_bins = any(pair.has_outer_bins for pair in pairs.values())
    block = LegendBlock("total incl. prelude, coda" if has_outer_bins else "total")
    totals = signed_numbers(np.array([pair.totals for pair in pairs.values()]))
    sketched = [name for name, pair in pairs.items() if pair.errors.any()]
    offsets = _offsets(len(sketched))
    for (name, pair), total in zip(pairs.items(), totals, strict=True):
        drawn: Artist | Container
        if name in sketched:
            rank = sketched.index(name)
            style = CATEGORY[rank % len(CATEGORY)]
            drawn = _draw_sketched(ax, pair, offsets[rank], style)
        else:
            drawn = _draw_exact(ax, pair)
        block.add(drawn, total_entry(ax, total, name))
    finish_lines(ax, n_steps, influence_label(*results.values()))
    note_errors(ax, np.stack([pair.errors for pair in pairs.values()]), "bars")
    ax.set_xlim(0.5, n_steps + 0.5)
    set_title(ax, title, f"train example {train} on test example {test}")
    draw_legend(ax, [block], stacked=True)
    return readable(ax)


def _common_steps(pairs: Mapping[str, Scores]) -> int:
    """Return the number of loop steps that all results have."""
    if not pairs:
        raise ValueError("results is empty. Pass at least one result under its name.")
    depths = {name: int(pair.n_steps) for name, pair in pairs.items()}
    if len(set(depths.values())) > 1:
        raise ValueError(f"results must have the same number of loop steps for this test example, got {depths}.")
    return next(iter(depths.values()))


def _offsets(count: int) -> Array:
    """Return the places beside a step of ``count`` points that share its width equally."""
    n_halves = 2 * max(1, count)
    edges_and_centres = np.linspace(-_HALF_WIDTH, _HALF_WIDTH, n_halves + 1)
    return edges_and_centres[1::2]


def _draw_exact(ax: Axes, pair: Scores) -> Artist:
    """Draw a bar across each step."""
    n_steps = int(pair.n_steps)
    steps = np.arange(1.0, n_steps + 1)
    values = pair.trajectories[:n_steps]
    return ax.hlines(
        values,
        steps - _HALF_WIDTH,
        steps + _HALF_WIDTH,
        color=NEUTRAL,
        linewidth=1.2,
    )


def _draw_sketched(
    ax: Axes,
    pair: Scores,
    offset: float,
    style: LineStyle,
) -> Container:
    """Draw a point beside each step, with two standard errors."""
    n_steps = int(pair.n_steps)
    steps = np.arange(1.0, n_steps + 1)
    # Many steps stand close: the points shrink before they touch.
    size = 3.5 if n_steps <= 12 else 2.0
    return ax.errorbar(
        steps + offset,
        pair.trajectories[:n_steps],
        yerr=2 * pair.errors[:n_steps],
        fmt=style.marker,
        color=style.colour,
        markersize=size,
        elinewidth=0.9,
        capsize=1.5,
    )
