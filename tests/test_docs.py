"""The documentation tells the truth: its code runs, and the sentences that it explains are the library's."""

from __future__ import annotations

import importlib
import re
import shutil
import types
from pathlib import Path

import pytest
import torch
from modeling_replicas import HuginnReplica, OuroReplica
from reference import spread
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def blocks_of(page: Path) -> list[str]:
    """List the blocks of a page that say they can be run as they stand."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


ELSEWHERE = {"which_word", "quanda"}
"""Pages that tests of their own run: with a model that is hardly trained, and in another environment."""
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "tutorials" not in page.parts and page.stem not in ELSEWHERE]
PAGES = list(filter(blocks_of, PAGES))
REPLICAS = {"ByteDance/Ouro-1.4B": OuroReplica, "tomg-group-umd/huginn-0125": HuginnReplica}
"""What stands in folders of these names, where `from_pretrained` looks before it asks the Hub."""


@pytest.fixture
def replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave models of the Hub in small, with code of their own and a tokenizer, in the folder where pages run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    torch.manual_seed(0)
    for name, kind in REPLICAS.items():
        config = kind.config_class(auto_map={"AutoModelForCausalLM": f"modeling_replicas.{kind.__name__}"})
        config.auto_map["AutoConfig"] = f"modeling_replicas.{kind.config_class.__name__}"
        spread(kind(config)).save_pretrained(tmp_path / name)
        shutil.copy(Path(__file__).with_name("modeling_replicas.py"), tmp_path / name)
        words = Tokenizer(models.WordLevel({"": 0, "is": 1, "in": 2, "France.": 3, "Paris": 4}, unk_token=""))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.usefixtures("replicas")
@pytest.mark.filterwarnings("ignore:Cannot copy out:UserWarning")
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks_of(page))
    if "to_pandas" in code:
        pytest.importorskip("pandas")
    if "peft" in code:
        pytest.importorskip("peft")
    if "HrmText" in code:
        pytest.importorskip("transformers.models.hrm_text", reason="this version of transformers has no HrmText")
    exec(compile(code, str(page), "exec"), {"__name__": page.stem})


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md")))
    named = set(re.findall(r":: (\S+)", text))
    missing = []
    for package in ("", ".unrolled", ".data", ".models", ".models.programs", ".preconditioners", ".evaluate", ".tasks"):
        module = importlib.import_module(f"captum_sdi{package}")
        for name in module.__all__:
            home = getattr(getattr(module, name), "__module__", None)
            is_code = isinstance(getattr(module, name), type | types.FunctionType)
            if is_code and named.isdisjoint({module.__name__, home, f"{home}.{name}"}):
                missing.append(f"{module.__name__}.{name}")
    assert missing == []


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
