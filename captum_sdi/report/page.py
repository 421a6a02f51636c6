"""`write_page`: from a result to one HTML file."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from captum_sdi.report.assembly import assembled
from captum_sdi.report.chunks import numbered_chunks, plain_chunk_element
from captum_sdi.report.extras import check_self_influence, matrix_rows, self_influence_rows, step_shares, test_summary
from captum_sdi.report.maps import map_rows
from captum_sdi.report.pairs import Pairs
from captum_sdi.report.texts import PER_CHUNK, TextTable, check_examples, example_entry, token_examples
from captum_sdi.scores.result import StepInfluence
from captum_sdi.scores.words import Example, Words
from captum_sdi.whole_file import followed, write_whole

TITLE = "Which training examples shaped these answers, and at which loop step?"
LARGEST_IN_NOTEBOOK = 20_000_000
"""Bytes of a page that a notebook holds in its output; of a larger one it shows where the file is."""
SELF_PER_CHUNK = 500


@dataclass(frozen=True)
class Page:
    """A page that was written; a notebook shows it when a cell ends with it."""

    path: Path

    def _repr_html_(self) -> str:
        """Return the page in a frame of its own, which can reach neither the notebook nor the network."""
        name = html.escape(str(self.path))
        size = self.path.stat().st_size
        if size > LARGEST_IN_NOTEBOOK:
            return f"<p>{name} holds {size / 1e6:.0f} MB: open it in a browser of its own.</p>"
        content = html.escape(self.path.read_text(encoding="utf-8"))
        style = "width:100%;height:760px;border:1px solid #8886;border-radius:6px"
        return f'<iframe sandbox="allow-scripts" style="{style}" title="{name}" srcdoc="{content}"></iframe>'


def write_page(
    result: StepInfluence | Sequence[StepInfluence],
    path: str | os.PathLike[str],
    *,
    texts: Sequence[Example] | None = None,
    test_texts: Sequence[Example] | None = None,
    map: Any = None,
    step_matrix: Any = None,
    step_matrix_indices: Sequence[int] | None = None,
    self_influence: StepInfluence | None = None,
    title: str = TITLE,
) -> Page:
    """Write an explorer of scores: one HTML file that needs no network.

    Args:
        result: What `SDIInfluence.step_influence` returned, or several of the same tests, such as both signs.
        path: The file to write; an existing one is replaced, and a link stays one.
        texts: The training texts, or mappings with a ``text`` and fields to show; None: what the result knows.
        test_texts: The test examples', likewise.
        map: An influence map of some of the pairs, or several: layers and tokens to tint and to rank by.
        step_matrix: ``(q, n, s, t)`` of some pairs, as `SDIInfluence.step_matrix` returns it.
        step_matrix_indices: The training examples it is of; None: all of them.
        self_influence: What `SDIInfluence.step_self_influence` returned.
        title: The page's heading.

    Returns:
        The page; as a cell's last line in a notebook, it is shown there.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If arguments do not fit each other, a number is not finite, or the path is no regular file.
        FileNotFoundError: If the folder does not exist.

    Example:
        >>> import tempfile, torch
        >>> from captum_sdi.scores.contract import Scores
        >>> scores = Scores(torch.tensor([[[0.75, 0.0, 0.0, 0.5, 0.25]]]), torch.zeros(1, 1, 5))
        >>> result = StepInfluence.from_sums(scores, torch.tensor([2]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write_page(result, f"{folder}/page.html", texts=["one of training"], test_texts=["asked"])
        ...     page.path.read_text().startswith("<!doctype html>")
        True
    """
    target = followed(path)
    if not isinstance(title, str):
        raise TypeError(f"title must be a text, got {title!r}.")
    pairs = Pairs.from_results(result)
    texts, test_texts = shown_texts(result, texts, test_texts)
    n_self = 0 if self_influence is None else check_self_influence(self_influence)
    check_examples("texts", texts, max(pairs.n_train, n_self), exact=pairs.has_all)
    check_examples("test_texts", test_texts, len(pairs.totals), exact=True)
    facts = page_facts(pairs, title)
    table = TextTable(texts)
    rows = [pairs.row(test, table) for test in range(len(pairs.totals))]
    first_pairs, *chunks = numbered_chunks("pairs", rows, pairs.tests_per_chunk, is_first_plain=True)
    chunks += map_chunks(facts, len(pairs.totals), map)
    if step_matrix is not None:
        matrices = matrix_rows(step_matrix, step_matrix_indices, len(pairs.totals))
        chunks += matrix_chunks(facts, matrices)
    if self_influence is not None:
        chunks += self_influence_chunks(facts, self_influence_rows(self_influence, table))
    first_texts, *other_texts = numbered_chunks("texts", table.entries or [[""]], PER_CHUNK, is_first_plain=True)
    first_chunks = [tests_chunk(pairs, test_texts), first_pairs, first_texts]
    document = assembled(title, facts, first_chunks, [*other_texts, *chunks])
    write_whole(target, lambda unfinished: unfinished.write_text(document, encoding="utf-8"))
    return Page(Path(path))


def shown_texts(
    results: StepInfluence | Sequence[StepInfluence],
    texts: Sequence[Example] | None,
    test_texts: Sequence[Example] | None,
) -> tuple[Sequence[Example] | None, Sequence[Example] | None]:
    """Return the texts of the training and of the test examples: those that were passed, or else those of the result.

    Raises:
        ValueError: If a result of target tokens has not as many texts as test examples.
    """
    words = known_words(results)
    if texts is None:
        texts = words.train
    if test_texts is None:
        test_texts = words.test
    token_of = getattr(results, "token_of", None)
    if token_of is not None and test_texts is not None:
        test_texts = token_examples(test_texts, token_of)
    return texts, test_texts


def known_words(results: StepInfluence | Sequence[StepInfluence]) -> Words:
    """Return the words that a result, or the first of several, knows."""
    first = results if isinstance(results, StepInfluence) else results[0]
    return first.words or Words(test=None, train=None)


def page_facts(pairs: Pairs, title: str) -> dict[str, Any]:
    """Return what a page knows before it unpacks anything."""
    n_tests, n_columns, n_steps = pairs.steps.shape
    return {
        "title": title,
        "version": version("captum-sdi"),
        "tests": n_tests,
        "columns": n_columns,
        "steps": n_steps,
        "hasAll": pairs.has_all,
        "hasPrelude": bool(pairs.prelude.any()),
        "hasCoda": bool(pairs.coda.any()),
        "testsPerChunk": pairs.tests_per_chunk,
        "textsPerChunk": PER_CHUNK,
        "shares": step_shares(pairs),
        "maps": [],
        "matrices": 0,
        "self": None,
    }


def tests_chunk(pairs: Pairs, test_texts: Sequence[Example] | None) -> str:
    """Return the chunk of the test examples, which the page needs first."""
    rows = []
    for test in range(len(pairs.totals)):
        entry = [""] if test_texts is None else example_entry("test_texts", test_texts, test)
        rows.append({"entry": entry, **test_summary(pairs, test)})
    return plain_chunk_element("tests", rows)


def map_chunks(
    facts: dict[str, Any],
    n_tests: int,
    influence_map: Any,
) -> Iterator[str]:
    """Yield the chunks of no, one or several maps, and note in `facts` which axes they have."""
    maps = influence_map if isinstance(influence_map, list | tuple) else [influence_map]
    given = [one_map for one_map in maps if one_map is not None]
    for number, one_map in enumerate(given):
        rows = map_rows(one_map, n_tests)
        facts["maps"].append({"axes": rows[0]["axes"], "tests": len(rows)})
        yield from numbered_chunks(f"map-{number}", rows, per_chunk=1)


def matrix_chunks(facts: dict[str, Any], matrices: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the chunks of the step matrices, and note in `facts` how many there are."""
    facts["matrices"] = len(matrices)
    yield from numbered_chunks("matrices", matrices, per_chunk=1)


def self_influence_chunks(facts: dict[str, Any], rows: list[list[Any]]) -> Iterator[str]:
    """Yield the chunks of the influence of training examples on themselves, and note in `facts` how many there are."""
    facts["self"] = {"rows": len(rows), "perChunk": SELF_PER_CHUNK}
    yield from numbered_chunks("self", rows, SELF_PER_CHUNK)
