"""Words that fit: measured, cut with an ellipsis, safe from mathtext."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager, ft2font
from matplotlib.font_manager import FontProperties

from captum_sdi.plotting._arguments import Array
from captum_sdi.plotting._fonts import any_has, without_boxes

FONT, SMALL = 8, 7  # points: labels; ticks and legends
FIRST_STRONG, POP = "\u2068", "\u2069"  # Unicode's isolate: what is inside orders nothing outside
_REORDERS = hasattr(ft2font, "__libraqm_version__")  # from 3.11 on; before, matplotlib draws as it stands
_MOST_CHARACTERS = 500  # more than any label holds: a book costs no more than a line


def clip(
    text: str,
    room: float,
    size: float = SMALL,
    lines: int = 1,
) -> str:
    """Return lines of at most ``room`` points, the last one cut with an ellipsis; dollars stay dollars."""
    words = text[:_MOST_CHARACTERS].split()
    line = without_boxes("".join(map(_printable, " ".join(words))))
    ends = np.cumsum(_advances(line, size))
    is_longer = len(text) > _MOST_CHARACTERS or ends.max(initial=0) > room
    fitting = int(np.searchsorted(ends, room, side="right"))
    last_space = line.rfind(" ", 0, fitting + 1)
    if lines > 1 and is_longer and last_space > fitting // 2:
        first, others = line[:last_space], line[last_space + 1 :]
        if first.count(FIRST_STRONG) > first.count(POP):
            others = FIRST_STRONG + others
        return clip(first, room, size) + "\n" + clip(others, room, size, lines - 1)
    if is_longer:
        room_before_ellipsis = room - text_width("…", size)
        fitting = int(np.searchsorted(ends, room_before_ellipsis, side="right"))
        line = line[:fitting].rstrip() + "…"
    line += POP * (line.count(FIRST_STRONG) - line.count(POP))  # the end was cut off
    return line.replace("$", r"\$")


def text_width(text: str, size: float = SMALL) -> float:
    """Return the width of a text in points, without kerning."""
    return float(_advances(text, size).sum())


def example_name(index: int, texts: Sequence[str] | None) -> str:
    """Return a training example's index in the training set and, if there are texts, its text."""
    if texts is None:
        return f"#{index}"
    return f"#{index}: {isolated(texts[index])}"


def isolated(text: str) -> str:
    """Keep a text that is put between other words apart: written from right to left, it would reorder their numbers.

    Returns:
        The text, in Unicode's isolate where it needs one.

    Example:
        >>> isolated("left to right")
        'left to right'
    """
    if not (_REORDERS and reads_leftwards(text)):
        return text
    return FIRST_STRONG + text + POP


def reads_leftwards(text: str) -> bool:
    """Say whether a text has letters that are written from right to left.

    Returns:
        False for numbers and signs alone.

    Example:
        >>> reads_leftwards("שלום"), reads_leftwards("hello")
        (True, False)
    """
    return any(unicodedata.bidirectional(character) in ("R", "AL") for character in text[:_MOST_CHARACTERS])


def signed_numbers(totals: Array) -> list[str]:
    """Return signed numbers of one format, so that a column of them can be compared at a glance."""
    largest = float(np.abs(totals).max(initial=0))
    if largest == 0:
        return ["0"] * len(totals)
    if 0 < largest < 1e-2 or largest >= 1e4:
        style = "+.2e"
    elif largest < 10:
        style = "+.3f"
    else:
        decimals = max(0, 3 - int(np.log10(largest)))
        style = f"+.{decimals}f"
    return [format(total, style).replace("-", "−") for total in totals]


def _printable(character: str) -> str:
    return character if character.isprintable() or character in FIRST_STRONG + POP else "\ufffd"


def _advances(text: str, size: float) -> Array:
    """Return the width of each character in points."""
    path = font_manager.findfont(FontProperties())
    widths = [_advance(character, path) for character in text]
    return size * np.array(widths)


@functools.lru_cache(maxsize=4096)
def _advance(character: str, path: str) -> float:
    """Return a character's width over the font size."""
    if character in FIRST_STRONG + POP:
        return 0.0
    if not any_has((path,), character):
        return 1.15  # a little more than another font's widest letters take
    font = font_manager.get_font(path)
    font.set_size(100, 72)
    glyph = font.load_char(ord(character))
    return glyph.linearHoriAdvance / 65536 / 100
