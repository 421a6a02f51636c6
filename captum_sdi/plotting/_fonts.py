"""Which installed font has which characters: no text is drawn as a row of boxes."""

from __future__ import annotations

import functools
import unicodedata
from itertools import groupby

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text

from captum_sdi.words import warn_user

_LIKELY = ("cjk", "noto sans", "hei", "ming", "song", "gothic", "unifont", "arial unicode", "droid", "han")
"""Parts of the names of fonts that have many scripts: all others need not be opened."""


def readable(ax: Axes) -> Axes:
    """Let other fonts write what the usual ones lack, in all texts of a figure.

    Returns:
        The Axes.
    """
    usual = list(matplotlib.rcParams["font.family"])
    for text in ax.figure.findobj(Text):
        assert isinstance(text, Text), "that is what was asked for"
        further = further_families(text.get_text())
        if further:
            text.set_fontfamily([*usual, *further])
    return ax


def further_families(text: str) -> list[str]:
    """Return the fonts that a text needs beside the usual ones."""
    families = [family_with(character) for character in lacking(text)]
    return list(dict.fromkeys(family for family in families if family))


def unreadable(text: str) -> str:
    """Return the characters of a text that no installed font has."""
    return "".join(character for character in lacking(text) if family_with(character) is None)


def without_boxes(text: str) -> str:
    """Write what no installed font has as a number of characters and their script, in brackets, and say so.

    Returns:
        The text, which can be drawn.

    Example:
        >>> without_boxes("plain")
        'plain'
    """
    boxes = unreadable(text)
    if not boxes:
        return text
    warn_user(
        "No installed font has some characters of these texts: their number and script is shown in brackets. Install a "
        "font, such as Noto Sans CJK, or name one in matplotlib's rcParams['font.family']."
    )
    pieces = []
    for script, characters in groupby(text, lambda character: script_of(character) if character in boxes else ""):
        run = "".join(characters)
        pieces.append(f"[{len(run)} {script}]" if script else run)
    return "".join(pieces)


def script_of(character: str) -> str:
    """Return the name of a character's script, as Unicode's names begin.

    Example:
        >>> script_of("循"), script_of("ह"), script_of("😀")
        ('CJK', 'Devanagari', 'sign')
    """
    if not character.isalpha():
        return "sign"
    script = unicodedata.name(character, "UNKNOWN").split()[0]
    return script if script == "CJK" else script.capitalize()


def lacking(text: str) -> str:
    """Return the visible characters of a text that the usual fonts lack."""
    paths = usual_fonts()
    return "".join(character for character in text if character.isprintable() and not any_has(paths, character))


def usual_fonts() -> tuple[str, ...]:
    """Return the files of the fonts that matplotlib tries in turn."""
    families = matplotlib.rcParams["font.family"]
    return tuple(font_manager.findfont(FontProperties(family=[family])) for family in families)


@functools.lru_cache(maxsize=4096)
def any_has(paths: tuple[str, ...], character: str) -> bool:
    """Tell whether one of some fonts has a character."""
    return any(font_manager.get_font(path).get_char_index(ord(character)) for path in paths)


@functools.lru_cache(maxsize=1024)
def family_with(character: str) -> str | None:
    """Return the name of an installed font that has a character; None where there is none."""
    for entry in font_manager.fontManager.ttflist:
        is_likely = any(fragment in entry.name.lower() for fragment in _LIKELY)
        if is_likely and any_has((entry.fname,), character):
            return entry.name
    return None
