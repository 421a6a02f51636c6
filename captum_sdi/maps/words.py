"""Tokens as text, from whatever knows how to write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Words = Callable[[Sequence[int]], Sequence[str]]
"""From the tokens of a text to one string for each."""

UNFINISHED = "\ufffd"
"""What decoders write for the first bytes of a character whose last ones are in the next token."""


def words_by(tokenizer: Any) -> Words | None:
    """Return how tokens are written.

    Args:
        tokenizer: Something with ``decode``, a function from the ids of a text to one string for each, or None.

    Returns:
        A function from the ids of a text to its words; None for None.

    Raises:
        TypeError: If it is none of these.

    Example:
        >>> words_by(lambda ids: [str(token) for token in ids])([5, 7])
        ['5', '7']
    """
    if tokenizer is None:
        return None
    decode = getattr(tokenizer, "decode", None)
    if callable(decode):
        return lambda ids: decoded_words(decode, ids)
    if callable(tokenizer):
        return tokenizer
    raise TypeError(
        f"tokenizer= must have decode(ids), or be a function from the ids of a text to one string for each; got "
        f"{type(tokenizer).__name__}."
    )


def decoded_words(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[str]:
    """Decode token by token; a character that several tokens share is written at its last one.

    Returns:
        One string for each token.

    Example:
        >>> as_bytes = lambda ids: bytes(ids).decode(errors="replace")
        >>> decoded_words(as_bytes, [0x61, 0xC3, 0xA9])
        ['a', '', 'é']
    """
    words: list[str] = []
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = decode(waiting)
        if UNFINISHED in text and len(waiting) < 4:
            words.append("")
            continue
        words.append(text)
        waiting = []
    if waiting and words:
        words[-1] = decode(waiting)
    return words
