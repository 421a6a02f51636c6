"""Texts whose words are tinted by influence: which words found their sources where, and at which loop step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from captum_sdi.plotting._arguments import Array, check_integer, check_limit, check_position
from captum_sdi.plotting._axes import column_axes, height_in_points, set_title, width_in_points
from captum_sdi.plotting._colours import robust_bound
from captum_sdi.plotting._flow import Word, flow, n_lines
from captum_sdi.plotting._fonts import readable
from captum_sdi.plotting._maps import TEST_TEXT, TRAIN_TEXT, check_map, names_along, pair_name, values_along
from captum_sdi.plotting._text import FONT, SMALL, signed_numbers, text_width
from captum_sdi.scores.influence_map import InfluenceMap

_WIDE = 6.8  # inches: both columns of a paper
_LINE = 1.75 * FONT  # the height of a line of words
_MOST_STEPS = 16


@dataclass(frozen=True)
class Passage:
    """A text with a number for each word."""

    heading: str
    words: list[str]
    values: Array
    bound: float
    """At which its colours saturate."""
    shows_scale: bool

    @property
    def beyond(self) -> NDArray[np.bool_]:
        """Which words lie beyond the colours."""
        return np.abs(self.values) > self.bound * (1 + 1e-9)


def plot_tokens(
    map: InfluenceMap,
    test: int = 0,
    train: int = 0,
    *,
    token: int | None = None,
    limit: float | None = None,
    title: str | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the test text above, the train text below, every word tinted by its influence: blue helps, red harms.

    A text is drawn for each of the map's token or position axes, summed over all other axes. ``train`` is the place of
    the train example among the test example's, from 0. ``token``, a place along "token", asks of one target alone,
    which is outlined. Tokens that lie beyond the colours have an outline of dots. Without a tokenizer words are their
    positions. The other arguments are described in `captum_sdi.plotting`; a new figure is 6.8 inches wide.

    Returns:
        The Axes.

    Raises:
        ValueError: If the map has no axis along a text, or no such token.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> values = torch.tensor([[[0.5, -0.25]]])
        >>> words = {7: ("hello", "world")}
        >>> split = InfluenceMap(
        ...     values, ("train_token",), {"train_token": (0, 1)}, indices=torch.tensor([[7]]), train_tokens=words)
        >>> ax = plot_tokens(split, ax=Figure().subplots())
        >>> [text.get_text() for text in ax.texts]
        ['train example 7: +0.250', '−0.500', '+0.500', 'hello', 'world']
    """
    split = check_map(map)
    check_limit(limit)
    passages = _passages(split, test, train, token, limit)
    default_title = pair_name(split, test, train)
    return _draw(
        passages,
        default_title if title is None else title,
        width,
        ax,
        outlined=token,
    )


def plot_token_steps(
    map: InfluenceMap,
    test: int = 0,
    train: int = 0,
    *,
    axis: str | None = None,
    limit: float | None = None,
    title: str | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one text for each loop step, its words tinted by the influence at that step.

    ``axis`` is the map's axis along a text, None = the first it has; steps are those of its axis "step", or else of
    "train_step". Of more than 16 steps, 16 are drawn that lie evenly apart. The other arguments are those of
    `plot_tokens`.

    Returns:
        The Axes.

    Raises:
        ValueError: If the map has no axis along a text, or none along steps.
    """
    split = check_map(map)
    check_limit(limit)
    text_axes = [name for name in split.axes if name in (*TEST_TEXT, *TRAIN_TEXT)]
    steps = [name for name in split.axes if name in ("step", "train_step")]
    if not text_axes or not steps or axis not in (None, *text_axes):
        raise ValueError(f"plot_token_steps needs an axis along a text and one along steps; the map has {split.axes}.")
    text_axis = axis or text_axes[0]
    values = values_along(split, (steps[0], text_axis), test, train)
    words = names_along(split, text_axis, test, train)
    names = names_along(split, steps[0], test, train)
    bound = limit or robust_bound(values) or 1.0
    passages: list[Passage] = []
    for place in _shown_steps(values, names):
        heading = names[place] if names[place] in ("prelude", "coda") else f"step {names[place]}"
        passages.append(_passage(heading, words, values[place], bound, shows_scale=not passages))
    default_title = pair_name(split, test, train)
    return _draw(passages, default_title if title is None else title, width, ax)


def _passages(
    split: InfluenceMap,
    test: int,
    train: int,
    token: int | None,
    limit: float | None,
) -> list[Passage]:
    """Return the texts of a map: that of the test example first."""
    passages = []
    for side, axes in (("test", TEST_TEXT), ("train", TRAIN_TEXT)):
        for axis in axes:
            if axis not in split.axes:
                continue
            values = values_along(split, (axis,), test, train)
            if token is not None and axis != "token":
                by_token = values_along(split, ("token", axis), test, train) if "token" in split.axes else None
                if by_token is None:
                    raise ValueError(f"token={token} asks of one target, but the map's axes are {split.axes}.")
                values = by_token[check_position("token", check_integer("token", token), len(by_token))]
            index = test if side == "test" else int(split.indices[test, train])
            words = names_along(split, axis, test, train)
            bound = limit or robust_bound(values) or 1.0
            passages.append(_passage(f"{side} example {index}", words, values, bound, shows_scale=True))
    if not passages:
        raise ValueError(f"plot_tokens needs an axis along a text, such as 'train_token'; the map has {split.axes}.")
    return passages


def _passage(
    heading: str,
    words: Sequence[str],
    values: Array,
    bound: float,
    *,
    shows_scale: bool,
) -> Passage:
    """Return a text without the empty places behind its end, its total in the heading."""
    ends = [place for place, word in enumerate(words) if word]
    length = 1 + max(ends, default=-1)
    total = signed_numbers(np.array([values.sum()]))[0]
    return Passage(
        f"{heading}: {total}",
        list(words[:length]),
        values[:length],
        bound,
        shows_scale,
    )


def _shown_steps(values: Array, names: Sequence[str]) -> list[int]:
    """Return the places of the steps that are drawn: a prelude and coda only where something happens in them."""
    places = [place for place, name in enumerate(names) if name not in ("prelude", "coda") or values[place].any()]
    if len(places) <= _MOST_STEPS:
        return places
    chosen = np.linspace(0, len(places) - 1, _MOST_STEPS).round().astype(int)
    return [places[number] for number in chosen]


def _draw(
    passages: Sequence[Passage],
    title: str,
    width: float | None,
    ax: Axes | None,
    *,
    outlined: int | None = None,
) -> Axes:
    """Draw texts below each other, in units of points; the place ``outlined`` of the first one has an outline."""
    inches = width or _WIDE
    room = 72 * inches - 16 if ax is None else width_in_points(ax)
    flows = [flow(passage.words, room, FONT) for passage in passages]
    heights = [_LINE * (n_lines(words) + 1.25) for words in flows]
    needed = sum(heights)
    available = needed if ax is None else height_in_points(ax)
    if needed > 1.2 * available:
        raise ValueError(
            f"The texts take {needed / 72:.1f} inches of height, and ax has {available / 72:.1f}. Pass a taller one, "
            "or none."
        )
    ax = column_axes(ax, needed / 72 + 0.35, inches)
    ax.set_xlim(0, room)
    ax.set_ylim(max(needed, available), 0)
    ax.axis("off")
    top = 0.0
    for passage, words, height in zip(passages, flows, heights, strict=True):
        ax.text(
            0,
            top + 0.5 * _LINE,
            passage.heading,
            fontsize=SMALL,
            va="center",
            parse_math=False,
        )
        if passage.shows_scale:
            exceeded = any(bool(other.beyond.any()) for other in passages if other.bound == passage.bound)
            _draw_scale(ax, passage.bound, top + 0.5 * _LINE, room, exceeded=exceeded)
        _draw_words(ax, passage, words, top + _LINE, outlined=outlined)
        outlined = None
        top += height
    set_title(ax, title, "")
    return readable(ax)


def _draw_words(
    ax: Axes,
    passage: Passage,
    words: Sequence[Word],
    top: float,
    *,
    outlined: int | None,
) -> None:
    """Draw the words of a text in tinted boxes."""
    shares = np.clip(passage.values / passage.bound, -1, 1)
    exceeds_bound = passage.beyond
    tints = matplotlib.colormaps["RdBu"](0.5 + 0.5 * shares)
    foreground = matplotlib.rcParams["text.color"]
    for number, word in enumerate(words):
        y = top + word.line * _LINE
        box = Rectangle(
            (word.left, y),
            word.width,
            0.9 * _LINE,
            facecolor=tints[number],
            linewidth=0.9,
        )
        if number == outlined or exceeds_bound[number]:
            box.set_edgecolor(foreground)
            box.set_linestyle("-" if number == outlined else ":")
        ax.add_patch(box)
        ax.text(
            word.left + word.width / 2,
            y + 0.45 * _LINE,
            word.text,
            fontsize=FONT,
            ha="center",
            va="center",
            color="white" if abs(shares[number]) > 0.72 else "black",
            parse_math=False,
        )


def _draw_scale(
    ax: Axes,
    bound: float,
    middle: float,
    room: float,
    *,
    exceeded: bool,
) -> None:
    """Draw the colours from minus the bound to the bound, at the right end of a heading."""
    low, high = signed_numbers(np.array([-bound, bound]))
    if exceeded:
        low = f"dotted: beyond  {low}"
    right = room - text_width(high, SMALL) - 4
    left = right - 60
    half = 0.25 * FONT
    ramp = np.linspace(-1, 1, 64)[np.newaxis]
    extent = (left, right, middle + half, middle - half)
    ax.imshow(ramp, cmap="RdBu", vmin=-1, vmax=1, extent=extent, aspect="auto", zorder=0)
    ax.text(left - 3, middle, low, fontsize=SMALL, ha="right", va="center")
    ax.text(right + 3, middle, high, fontsize=SMALL, ha="left", va="center")
