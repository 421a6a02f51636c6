"""Every link between the files of the repository leads to a file, and to a heading that is there."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the source distribution has no benchmarks", allow_module_level=True)
BUILT = {"_build", "jupyter_execute"}
TARGET = re.compile(r"\]\(<?([^)\s>]+)>?\)|<(?:img|a)[^>]* (?:src|href)=\"([^\"]+)\"")


def pages() -> Iterator[Path]:
    """The files that hold links: those of the repository itself, not what is built or copied."""
    for folder in (ROOT, ROOT / "docs", ROOT / "benchmarks", ROOT / "tutorials"):
        found = sorted(folder.rglob("*.md")) + sorted(folder.rglob("*.ipynb")) if folder != ROOT else ROOT.glob("*.md")
        for page in found:
            inside = page.relative_to(ROOT).parts
            if not BUILT.intersection(inside) and inside[:2] != ("docs", "tutorials"):
                yield page


@cache
def text_of(page: Path) -> str:
    """The prose of a page: no code, in a notebook no outputs."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n".join("".join(source) for source in cells)
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


@cache
def anchors_of(page: Path) -> set[str]:
    """What the headings of a page are called in links, by the rule of GitHub and MyST."""
    anchors = set()
    for heading in re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE):
        kept = [char for char in heading.strip().lower() if char in " -_" or unicodedata.category(char)[0] in "LN"]
        anchors.add("".join(kept).replace(" ", "-"))
    return anchors


def is_there(page: Path, link: str) -> bool:
    """Whether a link from a page leads somewhere; one to the network is asked for by `make docs-links`."""
    path, _, anchor = link.partition("#")
    if re.match(r"[a-z]+:", link):
        return True
    target = (page.parent / path).resolve() if path else page
    if target.is_relative_to(ROOT / "docs" / "tutorials"):  # a copy, which is there once the documentation was built
        return False
    return target.exists() and (not anchor or target.suffix not in (".md", ".ipynb") or anchor in anchors_of(target))


PAGES = list(pages())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    links = ["".join(found) for found in TARGET.findall(text_of(page))]
    assert [link for link in links if not is_there(page, link)] == []


def test_links_out_of_the_documentation_are_those_that_its_build_mends() -> None:
    """Others would be right in the checkout, and lead a reader of the built site to a file for downloading."""
    for page in PAGES:
        links = ["".join(found) for found in TARGET.findall(text_of(page))]
        targets = [(page.parent / link.partition("#")[0]).resolve() for link in links if ":" not in link]
        if page.is_relative_to(ROOT / "docs"):
            strangers = [target for target in targets if not target.is_relative_to(ROOT / "docs")]
            assert [target for target in strangers if target.parent != ROOT / "tutorials"] == [], page


def test_there_are_links() -> None:
    found = {page: TARGET.findall(text_of(page)) for page in PAGES}
    assert len(found[ROOT / "README.md"]) > 20
    assert sum(map(len, found.values())) > 60
    assert not is_there(ROOT / "README.md", "docs/nothing.md")
    assert not is_there(ROOT / "README.md", "docs/faq.md#nothing")
    assert is_there(ROOT / "README.md", "docs/faq.md#what-is-the-unit")
