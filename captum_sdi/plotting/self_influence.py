"""Self-influence by loop step: its distribution over examples, and the strongest ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from captum_sdi.plotting._arguments import Array
from captum_sdi.plotting._axes import column_axes, set_title
from captum_sdi.plotting._fonts import readable
from captum_sdi.plotting._legend import LegendBlock, draw_legend, legend_height
from captum_sdi.plotting._lines import NEUTRAL, PROPONENT, draw_band, draw_examples, finish_lines, note_errors
from captum_sdi.plotting._scores import Result, influence_label, ranked, read_scores, train_texts
from captum_sdi.plotting._text import signed_numbers


def plot_self_influence(
    result: Result,
    *,
    k: int = 3,
    texts: Sequence[str] | None = None,
    title: str | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw self-influence by loop step: its distribution, and the k strongest examples as lines.

    ``result`` is what `SDIInfluence.step_self_influence` returned, or plain trajectories ``(n, t)``; the other
    arguments are described in `captum_sdi.plotting`.

    Returns:
        The Axes. The median and the bands at a step are over the examples that ran that step.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_self_influence([[2.0, 1.0], [1.0, 0.5]], k=1, ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['2 examples', 'median', 'middle 50%', 'middle 90%', 'strongest: total', '+3.000  #0', ' ', ' ']
    """
    texts = train_texts(result, texts)
    scores = read_scores(result, texts, self_influence=True)
    strongest = scores.select(ranked(scores.totals, k)[:k])
    totals = signed_numbers(strongest.totals)
    stacked = texts is not None
    height = legend_height([3, len(totals)], stacked=stacked)
    ax = column_axes(ax, 2.05 + height, width)
    distribution = _draw_distribution(ax, scores.steps_run)
    examples = draw_examples(ax, "strongest: total", strongest, totals, PROPONENT, texts)
    label = "self-" + influence_label(result).replace("test", "own")
    finish_lines(ax, scores.trajectories.shape[1], label)
    note_errors(ax, strongest.errors, "coloured bands")
    set_title(ax, title, "")
    draw_legend(ax, [distribution, examples], stacked=stacked)
    return readable(ax)


def _draw_distribution(ax: Axes, values: Array) -> LegendBlock:
    """Draw median and quantile bands over examples of ``(n, t)``, without steps that are NaN."""
    n_examples, n_steps = values.shape
    if n_steps == 1:  # a band needs two points
        steps = np.array([0.7, 1.3])
        values = np.repeat(values, 2, axis=1)
    else:
        steps = np.arange(1.0, n_steps + 1)
    heading = f"{n_examples} examples" if n_examples > 1 else "1 example"
    block = LegendBlock(heading)
    medians = np.nanmedian(values, axis=0)
    (line,) = ax.plot(steps, medians, color=NEUTRAL, linewidth=1.5)
    block.add(line, "median")
    if n_examples == 1:
        return block
    for percent, alpha in ((50, 0.3), (90, 0.15)):
        outside = (100 - percent) / 2
        lower, upper = np.nanpercentile(values, [outside, 100 - outside], axis=0)
        draw_band(ax, steps, lower, upper, NEUTRAL, alpha)
        patch = Patch(color=NEUTRAL, alpha=alpha, linewidth=0)
        block.add(patch, f"middle {percent}%")
    return block
