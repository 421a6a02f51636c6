"""The pictures of scores, one kind of picture after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from captum_sdi import plotting
from captum_sdi.cli.results import Results, printable
from captum_sdi.cli.rows import clip

HEATMAP_EXAMPLES = 20  # of either sign; so few can be named beside the heat map
TITLE = 200  # characters, of which a picture shows as many as fit
TOTALS_QUERIES = 16  # plot_totals draws 80 rows; a query takes five, a heading and twice two examples


def draw(
    results: Results,
    queries: Sequence[int],
    k: int,
    folder: Path,
    format: str,
    width: float,
) -> list[str]:
    """Draw and save the pictures of the queries at these positions, so many inches wide; return the files' names."""
    files = []
    for name, axes in drawn_axes(results, queries, k, width):
        file = f"{name}.{format}"
        figure = axes.figure
        figure.savefig(folder / file, dpi=200)  # type: ignore[union-attr]
        plt.close(figure)  # type: ignore[arg-type]
        files.append(file)
    return files


def drawn_axes(
    results: Results,
    queries: Sequence[int],
    k: int,
    width: float,
) -> Iterator[tuple[str, Axes]]:
    """Yield the name of each picture and its axes, one picture at a time."""
    scores = results.scores
    train_texts, query_texts = results.train_texts, [printable(text) for text in results.query_texts]
    settings: dict[str, Any] = {"texts": train_texts, "width": width}
    for q in queries:
        title = clip(f"query {q}: {query_texts[q]}", TITLE)
        yield (
            f"trajectories-{q}",
            plotting.plot_trajectories(
                scores,
                q,
                k=k,
                title=title,
                **settings,
            ),
        )
        yield (
            f"heatmap-{q}",
            plotting.plot_heatmap(
                scores,
                q,
                k=HEATMAP_EXAMPLES,
                title=title,
                **settings,
            ),
        )
    first = queries[:TOTALS_QUERIES]
    yield (
        "totals",
        plotting.plot_totals(
            scores,
            first,
            k=2,
            test_texts=query_texts,
            **settings,
        ),
    )
    n_queries, n_examples = scores.influence_scores.shape
    noun = "query" if n_queries == 1 else "queries"
    title = f"{n_queries} {noun}, top {n_examples} of each"
    yield "step-share", plotting.plot_step_share(scores, title=title, width=width)
