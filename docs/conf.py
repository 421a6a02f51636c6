"""What Sphinx needs to know to build the documentation: `make docs`."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "captum_sdi"
author = "the captum_sdi authors"
release = importlib.metadata.version("captum-sdi")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # the sections of a docstring: Args, Returns, Raises, Example
    "myst_nb",  # pages in Markdown, and the tutorials as they are, with their outputs
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"captum_sdi {release}"
html_show_sourcelink = False

default_role = "py:obj"  # single backticks in a docstring name a Python object, or plain code where there is none
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_type_aliases = {"Numbers": "Numbers"}  # what it stands for is long
napoleon_google_docstring = True
napoleon_numpy_docstring = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # `make tutorials` executes them; a page shows the outputs that are in the file

# The tutorials lie beside the documentation, for those who read the checkout; Sphinx wants its pages below one folder.
# A copy from before may hold tutorials that are no more.
shutil.rmtree(HERE / "tutorials", ignore_errors=True)
shutil.copytree(ROOT / "tutorials", HERE / "tutorials", ignore=shutil.ignore_patterns("*.py"))

_ROW = re.compile(r"(\s*)\|(.+)\|$")


def with_list_tables(lines: list[str]) -> list[str]:
    """Write the tables of a docstring, which are Markdown's, as those of reStructuredText.

    Args:
        lines: Of the docstring.

    Returns:
        The lines, each table a ``list-table``.
    """
    written: list[str] = []
    is_inside = False
    for line in lines:
        match = _ROW.match(line)
        if match is None:
            written += ["", line] if is_inside else [line]
            is_inside = False
            continue
        indent, row = match.groups()
        if not is_inside:
            written += ["", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
            is_inside = True
        if set(row) <= set("-| :"):
            continue
        first, *others = [cell.strip() for cell in row.split("|")]
        written.append(f"{indent}   * - {first}")
        written += [f"{indent}     - {other}" for other in others]
    return written


def process_docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Hand Sphinx a docstring's lines without tables in Markdown."""
    lines[:] = with_list_tables(lines)


def mend_links(app: Any, page: str, source: list[str]) -> None:
    """Lead links between documentation and tutorials, right in the checkout, to where the tutorials' copy lies."""
    if page.startswith("tutorials/"):
        source[0] = source[0].replace("](../docs/", "](../")
    else:
        up = "../" * page.count("/")
        source[0] = source[0].replace(f"](../{up}tutorials/", f"]({up}tutorials/")


def setup(app: Any) -> None:
    """Register what is done with docstrings and pages."""
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("source-read", mend_links)
