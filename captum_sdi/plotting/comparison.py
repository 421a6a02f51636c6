"""One pair's trajectory in several results: sketches of different sizes, and the exact one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from captum_sdi.plotting._axes import axes, set_title
from captum_sdi.plotting._lines import (
    NEUTRAL,
    OPPONENT,
    PROPONENT,
    Block,
    finish_lines,
    legend,
    legend_height,
    legend_room,
)
from captum_sdi.plotting._scores import Result, Scores, read
from captum_sdi.plotting._text import clip, signed, text_width

_STYLES = [style for both in zip(PROPONENT, OPPONENT, strict=True) for style in both]
_WIDTH = 0.7  # of a step, that its points share


def plot_comparison(
    results: Mapping[str, Result], test: int = 0, *, train: int, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draws what several results say of one pair, step by step: side by side, with two standard errors.

    ``results`` are results under their names. One without errors (`Exact`, plain trajectories) is a bar across its
    step, to measure the others against. ``train`` is the training example's index in the training set. The other
    arguments are described in `captum_sdi.plotting`.

    Returns:
        The Axes. Its legend gives each result's total.

    Raises:
        ValueError: ``results`` is empty, or they differ in the number of loop steps.

    Example:
        >>> from matplotlib.figure import Figure
        >>> results = {"exact": [[[0.5, 0.25]]], "sketched": [[[0.5, 0.5]]]}  # (q, n, t) = (1, 1, 2)
        >>> ax = plot_comparison(results, train=0, ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['total', '+0.750  exact', '+1.000  sketched']
    """
    ones = {name: read(result).of(test, [train]).at(0) for name, result in results.items()}
    steps = _common_steps(ones)
    exact = [name for name, one in ones.items() if not one.errors.any()]
    places = np.linspace(-_WIDTH / 2, _WIDTH / 2, 2 * max(1, len(ones) - len(exact)) + 1)[1::2]
    sketched = iter(zip(places, _STYLES * len(ones), strict=False))
    ax = axes(ax, 2.05 + legend_height([len(ones)], True))
    block = Block("total incl. prelude, coda" if any(one.has_ends for one in ones.values()) else "total", [], [])
    for (name, one), total in zip(ones.items(), signed(np.array([one.totals for one in ones.values()])), strict=True):
        block.handles.append(_draw_exact(ax, one) if name in exact else _draw_sketched(ax, one, *next(sketched)))
        block.names.append(total + "  " + clip(name, legend_room(ax) - text_width(total + "  ")))
    finish_lines(ax, steps, "influence\n(drop in test loss)")
    ax.set_xlim(0.5, steps + 0.5)
    set_title(ax, title, f"train example {train} on test example {test}")
    legend(ax, [block], True)
    return ax


def _common_steps(ones: Mapping[str, Scores]) -> int:
    if not ones:
        raise ValueError("results is empty. Pass at least one result under its name.")
    depths = {name: int(one.n_steps) for name, one in ones.items()}
    if len(set(depths.values())) > 1:
        raise ValueError(f"results must have the same number of loop steps for this test example, got {depths}.")
    return next(iter(depths.values()))


def _draw_exact(ax: Axes, one: Scores) -> object:
    steps = np.arange(1.0, int(one.n_steps) + 1)
    return ax.hlines(
        one.trajectories[: len(steps)], steps - _WIDTH / 2, steps + _WIDTH / 2, color=NEUTRAL, linewidth=1.2
    )


def _draw_sketched(ax: Axes, one: Scores, apart: float, style: tuple[str, str, str]) -> object:
    colour, _, marker = style
    steps = np.arange(1.0, int(one.n_steps) + 1)
    values, errors = one.trajectories[: len(steps)], 2 * one.errors[: len(steps)]
    # Many steps stand close: the points shrink before they touch.
    size = 3.5 if len(steps) <= 12 else 2.0
    return ax.errorbar(
        steps + apart, values, yerr=errors, fmt=marker, color=colour, markersize=size, elinewidth=0.9, capsize=1.5
    )
