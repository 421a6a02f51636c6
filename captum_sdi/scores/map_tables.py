"""An `InfluenceMap` in words and as a table of pandas or xarray, both of which are imported where they are used."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from captum_sdi.words import counted

if TYPE_CHECKING:
    from captum_sdi.scores.influence_map import InfluenceMap

_SHOWN = 4
"""Places of an axis that are printed."""


def summary(split: InfluenceMap) -> str:
    """Write a map's pairs, its total, and the sums at the first places of each axis."""
    lines = [headline(split)]
    widest = max(map(len, split.axes), default=0)
    for axis in split.axes:
        labels = split.labels[axis]
        shown = [f"{label} {total:+.4f}" for label, total in zip(labels, axis_sums(split, axis), strict=True)]
        n_hidden = len(shown) - _SHOWN
        ellipsis = f" and {n_hidden} more" if n_hidden > 0 else ""
        listed = ", ".join(shown[:_SHOWN])
        lines.append(f"  {axis:<{widest}}  {len(labels)}: {listed}{ellipsis}")
    return "\n".join(lines)


def headline(split: InfluenceMap) -> str:
    """Write how many pairs a map has, and its total."""
    q, k = split.indices.shape
    tests = counted(q, "test example")
    trains = counted(k, "train example")
    total_influence = float(split.values.sum())
    return f"InfluenceMap of {tests} x {trains}, total {total_influence:+.4f}"


def axis_sums(split: InfluenceMap, axis: str) -> list[float]:
    """Return the sum at each place of an axis, over all pairs and other axes."""
    other_axes = [name for name in split.axes if name != axis]
    axis_map = split.sum(*other_axes) if other_axes else split
    return axis_map.values.sum((0, 1)).tolist()


def html_table(split: InfluenceMap) -> str:
    """Write a map for notebooks: of each axis, the names of its places over the sums there."""
    rows = []
    for axis in split.axes:
        names = [html.escape(str(label)) for label in split.labels[axis]]
        sums = [f"{total:+.4g}" for total in axis_sums(split, axis)]
        rows += [table_row("th", axis, names), table_row("td", "sum", sums)]
    style = "max-width:100%;overflow-x:auto"
    return f'<p><code>{headline(split)}</code></p><div style="{style}"><table>{"".join(rows)}</table></div>'


def table_row(kind: str, head: str, cells: Sequence[str]) -> str:
    """Return a row of HTML with a head."""
    columns = "".join(f"<{kind}>{cell}</{kind}>" for cell in cells)
    return f"<tr><th>{html.escape(head)}</th>{columns}</tr>"


def few(labels: Sequence[object]) -> str:
    """Write the first labels, and the last one where there are more."""
    if len(labels) <= _SHOWN:
        return ", ".join(map(repr, labels)) or "nothing"
    first = ", ".join(map(repr, labels[:_SHOWN]))
    return f"{first} ... {labels[-1]!r}"


def data_frame(split: InfluenceMap) -> Any:
    """Return a DataFrame with a row for each number; see `InfluenceMap.to_pandas`.

    Raises:
        ImportError: If pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas() needs pandas: pip install pandas.") from error
    q, k = split.indices.shape
    places = [split.labels[axis] for axis in split.axes]
    records = []
    for test, pair in itertools.product(range(q), range(k)):
        train = int(split.indices[test, pair])
        records += [(test, train, *labels) for labels in itertools.product(*places)]
    columns = ["test", "train", *split.axes]
    frame = pandas.DataFrame.from_records(records, columns=columns)
    influence = split.values.detach().cpu()
    frame["influence"] = influence.flatten().numpy()
    if split.errors is not None:
        errors = split.errors.detach().cpu()
        frame["error"] = errors.flatten().numpy()
    return frame


def data_array(split: InfluenceMap) -> Any:
    """Return a DataArray; see `InfluenceMap.to_xarray`.

    Raises:
        ImportError: If xarray is not installed.
    """
    try:
        import xarray
    except ImportError as error:
        raise ImportError("to_xarray() needs xarray: pip install xarray.") from error
    coordinates: dict[str, Any] = {axis: list(split.labels[axis]) for axis in split.axes}
    train_examples = split.indices.cpu().numpy()
    coordinates["train"] = (("test", "pair"), train_examples)
    dimensions = ("test", "pair", *split.axes)
    influence = split.values.detach().cpu().numpy()
    return xarray.DataArray(influence, coordinates, dimensions, name="influence")
