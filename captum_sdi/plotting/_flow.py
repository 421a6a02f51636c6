"""Words in lines: where each stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from captum_sdi.plotting._fonts import unreadable
from captum_sdi.plotting._text import reads_leftwards, text_width
from captum_sdi.words import warn_user

_MOST_LETTERS = 24
"""Of one word: a longer one is cut in the middle."""


@dataclass(frozen=True)
class Word:
    """A word and its place."""

    text: str
    left: float
    """In points, from the left edge."""
    line: int
    width: float


def flow(
    words: Sequence[str],
    room: float,
    size: float,
    *,
    gap: float = 2.0,
    rightwards: bool | None = None,
) -> list[Word]:
    """Put words in lines of at most so many points, from the right where most of them are written so.

    Args:
        words: In order; what no font has is written as its number in brackets.
        room: The width of a line.
        size: Of the letters, in points.
        gap: Between words.
        rightwards: Whether lines begin at the left; None: as the words say.

    Returns:
        One for each.
    """
    if rightwards is None:
        n_leftwards = sum(reads_leftwards(word) for word in words)
        rightwards = 2 * n_leftwards <= sum(any(map(str.isalpha, word)) for word in words)
    placed = []
    boxes = ""
    used, line = 0.0, 0
    for number, word in enumerate(words):
        text = shown(word)
        missing = unreadable(text)
        if missing:
            boxes += missing
            text = f"[{number}]"
        width = min(room, text_width(text, size) + 0.45 * size)
        if used and used + width > room:
            used, line = 0.0, line + 1
        left = used if rightwards else room - used - width
        placed.append(Word(text, left, line, width))
        used += width + gap
    if boxes:
        warn_user(
            f"No installed font has the characters {boxes[:8]!r}: such tokens are shown as their number in the "
            "text, in brackets. Install a font, such as Noto Sans CJK, or name one in matplotlib's "
            "rcParams['font.family']."
        )
    return placed


def shown(word: str) -> str:
    r"""Return a token as it is shown: its space is the gap, line breaks and tabs are signs, and nothing is too long.

    Example:
        >>> shown(" hello"), shown("\n"), shown("")
        ('hello', '↵', '·')
    """
    text = word.replace("\n", "↵").replace("\t", "→").strip(" ▁Ġ") or "·"
    if len(text) > _MOST_LETTERS:
        half = _MOST_LETTERS // 2
        text = f"{text[:half]}…{text[-half:]}"
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def n_lines(words: Sequence[Word]) -> int:
    """Return how many lines words take."""
    return 1 + int(np.max([word.line for word in words], initial=0))
