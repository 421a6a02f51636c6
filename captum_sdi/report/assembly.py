"""The HTML file, put together: style, library, scripts and data in one template, and a policy that lets nothing in."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from captum_sdi.report.chunks import embedded_json

LIBRARY = "preact-htm.js"
SCRIPTS = ("chunks.js", "numbers.js", "ranking.js", "tokens.js", "charts.js", "cards.js", "views.js", "page.js")
"""The page's own scripts in the order in which they use each other."""


def assembled(
    title: str,
    facts: dict[str, Any],
    first_chunks: Iterable[str],
    chunks: Iterable[str],
) -> str:
    """Return the whole page.

    Args:
        title: What the window's bar says.
        facts: What the page knows before it unpacks anything.
        first_chunks: Elements that the first test example is drawn from, before a browser reads any further.
        chunks: All others, as `chunk_element` makes them.

    Returns:
        An HTML document that refers to nothing outside itself.
    """
    style = asset("page.css")
    library = vendored(LIBRARY)
    own_script = "\n".join(asset(name) for name in SCRIPTS)
    parts = {
        "policy": content_policy(scripts=[library, own_script], style=style),
        "title": html.escape(title),
        "style": style,
        "facts": embedded_json(facts),
        "first_chunks": "\n".join(first_chunks),
        "chunks": "\n".join(chunks),
        "library": library,
        "script": own_script,
    }
    page = []
    for piece in asset("template.html").split("{{"):  # split once, so that no part is read as a template
        name, end, rest = piece.partition("}}")
        page.append(parts[name] + rest if end else piece)
    return "".join(page)


def content_policy(scripts: Iterable[str], style: str) -> str:
    """Return a Content-Security-Policy: these scripts and this style may be used, nothing may be loaded."""
    allowed_scripts = " ".join(map(source_hash, scripts))
    return (
        f"default-src 'none'; script-src {allowed_scripts}; style-src {source_hash(style)}; "
        "base-uri 'none'; form-action 'none'"
    )


def source_hash(text: str) -> str:
    """Return how a policy names the text of an element.

    Example:
        >>> source_hash("")
        "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
    """
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def asset(name: str) -> str:
    """Return a file of the page itself."""
    return (folder() / "assets" / name).read_text(encoding="utf-8")


def vendored(name: str) -> str:
    """Return a file of another project, which travels inside the page."""
    return (folder() / "vendor" / name).read_text(encoding="utf-8")


def folder() -> Traversable:
    """Return where this package's files are."""
    return files("captum_sdi.report")
