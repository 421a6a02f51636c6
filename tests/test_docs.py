"""The documentation tells the truth: its code runs, and the sentences that it explains are the library's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def blocks_of(page: Path) -> list[str]:
    """List the blocks of a page that say they can be run as they stand."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


ELSEWHERE = {"which_word", "quanda"}
"""Pages that tests of their own run: with a model that is hardly trained, and in another environment."""
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "tutorials" not in page.parts and page.stem not in ELSEWHERE]
PAGES = list(filter(blocks_of, PAGES))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore:Cannot copy out:UserWarning")
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks_of(page))
    if "to_pandas" in code:
        pytest.importorskip("pandas")
    if "HrmText" in code:
        pytest.importorskip("transformers.models.hrm_text", reason="this version of transformers has no HrmText")
    exec(compile(code, str(page), "exec"), {"__name__": page.stem})


def test_every_sentence_that_is_explained_is_one_of_ours() -> None:
    explained = re.findall(r"^## (.*)$", (DOCS / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "captum_sdi").rglob("*.py")]
    words = re.compile(r"[^a-z]+")
    said = [words.sub(" ", source) for source in sources]
    assert len(explained) > 5
    for sentence in explained:
        if sentence.startswith("An error of "):  # another library's
            continue
        assert any(words.sub(" ", sentence) in source for source in said), sentence
