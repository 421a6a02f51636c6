"""Words that fit: measured, cut with an ellipsis, safe from mathtext."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager
from matplotlib.font_manager import FontProperties

from captum_sdi.plotting._arguments import Array

FONT, SMALL = 8, 7  # points: labels; ticks and legends
_MOST_CHARACTERS = 500  # more than any label holds: a book costs no more than a line


def clip(text: str, room: float, size: float = SMALL) -> str:
    """Return a line of at most ``room`` points, cut with an ellipsis; dollars stay dollars."""
    words = text[:_MOST_CHARACTERS].split()
    line = "".join(map(_printable, " ".join(words)))
    ends = np.cumsum(_advances(line, size))
    if len(text) > _MOST_CHARACTERS or ends.max(initial=0) > room:
        room_before_ellipsis = room - text_width("…", size)
        fitting = int(np.searchsorted(ends, room_before_ellipsis, side="right"))
        line = line[:fitting].rstrip() + "…"
    return line.replace("$", r"\$")


def text_width(text: str, size: float = SMALL) -> float:
    """Return the width of a text in points, without kerning."""
    return float(_advances(text, size).sum())


def example_name(index: int, texts: Sequence[str] | None) -> str:
    """Return a training example's index in the training set and, if there are texts, its text."""
    if texts is None:
        return f"#{index}"
    return f"#{index}: {texts[index]}"


def signed_numbers(totals: Array) -> list[str]:
    """Return signed numbers of one format, so that a column of them can be compared at a glance."""
    largest = float(np.abs(totals).max(initial=0))
    if 0 < largest < 1e-2 or largest >= 1e4:
        style = "+.2e"
    elif largest < 10:
        style = "+.3f"
    else:
        decimals = max(0, 3 - int(np.log10(largest)))
        style = f"+.{decimals}f"
    return [format(total, style).replace("-", "−") for total in totals]


def _printable(character: str) -> str:
    return character if character.isprintable() else "\ufffd"


def _advances(text: str, size: float) -> Array:
    """Return the width of each character in points."""
    path = font_manager.findfont(FontProperties())
    widths = [_advance(character, path) for character in text]
    return size * np.array(widths)


@functools.lru_cache(maxsize=4096)
def _advance(character: str, path: str) -> float:
    """Return a character's width over the font size."""
    font = font_manager.get_font(path)
    if not font.get_char_index(ord(character)):
        return 1.15  # of the box that is drawn in its place
    font.set_size(100, 72)
    glyph = font.load_char(ord(character))
    return glyph.linearHoriAdvance / 65536 / 100
