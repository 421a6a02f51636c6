"""The pictures of scores, one kind of picture after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from captum_sdi import plotting
from captum_sdi.cli.results import Results

NAMES = ("trajectories-*", "heatmap-*", "totals", "step-share")
"""Of all pictures, as patterns."""

_MOST = 20  # training examples of either sign in a heat map, which are then named
_ROWS = 80  # as many as plot_totals draws


def draw(results: Results, queries: Sequence[int], k: int, folder: Path, format: str) -> list[str]:
    """Draws and saves.

    Args:
        results: The scores.
        queries: Positions of the queries to draw.
        k: How many proponents, and how many opponents, in a picture of lines.
        folder: Where to; made where there is none.
        format: What kind of file.

    Returns:
        The files' names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, axes in _pictures(results, queries, k):
        figure = axes.figure
        figure.savefig(folder / f"{name}.{format}", dpi=200)  # type: ignore[union-attr]
        plt.close(figure)  # type: ignore[arg-type]
        names.append(f"{name}.{format}")
    return names


def _pictures(results: Results, queries: Sequence[int], k: int) -> Iterator[tuple[str, Axes]]:
    """Names and drawings, one at a time."""
    scores, texts, asked = results.scores, results.train_texts, results.query_texts
    for q in queries:
        yield (
            f"trajectories-{q}",
            plotting.plot_trajectories(scores, q, k=k, texts=texts, title=f"query {q}: {asked[q]}"),
        )
        yield f"heatmap-{q}", plotting.plot_heatmap(scores, q, k=_MOST, texts=texts, title=f"query {q}: {asked[q]}")
    together = queries[: _ROWS // 5]  # a heading and twice two examples each
    yield "totals", plotting.plot_totals(scores, together, k=2, texts=texts, test_texts=asked)
    among = f"{len(asked)} {'query' if len(asked) == 1 else 'queries'}, top {scores.influence_scores.shape[1]} of each"
    yield "step-share", plotting.plot_step_share(scores, title=among)
