"""Words that fit: measured, cut with an ellipsis, safe from mathtext."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager
from matplotlib.font_manager import FontProperties

from captum_sdi.plotting._scores import Array

FONT, SMALL = 8, 7  # points: labels; ticks and legends


def clip(text: str, room: float, size: float = SMALL) -> str:
    """One line of at most ``room`` points, cut with an ellipsis; a dollar is drawn as a dollar."""
    most = 500  # characters, more than any label holds: a book costs no more than a line
    line = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text[:most].split()))
    ends = np.cumsum(_advances(line, size))
    if len(text) > most or ends.max(initial=0) > room:
        fitting = int(np.searchsorted(ends, room - text_width("…", size), side="right"))
        line = line[:fitting].rstrip() + "…"
    return line.replace("$", r"\$")


def text_width(text: str, size: float = SMALL) -> float:
    """In points, without kerning."""
    return float(_advances(text, size).sum())


def named(index: int, texts: Sequence[str] | None, room: float) -> str:
    """A training example: its index in the training set and, as far as there is room, its text."""
    return clip(f"#{index}: {texts[index]}" if texts is not None else f"#{index}", room)


def signed(totals: Array) -> list[str]:
    """Signed numbers of one format, so that a column of them can be compared at a glance."""
    largest = float(np.abs(totals).max(initial=0))
    style = "+.2e"
    if largest == 0 or 1e-2 <= largest < 1e4:
        style = f"+.{3 if largest < 10 else max(0, 3 - int(np.log10(largest)))}f"
    return [f"{total:{style}}".replace("-", "−") for total in totals]


def _advances(text: str, size: float) -> Array:
    path = font_manager.findfont(FontProperties())
    return size * np.array([_advance(char, path) for char in text])


@functools.lru_cache(maxsize=4096)
def _advance(char: str, path: str) -> float:
    """Width over the font size; that of the box which matplotlib draws where the font lacks the character."""
    font = font_manager.get_font(path)
    if not font.get_char_index(ord(char)):
        return 1.15
    font.set_size(100, 72)
    return font.load_char(ord(char)).linearHoriAdvance / 65536 / 100
