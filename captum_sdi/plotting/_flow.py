"""Words in lines: where each stands, and in which font, so that any script can be read."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import font_manager
from matplotlib.font_manager import FontProperties

from captum_sdi.plotting._text import FIRST_STRONG, POP, reads_leftwards, text_width
from captum_sdi.words import warn_user

_LIKELY = ("cjk", "noto sans", "hei", "ming", "song", "gothic", "unifont", "arial unicode", "droid", "han")
"""Parts of the names of fonts that have many scripts: all others need not be opened."""
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
    family: str | None
    """The font that has its characters; None: the usual one."""


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
    unreadable = ""
    used, line = 0.0, 0
    for number, word in enumerate(words):
        text = shown(word)
        missing, family = font_for(text)
        if missing:
            unreadable += missing
            text = f"[{number}]"
        width = min(room, text_width(text, size) + 0.45 * size)
        if used and used + width > room:
            used, line = 0.0, line + 1
        left = used if rightwards else room - used - width
        placed.append(Word(text, left, line, width, family))
        used += width + gap
    if unreadable:
        warn_user(
            f"No installed font has the characters {unreadable[:8]!r}: such tokens are shown as their number in the "
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


def font_for(text: str) -> tuple[str, str | None]:
    """Return the characters that no installed font has, and the name of one that has all; None for the usual one."""
    missing = lacking(text, font_manager.findfont(FontProperties()))
    if not missing:
        return "", None
    family = family_with(missing)
    return (missing, None) if family is None else ("", family)


def lacking(text: str, path: str) -> str:
    """Return the characters of a text that a font lacks."""
    font = font_manager.get_font(path)
    visible = [character for character in text if character not in FIRST_STRONG + POP]
    return "".join(character for character in visible if not font.get_char_index(ord(character)))


@functools.lru_cache(maxsize=1024)
def family_with(characters: str) -> str | None:
    """Return the name of an installed font that has all these characters; None where there is none."""
    for entry in _many_scripts():
        if not lacking(characters, entry.fname):
            return entry.name
    return None


def _many_scripts() -> Iterable[font_manager.FontEntry]:
    """Return the installed fonts that may have many scripts."""
    entries = font_manager.fontManager.ttflist
    return [entry for entry in entries if any(fragment in entry.name.lower() for fragment in _LIKELY)]


def n_lines(words: Sequence[Word]) -> int:
    """Return how many lines words take."""
    return 1 + int(np.max([word.line for word in words], initial=0))
