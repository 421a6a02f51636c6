"""Pictures of step-decomposed influence, sized for one column of a paper.

A positive influence marks a proponent: a gradient step on the training example, with the learning
rate that the score contains, lowers the test example's loss by about that much. Axes therefore say
"drop in test loss". Steps are numbered from 1 in pictures (from 0 in tensors). Bands and error bars
are two standard errors of the sketch; there are none with `Exact` or plain tensors. Steps beyond an
example's ``n_steps`` are not drawn.

Every function returns the `matplotlib.axes.Axes` it drew on and takes what it needs of these
arguments:

* ``result``: a `StepInfluence`, complete ``(q, n)`` or the k strongest ``(q, k)``; or plain
  trajectories, a tensor or array ``(q, n, t)``, or ``(n, t)`` for one test example.
* ``test`` / ``tests``: positions of test examples in ``result``, from 0.
* ``train``: training examples to draw in place of the strongest, by index in the training set.
* ``k``: how many proponents, and how many opponents, to draw.
* ``texts``: the training examples as text, in the order of the training set. They are shown on one
  line and cut with an ellipsis where room ends; characters that no installed font has appear as
  escapes (backslash, u, code).
* ``limit``: the absolute value at which colours saturate, to compare pictures; None = the largest
  value drawn.
* ``title``: shown literally and cut like ``texts``; None = a default, ``""`` = none.
* ``ax``: the Axes to draw on; None makes a figure. A figure of your own should have
  ``layout="constrained"``, which finds room for labels, and for legends below the picture. Without
  it legends cover part of the picture, and long labels may reach into its neighbours.

What cannot be drawn truthfully (a wrong shape, NaN, an example that is not there) is a `ValueError`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from captum_sdi.scores import StepInfluence

__all__ = [
    "plot_heatmap",
    "plot_self_influence",
    "plot_step_matrix",
    "plot_step_share",
    "plot_totals",
    "plot_trajectories",
]

Array: TypeAlias = NDArray[np.float64]
Result: TypeAlias = StepInfluence | Tensor | ArrayLike
_Style: TypeAlias = tuple[str, str, str]  # colour, line, marker

_COLUMN = 3.4  # inches: one column of a two-column paper
_FONT, _SMALL = 8, 7  # points: labels; ticks and legends
_BOLD = 1.15  # how much wider bold type is

_INFLUENCE = "influence\n(drop in test loss)"
_SELF_INFLUENCE = "self-influence\n(drop in own loss)"

# Okabe & Ito's palette. Cold and solid for proponents, warm and dashed for opponents; markers tell
# lines apart without colour. The heat maps' blue and red agree with it.
_PROPONENT = [("#0072B2", "-", "o"), ("#56B4E9", "-", "s"), ("#009E73", "-", "^")]
_OPPONENT = [("#D55E00", "--", "v"), ("#E69F00", "--", "D"), ("#CC79A7", "--", "X")]
_STYLES = (_PROPONENT, _OPPONENT)
_NEUTRAL = "#444444"
_DIVERGING = "RdBu"
_NOT_RUN = "0.82"  # grey, which the diverging map does not contain: the step did not run

# What systems ship with for scripts that the default font lacks, tried in this order.
_FALLBACK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans GB"),
    *("Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic"),
    *("SimHei", "Arial Unicode MS", "Noto Sans", "DejaVu Sans"),
)


def plot_trajectories(
    result: Result,
    test: int = 0,
    *,
    train: Sequence[int] | None = None,
    k: int = 3,
    texts: Sequence[str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws influence by loop step for the top proponents and opponents of one test example.

    Args:
        result: Here and below, arguments are described at the top of this module.
        test: The test example.
        train: Training examples to draw instead.
        k: How many proponents and opponents.
        texts: Training examples as text, for the legend.
        title: Text above the picture.
        ax: Where to draw.

    Returns:
        The Axes. Its legend gives each line's total, which includes the prelude and coda parts.

    Example:
        >>> from matplotlib.figure import Figure
        >>> trajectories = [[[0.5, 0.25], [-0.5, -1.0]]]  # (q, n, t) = (1, 2, 2)
        >>> ax = plot_trajectories(trajectories, texts=["1 0 1", "0 0 1"], ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['proponents: total', '+0.750  #0: 1 0 1', 'opponents: total', '−1.500  #1: 0 0 1']
    """
    scores = _read(result)
    test = _position("test", test, len(scores.totals))
    groups = _strongest(scores, test, _columns(scores, test, train), k if train is None else None)
    _check_texts(texts, scores)

    stacked = texts is not None or scores.has_ends
    ax = _axes(ax, 2.05 + _legend_height([len(columns) for columns in groups], stacked))
    totals = iter(_format_totals(scores.totals[test, np.concatenate(groups)]))
    kind = "total incl. prelude, coda" if scores.has_ends else "total"
    blocks = []
    for columns, styles, name in zip(groups, _STYLES, ("proponents", "opponents"), strict=True):
        block = _Block(f"{name}: {kind}", [], [])
        for rank, column in enumerate(columns):
            steps = slice(int(scores.n_steps[test]))
            values, errors = (
                scores.trajectories[test, column, steps],
                scores.errors[test, column, steps],
            )
            block.handles.append(_draw_line(ax, values, errors, styles, rank))
            block.names.append(_entry(ax, next(totals), int(scores.indices[test, column]), texts))
        blocks.append(block)
    _finish_step_plot(ax, int(scores.n_steps[test]), _INFLUENCE)
    _title(ax, title, f"test example {test}")
    _legend(ax, blocks, stacked)
    return ax


def plot_heatmap(
    result: Result,
    test: int = 0,
    *,
    train: Sequence[int] | None = None,
    k: int | None = None,
    sort: str = "total",
    texts: Sequence[str] | None = None,
    limit: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws influence on one test example as a heat map, training examples by loop steps.

    Args:
        result: Here and below, arguments are described at the top of this module.
        test: The test example.
        train: Training examples to draw; None = all in ``result``.
        k: Draw only so many proponents and opponents; None = all.
        sort: The order of rows: "total", largest first; or "step", by the step at which an example
            is strongest, which shows groups that act early and late.
        texts: Training examples as text. Rows too many to be named are counted instead.
        limit: Where colours saturate.
        title: Text above the picture.
        ax: Where to draw.

    Returns:
        The Axes. In small heat maps a dash marks clearly negative cells, for signs to survive in
        greyscale.

    Raises:
        ValueError: ``sort`` is something else.

    Example:
        >>> from matplotlib.figure import Figure
        >>> trajectories = [[0.5, 0.25], [-0.5, -1.0], [2.0, 0.1]]  # (n, t) = (3, 2)
        >>> ax = plot_heatmap(trajectories, ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['#2', '#0', '#1']
    """
    if sort not in ("total", "step"):
        raise ValueError(f'sort must be "total" or "step", got {sort!r}.')
    scores = _read(result)
    test = _position("test", test, len(scores.totals))
    columns = _in_order(_strongest(scores, test, _columns(scores, test, train), k))
    _check_texts(texts, scores)
    _check_limit(limit)
    values = scores.trajectories[test, columns, : scores.n_steps[test]]
    if sort == "step":
        order = np.lexsort((-np.abs(values).max(1), np.abs(values).argmax(1)))
        columns, values = columns[order], values[order]

    ax = _axes(ax, max(2.1, 0.7 + 0.135 * len(columns)) if len(columns) <= 40 else 2.8)
    room = _label_room(ax)
    _draw_heatmap(ax, values, limit)
    if _row_height(ax, len(columns)) >= 6:
        _label_rows(ax, [_name(int(scores.indices[test, column]), texts, room) for column in columns])
    else:
        room = 20
        ranks = _round_ticks(len(columns), 6)
        ax.set_yticks(ranks - 1, [str(rank) for rank in ranks])
    by = ", by total" if sort == "total" else ",\nby strongest step"
    ax.set_ylabel(f"train examples{by}", fontsize=_FONT, linespacing=1.1)
    _title(ax, title, f"test example {test}", taken=room)
    return ax


def plot_step_matrix(
    matrix: ArrayLike | Tensor,
    pair: tuple[int, int] | None = None,
    *,
    limit: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws which loop step of the training example acts on which loop step of the test example.

    Args:
        matrix: ``(s, t)``, or ``(q, n, s, t)`` as `SDIInfluence.step_matrix` returns it.
        pair: Positions (test, train) in a ``(q, n, s, t)`` matrix; None = the mean over all pairs.
        limit: Here and below, arguments are described at the top of this module.
        title: Text above the picture.
        ax: Where to draw.

    Returns:
        The Axes: train steps upwards, test steps to the right; a column sums to one point of the
        trajectory.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_step_matrix([[1.0, 0.0], [0.5, -0.5]], ax=Figure().subplots())
        >>> ax.get_xlabel(), ax.get_images()[0].get_clim()
        ('loop step of the test example', (-1.0, 1.0))
    """
    values, default = _one_matrix(_array("matrix", matrix), pair)
    _check_limit(limit)
    ax = _axes(ax, 2.7)
    rows, columns = values.shape
    _draw_heatmap(ax, values, limit)
    lost = 0.0
    if rows == columns:
        ax.set_aspect("equal")
        lost = max(0.0, _width(ax) - _height(ax))
    ax.set_ylim(-0.5, rows - 0.5)  # step 1 at the bottom, as on every other axis
    ticks = _round_ticks(rows, 10)
    ax.set_yticks(ticks - 1, [str(step) for step in ticks])
    ax.set_xlabel("loop step of the test example", fontsize=_FONT)
    ax.set_ylabel("loop step of the train example", fontsize=_FONT)
    _title(ax, title, default, taken=20 + lost)
    return ax


def plot_self_influence(
    result: Result,
    *,
    k: int = 3,
    texts: Sequence[str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws self-influence by loop step: its distribution over examples, and the strongest ones.

    Args:
        result: What `SDIInfluence.step_self_influence` returned, or plain trajectories ``(n, t)``.
            What follows is described at the top of this module.
        k: How many examples with the largest totals to draw as lines.
        texts: The examples as text, for the legend.
        title: Text above the picture.
        ax: Where to draw.

    Returns:
        The Axes. The median and the bands at a step are over the examples that ran that step.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_self_influence([[2.0, 1.0], [1.0, 0.5]], k=1, ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['2 examples', 'median', 'middle 50%', 'middle 90%', 'strongest: total', '+3.000  #0', ' ', ' ']
    """
    scores = _read(result, of_itself=True)
    _check_texts(texts, scores)
    count, depth = scores.trajectories.shape[1:]
    _check_k(k)
    top = _in_order(_strongest(scores, 0, np.arange(count), None))[:k]

    ax = _axes(ax, 2.05 + _legend_height([3, len(top)], texts is not None))
    steps = np.arange(1, depth + 1)
    everyone = _draw_distribution(ax, np.where(steps <= scores.n_steps[:, None], scores.trajectories[0], np.nan))
    strongest = _Block("strongest: total", [], [])
    for rank, (column, total) in enumerate(zip(top, _format_totals(scores.totals[0, top]), strict=True)):
        ran = slice(int(scores.n_steps[column]))
        values, errors = scores.trajectories[0, column, ran], scores.errors[0, column, ran]
        strongest.handles.append(_draw_line(ax, values, errors, _PROPONENT, rank))
        strongest.names.append(_entry(ax, total, int(column), texts))
    _finish_step_plot(ax, depth, _SELF_INFLUENCE)
    _title(ax, title, "")
    _legend(ax, [everyone, strongest], texts is not None)
    return ax


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

    Args:
        result: Here and below, arguments are described at the top of this module.
        tests: The test examples; None = all.
        train: Training examples to draw for every test example instead of its strongest ones.
        k: How many proponents and opponents of each test example.
        texts: Training examples as text, for the rows.
        test_texts: All test examples of ``result`` as text, for the headings.
        limit: Where colours saturate.
        title: Text above the picture.
        ax: Divided into two, bars and heat map.

    Returns:
        The Axes of the bars; ``ax.figure.axes[-2]`` is that of the heat map. Steps that a test
        example did not run are grey.

    Raises:
        ValueError: There are more rows than can be read.

    Example:
        >>> from matplotlib.figure import Figure
        >>> trajectories = [[[0.5, 0.25], [-0.5, -1.0]], [[1.0, 1.0], [2.0, 0.0]]]  # (q, n, t)
        >>> ax = plot_totals(trajectories, k=1, ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['test 0', '#0', '#1', 'test 1', '#0']
    """
    scores = _read(result)
    chosen = _positions("tests", tests, len(scores.totals)).tolist()
    _check_texts(texts, scores)
    _check_length("test_texts", test_texts, len(scores.totals), "one string per test example")
    _check_limit(limit)
    rows = _rows_of_totals(scores, chosen, train, k)
    if len(rows) > 80:
        raise ValueError(
            f"tests and k ask for {len(rows)} rows, more than can be read (80). Pass fewer tests or a smaller k."
        )

    ax = _axes(ax, max(2.2, 0.85 + 0.135 * len(rows)))
    room = _label_room(ax)
    bars, heat = _split(ax)
    _draw_bars(bars, scores, rows)
    _draw_rows_of_steps(heat, scores, rows, limit)
    names = []
    for test, column in rows:
        heading = f"test {test}" + (f": {test_texts[test]}" if test_texts is not None else "")
        named = (
            _clip(heading, room / _BOLD) if column is None else _name(int(scores.indices[test, column]), texts, room)
        )
        names.append(named)
    _label_rows(bars, names, bold=[row for row, (_, column) in enumerate(rows) if column is None])
    bars.set_ylabel("train examples", fontsize=_FONT)
    _title(bars, title, "", taken=room - _width(heat))
    return bars


def plot_step_share(
    result: Result,
    tests: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the share of absolute influence that acts at each loop step, over groups of test examples.

    A test example's share at a step is the sum of absolute influence over the training examples in
    ``result``, divided by that sum over all steps, the prelude and the coda. A step it did not run
    has share 0; a test example without any influence is left out. Noise of the sketch is absolute
    influence too: where standard errors are as large as the scores, shares are pulled towards
    uniform.

    Args:
        result: Here and below, arguments are described at the top of this module.
        tests: The test examples, None = all; or several groups, each under its name.
        title: Text above the picture.
        ax: Where to draw.

    Returns:
        The Axes. Lines are means over test examples, bands their 10th to 90th percentile. Prelude
        and coda stand beside the steps where they are not zero.

    Raises:
        ValueError: ``tests`` is an empty mapping.

    Example:
        >>> from matplotlib.figure import Figure
        >>> trajectories = [[[3.0, -1.0]], [[0.0, 2.0]]]  # (q, n, t) = (2, 1, 2)
        >>> ax = plot_step_share(trajectories, {"even": [0], "late": [1]}, ax=Figure().subplots())
        >>> [line.get_ydata().tolist() for line in ax.get_lines()]
        [[0.75, 0.25], [0.0, 1.0]]
    """
    scores = _read(result)
    named = isinstance(tests, Mapping)
    groups = dict(tests) if isinstance(tests, Mapping) else {"": tests}
    if not groups:
        raise ValueError("tests is an empty mapping. Pass at least one group, name: positions, or None for all.")
    chosen = {name: _positions("tests", group, len(scores.totals)) for name, group in groups.items()}
    shares = _shares(scores)
    used = [shares[positions][shares[positions].any(1)] for positions in chosen.values()]
    parts = [name for name, column in (("prelude", 0), ("coda", -1)) if any(group[:, column].any() for group in used)]

    ax = _axes(ax, 2.1 + _legend_height([len(chosen)] if named else [], True))
    block = _Block("", [], [])
    for rank, (name, group) in enumerate(zip(chosen, used, strict=True)):
        block.handles.append(_draw_share(ax, group, parts, rank, rank - (len(chosen) - 1) / 2))
        block.names.append(_clip(f"{name} ({len(group)})", _legend_room(ax)))
    _finish_step_plot(ax, scores.trajectories.shape[2], "share of |influence|", parts)
    _title(ax, title, "" if named else f"{len(used[0])} test example{'s' * (len(used[0]) != 1)}")
    if named:
        _legend(ax, [block], True)
    return ax


# ------------------------------------------------------------------------------- reading the input


@dataclass(frozen=True)
class _Scores:
    """A result as float64 arrays; self-influence has q = 1 and ``n_steps`` of shape ``(n,)``."""

    trajectories: Array  # (q, n, t)
    errors: Array  # (q, n, t)
    totals: Array  # (q, n)
    total_errors: Array  # (q, n)
    prelude: Array  # (q, n)
    coda: Array  # (q, n)
    indices: NDArray[np.int64]  # (q, n) in the training set
    n_steps: NDArray[np.int64]  # (q,)
    complete: bool  # all training examples are there

    @property
    def has_ends(self) -> bool:
        """Whether totals are more than the sum of their steps."""
        return bool(self.prelude.any() or self.coda.any())


def _read(result: Result, of_itself: bool = False) -> _Scores:
    """Checks a result and turns it into arrays."""
    if not isinstance(result, StepInfluence):
        return _read_plain(_array("result", result), of_itself)
    trajectories = _array("result.trajectories", result.trajectories)
    _check_shape(trajectories.shape, (2,) if of_itself else (3,), of_itself)
    q, n, depth = (1, *trajectories.shape) if of_itself else trajectories.shape

    def field(name: str, shape: tuple[int, ...]) -> Array:
        values = _array(f"result.{name}", getattr(result, name))
        expected = shape[1:] if of_itself else shape
        if values.shape != expected:
            raise ValueError(
                f"result.{name} must have shape {expected} to fit trajectories of shape "
                f"{trajectories.shape}, got {values.shape}."
            )
        return values.reshape(shape)

    n_steps = field("n_steps", (1, n) if of_itself else (q,)).astype(np.int64).ravel()
    if n_steps.min() < 1 or n_steps.max() > depth:
        raise ValueError(
            f"result.n_steps must lie in 1..{depth}, as trajectories have {depth} steps, got {n_steps.tolist()}."
        )
    complete = result.indices is None
    order = np.tile(np.arange(n), (q, 1)) if complete else field("indices", (q, n))
    return _Scores(
        trajectories=trajectories.reshape(q, n, depth),
        errors=field("trajectory_errors", (q, n, depth)),
        totals=field("influence_scores", (q, n)),
        total_errors=field("score_errors", (q, n)),
        prelude=field("prelude", (q, n)),
        coda=field("coda", (q, n)),
        indices=order.astype(np.int64),
        n_steps=n_steps,
        complete=complete,
    )


def _read_plain(trajectories: Array, of_itself: bool) -> _Scores:
    """Plain trajectories have no errors, prelude or coda, and all examples run all steps."""
    _check_shape(trajectories.shape, (2,) if of_itself else (2, 3), of_itself)
    if trajectories.ndim == 2:
        trajectories = trajectories[None]
    q, n, depth = trajectories.shape
    none = np.zeros((q, n))
    return _Scores(
        trajectories=trajectories,
        errors=np.zeros_like(trajectories),
        totals=trajectories.sum(-1),
        total_errors=none,
        prelude=none,
        coda=none,
        indices=np.tile(np.arange(n), (q, 1)),
        n_steps=np.full(n if of_itself else q, depth),
        complete=True,
    )


def _check_shape(shape: tuple[int, ...], allowed: Sequence[int], of_itself: bool) -> None:
    if len(shape) in allowed and 0 not in shape:
        return
    if of_itself:
        wanted = "self-influence, trajectories (n, t)"
        advice = "For influence between different examples use plot_trajectories."
    else:
        wanted = "trajectories (q, n, t)"
        advice = "For step_self_influence use plot_self_influence, for step_matrix plot_step_matrix."
    raise ValueError(f"result must hold {wanted} with no empty axis, got shape {shape}. {advice}")


def _array(name: str, values: ArrayLike | Tensor) -> Array:
    """Any tensor, array or nested list as finite float64 on the CPU."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers: a tensor or array, got {type(values).__name__}.") from error
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        place = tuple(int(i) for i in bad[0])
        raise ValueError(
            f"{name} has {len(bad)} of {array.size} values that are not finite, "
            f"the first ({array[place]}) at {place}. "
            "Leave those examples out, or look for the loss that overflowed."
        )
    return array


def _integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} takes integers that count from 0, got {value!r}.") from error


def _position(name: str, value: int, size: int) -> int:
    """Checks one position."""
    position = _integer(name, value)
    if not 0 <= position < size:
        raise ValueError(f"{name}={position} is out of range: the result has {size}, so pass 0 to {size - 1}.")
    return position


def _positions(name: str, values: Sequence[int] | None, size: int) -> NDArray[np.int64]:
    """Checks a set of positions; None = all."""
    if values is None:
        return np.arange(size)
    if isinstance(values, (str, int)) or not len(values):
        raise ValueError(f"{name} must be a sequence of positions with at least one entry, got {values!r}.")
    return np.array([_position(name, value, size) for value in values])


def _columns(scores: _Scores, test: int, train: Sequence[int] | None) -> NDArray[np.int64]:
    """Columns of the training examples to choose from; ``train`` are training set indices."""
    if train is None:
        return np.arange(scores.totals.shape[1])
    if isinstance(train, (str, int)) or not len(train):
        raise ValueError(f"train must be a sequence of training set indices, got {train!r}.")
    column_of = {int(index): column for column, index in enumerate(scores.indices[test])}
    indices = [_integer("train", index) for index in train]
    absent = [index for index in indices if index not in column_of]
    if absent:
        raise ValueError(
            f"train={indices} names examples that the result does not hold for test example "
            f"{test}: {absent}. It holds {len(column_of)}, such as {list(column_of)[:5]}; "
            "call step_influence without k for all."
        )
    return np.array([column_of[index] for index in indices])


def _check_texts(texts: Sequence[str] | None, scores: _Scores) -> None:
    """Texts belong to training set indices: k strongest only bound their number from below."""
    if scores.complete:
        _check_length("texts", texts, scores.totals.shape[1], "one string per training example")
    elif isinstance(texts, str) or (texts is not None and len(texts) <= scores.indices.max()):
        raise ValueError(
            "texts must hold all training examples, in order: "
            f"the result names example {scores.indices.max()}, got "
            f"{'one string' if isinstance(texts, str) else f'{len(texts)} texts'}."
        )


def _check_k(k: int | None) -> None:
    if k is not None and _integer("k", k) < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}.")


def _check_limit(limit: float | None) -> None:
    if limit is not None and not (np.isfinite(limit) and limit > 0):
        raise ValueError(f"limit must be a positive number or None, got {limit!r}.")


def _check_length(name: str, texts: Sequence[str] | None, size: int, what: str) -> None:
    if isinstance(texts, str) or (texts is not None and len(texts) != size):
        got = "one string" if isinstance(texts, str) else str(len(texts))
        raise ValueError(f"{name} must be {what}, in order: expected {size}, got {got}.")


# --------------------------------------------------------------------------- choosing what to draw


def _strongest(
    scores: _Scores, test: int, columns: NDArray[np.int64], k: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Columns of the k (None = all) largest totals >= 0 and smallest < 0, strongest first."""
    _check_k(k)
    totals = scores.totals[test, columns]
    order = np.argsort(-totals, kind="stable")
    proponents, opponents = columns[order[totals[order] >= 0]], columns[order[totals[order] < 0]]
    return proponents[:k], opponents[::-1][:k]


def _in_order(groups: tuple[NDArray[np.int64], NDArray[np.int64]]) -> NDArray[np.int64]:
    """Proponents and opponents by falling total."""
    return np.concatenate([groups[0], groups[1][::-1]])


def _rows_of_totals(
    scores: _Scores, tests: list[int], train: Sequence[int] | None, k: int
) -> list[tuple[int, int | None]]:
    """(test, column) of each row; column None is the heading of a test example."""
    rows: list[tuple[int, int | None]] = []
    for test in tests:
        groups = _strongest(scores, test, _columns(scores, test, train), k if train is None else None)
        rows += [(test, None), *((test, column) for column in _in_order(groups).tolist())]
    return rows


def _one_matrix(values: Array, pair: tuple[int, int] | None) -> tuple[Array, str]:
    """The (s, t) matrix that is asked for, and what it is."""
    if values.ndim not in (2, 4) or 0 in values.shape:
        raise ValueError(
            f"matrix must be (s, t) or (q, n, s, t) with no empty axis, got shape {values.shape}. "
            "Pass what SDIInfluence.step_matrix returned, or one pair of it."
        )
    if values.ndim == 2:
        if pair is not None:
            raise ValueError(f"pair={pair} picks from (q, n, s, t), but matrix is (s, t). Leave pair out.")
        return values, ""
    count = values.shape[0] * values.shape[1]
    if pair is None:
        return values.mean((0, 1)), f"mean of {count} pairs" if count > 1 else ""
    if isinstance(pair, int) or len(pair) != 2:
        raise ValueError(f"pair must be two positions, (test, train), got {pair!r}.")
    test, train = (_position("pair", i, size) for i, size in zip(pair, values.shape[:2], strict=True))
    return values[test, train], f"test example {test}, train position {train}"


def _shares(scores: _Scores) -> Array:
    """``(q, 1 + t + 1)`` shares of prelude, steps and coda; zeros where there is no influence."""
    parts = [scores.prelude[..., None], scores.trajectories, scores.coda[..., None]]
    sizes = np.abs(np.concatenate(parts, axis=-1)).sum(1)
    whole = sizes.sum(-1, keepdims=True)
    return np.divide(sizes, whole, out=np.zeros_like(sizes), where=whole > 0)


# --------------------------------------------------------------------------- lines, bands and bars


def _draw_line(ax: Axes, values: Array, errors: Array, styles: Sequence[_Style], rank: int) -> Line2D:
    """One trajectory with its band. Ranks that repeat a colour get another, hollow marker."""
    colour, dash, _ = styles[rank % len(styles)]
    again = rank // len(styles)
    marker = styles[(rank + again) % len(styles)][2]
    steps = np.arange(1.0, len(values) + 1)
    if len(values) > 1:
        _band(ax, steps, values - 2 * errors, values + 2 * errors, colour, 0.18)
    else:  # one step is no line: error bars, moved apart, for a band would have no width
        steps += 0.06 * (rank + 0.5) * (-1 if styles is _OPPONENT else 1)
        if errors.any():
            ax.errorbar(steps, values, 2 * errors, color=colour, linewidth=1, capsize=2, fmt="none")
    (line,) = ax.plot(
        steps, values, color=colour, linestyle=dash, linewidth=1.2, marker=marker, markersize=3.5,
        markerfacecolor="white" if again % 2 else colour, markevery=max(1, round(len(values) / 10)),
    )  # fmt: skip
    return line


def _band(ax: Axes, steps: Array, low: Array, high: Array, colour: str, alpha: float) -> None:
    if (high > low).any():  # exact scores have none
        ax.fill_between(steps, low, high, color=colour, alpha=alpha, linewidth=0)


def _draw_distribution(ax: Axes, values: Array) -> _Block:
    """Median and quantile bands over examples of ``(n, t)``; NaN = did not run that step."""
    steps = np.arange(1.0, values.shape[1] + 1)
    if len(steps) == 1:  # a band needs two points
        steps, values = np.array([0.7, 1.3]), np.repeat(values, 2, axis=1)
    median = np.nanmedian(values, axis=0)
    (line,) = ax.plot(steps, median, color=_NEUTRAL, linewidth=1.5)
    block = _Block(f"{len(values)} examples" if len(values) > 1 else "1 example", [line], ["median"])
    if len(values) > 1:
        for share, alpha in ((50, 0.3), (90, 0.15)):
            low, high = np.nanpercentile(values, [50 - share / 2, 50 + share / 2], axis=0)
            _band(ax, steps, low, high, _NEUTRAL, alpha)
            block.handles.append(Patch(color=_NEUTRAL, alpha=alpha, linewidth=0))
            block.names.append(f"middle {share}%")
    return block


def _draw_share(ax: Axes, shares: Array, parts: list[str], rank: int, offset: float) -> Line2D:
    """Mean and spread of one group's ``(q, 1 + t + 1)``; ``offset`` moves lone points apart."""
    if not len(shares):
        shares = np.zeros((1, shares.shape[1]))
    mean, (low, high) = shares.mean(0), np.quantile(shares, [0.1, 0.9], axis=0)
    depth = len(mean) - 2
    styles = [style for both in zip(*_STYLES, strict=True) for style in both]
    line = _draw_line(ax, mean[1:-1], np.zeros(depth), styles, rank)
    colour = str(line.get_color())
    places = np.arange(1.0, depth + 1)
    apart = []
    if depth == 1:
        places += 0.15 * offset
        line.set_xdata(places)
        apart += [(places[0], 1)]
    else:
        _band(ax, places, low[1:-1], high[1:-1], colour, 0.18)
    at = _places_of_ends(depth)
    apart += [(at[part] + 0.15 * (at["coda"] - depth) * offset, {"prelude": 0, "coda": -1}[part]) for part in parts]
    for place, column in apart:
        ax.vlines(place, low[column], high[column], color=colour, linewidth=1)
        ax.plot([place], [mean[column]], color=colour, marker=line.get_marker(), markersize=3.5)
    return line


def _draw_bars(ax: Axes, scores: _Scores, rows: list[tuple[int, int | None]]) -> None:
    """Totals with two standard errors; the first row is on top."""
    places = [row for row, (_, column) in enumerate(rows) if column is not None]
    pairs = tuple(np.array([rows[place] for place in places], dtype=np.int64).T)
    totals, errors = scores.totals[pairs], scores.total_errors[pairs]
    colours = [styles[0][0] for styles in _STYLES]
    ax.barh(places, totals, height=0.7, color=np.where(totals >= 0, *colours))
    if errors.any():
        ax.errorbar(totals, places, xerr=2 * errors, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
    ax.axvline(0, color=_NEUTRAL, linewidth=0.6)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    if not totals.any() and not errors.any():
        ax.set_xlim(-1, 1)
    ax.spines[["left", "top", "right"]].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 3, 5, 10]))
    factor = _scale(ax.xaxis, np.abs(totals).max() + 2 * errors.max())
    lines = ["total with", "prelude, coda"] if scores.has_ends else ["total"]
    ax.set_xlabel("\n".join([*lines, f"({factor})"] if factor else lines), fontsize=_FONT)


# --------------------------------------------------------------------------------------- heat maps


def _draw_heatmap(ax: Axes, values: Array, limit: float | None) -> None:
    """Rows as they come, the first on top; columns at 1..t; colours symmetric about zero."""
    largest = float(np.nanmax(np.abs(values)))
    bound = float(limit or largest or 1.0)  # all zero: the colour of zero, on a scale that has a centre
    rows, steps = values.shape
    image = ax.imshow(
        np.ma.masked_invalid(values),
        cmap=matplotlib.colormaps[_DIVERGING].with_extremes(bad=_NOT_RUN),
        vmin=-bound,
        vmax=bound,
        aspect="auto",
        extent=(0.5, steps + 0.5, rows - 0.5, -0.5),
    )
    # 6 points wide; the fraction leaves it room, or it would be shorter than the picture.
    bar = ax.figure.colorbar(
        image,
        ax=ax,
        fraction=min(0.3, 12 / _width(ax)),
        aspect=max(5.0, _height(ax) / 6),
        pad=0.03,
        extend="both" if largest > bound else "neither",
    )
    _small_print(bar.ax)
    label = _with_factor(_INFLUENCE, _scale(bar.ax.yaxis, bound))
    if _text_width(label.replace("\n", " "), _FONT) <= _height(ax):
        label = label.replace("\n", " ")
    bar.set_label(label, fontsize=_FONT, linespacing=1.1)
    if values.size <= 500:
        _mark_negative(ax, values, bound)
        halfway = bar.ax.get_yaxis_transform()
        bar.ax.plot([0.5], [-bound / 2], "_", color="black", markersize=4, transform=halfway)
    _step_axis(ax, steps)


def _mark_negative(ax: Axes, values: Array, bound: float) -> None:
    """A dash on clearly negative cells: in greyscale both ends of a diverging map are dark."""
    rows, columns = np.nonzero(np.nan_to_num(values) < -0.1 * bound)
    dark = values[rows, columns] < -0.6 * bound
    ax.scatter(columns + 1, rows, s=9, marker="_", linewidths=0.7, c=np.where(dark, "white", "black"))


def _draw_rows_of_steps(ax: Axes, scores: _Scores, rows: list[tuple[int, int | None]], limit: float | None) -> None:
    """The trajectories of `plot_totals`; headings are blank rows."""
    depth = scores.trajectories.shape[2]
    values = np.zeros((len(rows), depth))
    for row, (test, column) in enumerate(rows):
        if column is not None:
            values[row] = scores.trajectories[test, column]
            values[row, scores.n_steps[test] :] = np.nan
    _draw_heatmap(ax, values, limit)
    for row, (_, column) in enumerate(rows):
        if column is None:  # zero has almost, but not quite, the background's colour
            ax.axhspan(row - 0.5, row + 0.5, color=ax.get_facecolor(), linewidth=0)
    ax.tick_params(left=False, labelleft=False)
    ax.spines[:].set_visible(False)


def _split(ax: Axes) -> tuple[Axes, Axes]:
    """Divides an Axes into two that share rows, whether or not it sits in a grid of subplots."""
    ratios = (1.0, 1.7)
    if (place := ax.get_subplotspec()) is not None:
        grid = place.subgridspec(1, 2, width_ratios=ratios, wspace=0.05)
        ax.set_subplotspec(grid[0])
        other = ax.figure.add_subplot(grid[1], sharey=ax)
    else:
        left, bottom, width, height = ax.get_position().bounds
        first = width * ratios[0] / (sum(ratios) + 0.1)
        ax.set_position((left, bottom, first, height))
        second = first * ratios[1]
        other = ax.figure.add_axes((left + width - second, bottom, second, height), sharey=ax)
    return ax, _small_print(other)


# -------------------------------------------------------------------------------------------- axes


def _axes(ax: Axes | None, height: float) -> Axes:
    """The given Axes, or that of a new figure of column width."""
    if ax is None:
        ax = plt.subplots(figsize=(_COLUMN, height), layout="constrained")[1]
    return _small_print(ax)


def _small_print(ax: Axes) -> Axes:
    ax.tick_params(labelsize=_SMALL, width=0.6, length=2.5)
    ax.grid(False)
    ax.spines[:].set_linewidth(0.6)
    return ax


def _finish_step_plot(ax: Axes, steps: int, label: str, ends: list[str] | None = None) -> None:
    """The axes of a line plot over loop steps; a list of ends, maybe empty, means shares."""
    ax.spines[["top", "right"]].set_visible(False)
    _step_axis(ax, steps)
    pad = 0.6 if steps == 1 else 0.03 * (steps - 1)
    first, last = 1.0, float(steps)
    if ends:
        places = {part: _places_of_ends(steps)[part] for part in ends}
        ticks = _round_ticks(steps, _ticks_that_fit(ax))
        ax.set_xticks([*ticks, *places.values()], [*map(str, ticks), *places])
        first, last = min(first, *places.values()), max(last, *places.values())
        pad = 0.5 * (_places_of_ends(steps)["coda"] - steps)
    ax.set_xlim(first - pad, last + pad)
    if ends is None:
        ax.axhline(0, color=_NEUTRAL, linewidth=0.6, zorder=0)
        drawn = max(abs(bound) for bound in ax.dataLim.intervaly)
        if drawn == 0:
            ax.set_ylim(-1, 1)
        label = _with_factor(label, _scale(ax.yaxis, drawn))
        ax.set_ylabel(label, fontsize=_FONT, linespacing=1.1)
    else:
        ax.set_ylim(0, None if ax.dataLim.y1 > 0 else 1)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g}%"))
        ax.set_ylabel(label, fontsize=_FONT)


def _step_axis(ax: Axes, steps: int) -> None:
    ticks = _round_ticks(steps, _ticks_that_fit(ax))
    ax.set_xticks(ticks, [str(step) for step in ticks])
    ax.set_xlabel("loop step", fontsize=_FONT)


def _places_of_ends(steps: int) -> dict[str, float]:
    """Far enough from the first and last step that the words do not touch the numbers."""
    gap = max(1.0, 0.15 * steps)
    return {"prelude": 1 - gap, "coda": steps + gap}


def _round_ticks(count: int, most: int) -> NDArray[np.int64]:
    """1 and the multiples of a round stride up to ``count``, about ``most`` of them; with the last one if possible."""
    strides = [base * 10**power for power in range(9) for base in (1, 2, 4, 5, 8)]
    fitting = [stride for stride in sorted([*strides, 16, 32]) if count / stride <= most]
    stride = next((stride for stride in fitting if count % stride == 0 and stride <= 2 * fitting[0]), fitting[0])
    return np.array([1, *range(max(stride, 2), count + 1, stride)])


def _scale(axis: XAxis | YAxis, largest: float) -> str:
    """Divides tick labels by a power of ten where numbers are long; gives the factor, or nothing.

    Matplotlib's own factor, at the end of the axis, collides with titles and labels.

    Returns:
        The factor in mathtext, for the label.
    """
    power = 0 if largest == 0 or 1e-2 < largest < 1e4 else max(-300, int(np.floor(np.log10(largest))))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10.0**power:.4g}".replace("-", "−")))
    return f"$\\times 10^{{{power}}}$" if power else ""


def _with_factor(label: str, factor: str) -> str:
    """Adds the factor to a label "what (unit)"."""
    return label.replace(")", f", {factor})") if factor else label


def _ticks_that_fit(ax: Axes) -> int:
    return max(3, int(_width(ax) / 17))


def _has_layout(ax: Axes) -> bool:
    return ax.figure.get_layout_engine() is not None


def _width(ax: Axes) -> float:
    """Points; the Axes as it is now, which a layout engine may still change a little."""
    return float(ax.bbox.width / ax.figure.dpi * 72)


def _height(ax: Axes) -> float:
    return float(ax.bbox.height / ax.figure.dpi * 72)


def _row_height(ax: Axes, rows: int) -> float:
    return _height(ax) / rows


# ------------------------------------------------------------------------------------------- words


@dataclass(frozen=True)
class _Block:
    """A part of a legend under its own heading."""

    heading: str
    handles: list[Any]
    names: list[str]


def _legend_height(counts: Sequence[int], stacked: bool) -> float:
    """Inches for blocks with so many entries, below each other or side by side."""
    rows = [count + 1 for count in counts if count]
    return 0.14 * (sum(rows) if stacked else max(rows, default=0))


def _legend(ax: Axes, blocks: Sequence[_Block], stacked: bool) -> None:
    """Below the picture where a layout engine makes room for it, else inside."""
    blocks = [block for block in blocks if block.names]
    rows = 0 if stacked else 1 + max(len(block.names) for block in blocks)
    handles, names = [], []
    for block in blocks:
        # A legend fills its columns one after the other, in equal parts.
        padding = max(0, rows - 1 - len(block.names))
        heading = [block.heading] if block.heading else []
        names += [*heading, *block.names, *[" "] * padding]
        blank = Line2D([], [], linestyle="none")
        handles += [*[blank] * len(heading), *block.handles, *[blank] * padding]
    style: dict[str, Any] = {"handlelength": 2.2, "labelspacing": 0.25, "columnspacing": 1.5}
    style |= {"prop": {"family": list(_families()), "size": _SMALL}, "borderpad": 0.2}
    style |= {"ncols": 1 if stacked else len(blocks)}
    if _has_layout(ax):
        below = ax.transAxes + ScaledTranslation(0, -28 / 72, ax.figure.dpi_scale_trans)
        style |= {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": below}
        style |= {"borderaxespad": 0, "frameon": False}
    else:
        style |= {"loc": "best", "framealpha": 0.85}
    ax.legend(handles, names, **style)


def _legend_room(ax: Axes) -> float:
    """Points for the words of an entry, beside its line."""
    return _width(ax) * (1.0 if _has_layout(ax) else 0.6) - 26


def _format_totals(totals: Array) -> list[str]:
    """Signed numbers of one format, so that a column of them can be compared at a glance."""
    largest = float(np.abs(totals).max(initial=0))
    if largest == 0 or 1e-2 <= largest < 1e4:
        digits = 3 if largest < 10 else max(0, 3 - int(np.log10(largest)))
        return [f"{total:+.{digits}f}".replace("-", "−") for total in totals]
    return [f"{total:+.2e}".replace("-", "−") for total in totals]


def _name(index: int, texts: Sequence[str] | None, room: float) -> str:
    """A training example: its index in the training set and, as far as there is room, its text."""
    return _clip(f"#{index}: {texts[index]}" if texts is not None else f"#{index}", room)


def _entry(ax: Axes, total: str, index: int, texts: Sequence[str] | None) -> str:
    return f"{total}  {_name(index, texts, _legend_room(ax) - _text_width(total + '  '))}"


def _title(ax: Axes, title: str | None, default: str, taken: float = 0.0) -> None:
    """At the left edge of the picture, whose labels will take ``taken`` points of its width."""
    room = _width(ax) - max(0.0, taken - 20)
    words = _clip(default if title is None else title, room, _FONT)
    ax.set_title(words, fontsize=_FONT, loc="left", fontfamily=list(_families()))


def _label_rows(ax: Axes, names: list[str], bold: Sequence[int] = ()) -> None:
    """One label per row, smaller where rows are close."""
    size = min(_SMALL, 0.9 * _row_height(ax, len(names)))
    ax.set_yticks(np.arange(len(names)), names, fontsize=size, fontfamily=list(_families()))
    ax.tick_params(axis="y", length=0)
    for row in bold:
        ax.get_yticklabels()[row].set_fontweight("bold")


def _label_room(ax: Axes) -> float:
    """Points for labels left of an Axes: some of its width, or of the margin that is there."""
    if _has_layout(ax):
        return 0.42 * _width(ax)
    return max(20.0, min(ax.bbox.x0 / ax.figure.dpi * 72 - 20, 0.2 * _width(ax)))


def _clip(text: str, room: float, size: float = _SMALL) -> str:
    """One line of at most ``room`` points, cut with an ellipsis, safe from mathtext."""
    most = 500  # characters, more than any label holds: a book costs no more than a line
    families = _families()
    line = "".join(_drawable(char, families) for char in " ".join(text[:most].split()))
    ends = size * np.cumsum([_advance(char, families) or 0.0 for char in line])
    if len(text) > most or ends.max(initial=0) > room:
        fitting = int(np.searchsorted(ends, room - _text_width("…", size), side="right"))
        line = line[:fitting].rstrip() + "…"
    return line.replace("$", r"\$")


def _text_width(text: str, size: float = _SMALL) -> float:
    """In points, without kerning."""
    families = _families()
    return size * sum(_advance(char, families) or 0.0 for char in text)


def _drawable(char: str, families: tuple[str, ...]) -> str:
    """The character, or its escape where it is invisible or no font has it."""
    if char.isprintable() and _advance(char, families) is not None:
        return char
    return char.encode("unicode_escape").decode("ascii")


@functools.lru_cache(maxsize=4096)
def _advance(char: str, families: tuple[str, ...]) -> float | None:
    """Width of a character over the font size, in the first font that has it; None if none."""
    for family in families:
        font = font_manager.get_font(font_manager.findfont(FontProperties(family=[family])))
        if font.get_char_index(ord(char)):
            font.set_size(100, 72)
            return font.load_char(ord(char)).linearHoriAdvance / 65536 / 100
    return None


def _families() -> tuple[str, ...]:
    """The user's default font, then the installed ones that can draw what it cannot."""
    return (FontProperties().get_name(), *_installed_fallbacks())


@functools.lru_cache(maxsize=1)
def _installed_fallbacks() -> tuple[str, ...]:
    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    return tuple(name for name in _FALLBACK_FONTS if name in installed)
