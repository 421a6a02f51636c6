"""Lists packed for a page: compressed, in pieces that the browser unpacks when somebody looks at them."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGITS = 6
"""Significant digits of a number on the page; float32 has seven."""
LARGEST_PLAIN = 1_000_000
"""Characters of a chunk that is not compressed."""


def plain_chunk_element(name: str, content: Any) -> str:
    """Return an element that a browser can read at once; a large chunk is compressed all the same."""
    text = embedded_json(content)
    if len(text) > LARGEST_PLAIN:
        return chunk_element(name, content)
    return f'<script type="application/json" id="chunk-{name}">{text}</script>'


def chunk_element(name: str, content: Any) -> str:
    """Return an element that holds a chunk: JSON, compressed (RFC 1950), in base64, which no markup can hide in."""
    packed = zlib.compress(json_bytes(content), level=6)
    text = base64.b64encode(packed).decode("ascii")
    return f'<script type="text/plain" id="chunk-{name}">{text}</script>'


def embedded_json(content: Any) -> str:
    r"""Return JSON that can stand within a script element, whatever its strings say.

    Example:
        >>> embedded_json({"title": "</script>"})
        '{"title":"\\u003c/script>"}'
    """
    return json_bytes(content).decode("ascii").replace("<", r"\u003c")


def json_bytes(content: Any) -> bytes:
    """Return JSON in ASCII: half of a surrogate pair, which no encoding holds, stays an escape sequence."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


def numbered_chunks(
    name: str,
    rows: Sequence[Any],
    per_chunk: int,
    *,
    is_first_plain: bool = False,
) -> Iterable[str]:
    """Yield the elements of a long list, so many rows in each."""
    for number, start in enumerate(range(0, len(rows), per_chunk)):
        element = plain_chunk_element if is_first_plain and number == 0 else chunk_element
        yield element(f"{name}-{number}", rows[start : start + per_chunk])


def rounded(values: NDArray[np.float64]) -> Any:
    """Return numbers as nested lists, rounded to `DIGITS` significant digits.

    Example:
        >>> rounded(np.array([[1 / 3, 0.0], [-2e-9 / 3, 1234567.0]]))
        [[0.333333, 0.0], [-6.66667e-10, 1234570.0]]
    """
    sizes = np.abs(values)
    exponents = np.floor(np.log10(np.where(sizes > 0, sizes, 1.0)))
    decimals = DIGITS - 1 - exponents
    # Powers of ten are exact up to 10^22, and so is the number of whole units: one rounding, that of the quotient.
    finer = 10.0 ** np.maximum(decimals, 0)
    coarser = 10.0 ** np.maximum(-decimals, 0)
    return (np.round(values * finer / coarser) * coarser / finer).tolist()
