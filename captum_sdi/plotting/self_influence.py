"""Self-influence by loop step: its distribution over examples, and the strongest ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from captum_sdi.plotting import _lines
from captum_sdi.plotting._axes import axes, set_title
from captum_sdi.plotting._scores import Array, Result, ranked, read
from captum_sdi.plotting._text import signed


def plot_self_influence(
    result: Result,
    *,
    k: int = 3,
    texts: Sequence[str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws self-influence by loop step: its distribution over examples, and the k strongest ones as lines.

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
    scores = read(result, texts, of_itself=True)
    top = scores.at(ranked(scores.totals, k)[:k])
    ax = axes(ax, 2.05 + _lines.legend_height([3, len(top.totals)], texts is not None))
    depth = scores.trajectories.shape[1]
    ran = np.arange(depth) < scores.n_steps[:, None]
    everyone = _draw_distribution(ax, np.where(ran, scores.trajectories, np.nan))
    strongest = _lines.draw_examples(ax, "strongest: total", top, iter(signed(top.totals)), _lines.PROPONENT, texts)
    _lines.finish_lines(ax, depth, "self-influence\n(drop in own loss)")
    set_title(ax, title, "")
    _lines.legend(ax, [everyone, strongest], texts is not None)
    return ax


def _draw_distribution(ax: Axes, values: Array) -> _lines.Block:
    """Median and quantile bands over examples of ``(n, t)``; NaN = did not run that step."""
    count, depth = values.shape
    steps = np.arange(1.0, depth + 1)
    if depth == 1:  # a band needs two points
        steps, values = np.array([0.7, 1.3]), np.repeat(values, 2, axis=1)
    median = ax.plot(steps, np.nanmedian(values, axis=0), color=_lines.NEUTRAL, linewidth=1.5)
    block = _lines.Block(f"{count} examples" if count > 1 else "1 example", median, ["median"])
    for share, alpha in ((50, 0.3), (90, 0.15)) if count > 1 else ():
        low, high = np.nanpercentile(values, [50 - share / 2, 50 + share / 2], axis=0)
        _lines.band(ax, steps, low, high, _lines.NEUTRAL, alpha)
        block.handles.append(Patch(color=_lines.NEUTRAL, alpha=alpha, linewidth=0))
        block.names.append(f"middle {share}%")
    return block
