"""Data sets of the Hub on the command line: read by `datasets`, remembered by name; a mistyped one is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_texts import make_tokenizer

from captum_sdi.__main__ import main
from captum_sdi.cli import places
from captum_sdi.cli.parser import build_parser
from captum_sdi.cli.recipe import Recipe
from captum_sdi.cli.tables import open_examples
from captum_sdi.data.encoder import Encoder

datasets = pytest.importorskip("datasets")

ROWS = {"train": [{"said": "a b c", "id": 1}, {"said": "d e", "id": 2}], "test": [{"said": "f g", "id": 3}]}
INDEX = "index --model . --index idx --train"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What `datasets` is asked for, in place of the Hub; it was downloaded before."""
    calls: list[Any] = []

    def load_dataset(name: str, split: str | None = None) -> Any:
        calls.append((name, split))
        if name == "org/one":
            return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS["train"])})
        if name != "org/name":
            raise FileNotFoundError(f"Couldn't find any data file of {name}.\nMore of it.")
        sets = {name: datasets.Dataset.from_list(rows) for name, rows in ROWS.items()}
        return datasets.DatasetDict(sets) if split is None else sets[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets--org--name").mkdir()
    return calls


def test_a_data_set_is_read_by_its_name(asked: list[Any]) -> None:
    encoder = Encoder(18, make_tokenizer(ends=False))
    examples = open_examples([Path("org/name")], encoder, split="train", text_column="said")
    assert [examples.description(place) for place in range(2)] == [{"id": 1, "text": "a b c"}, {"id": 2, "text": "d e"}]
    only = open_examples([Path("org/one")], encoder, text_column="said")
    assert only.digest == examples.digest
    open_examples([Path("org/name")], encoder, examples.digest, split="train", text_column="said")
    assert asked == [("org/name", "train"), ("org/one", None), ("org/name", "train")]
    with pytest.raises(ValueError, match="org/name is not what was indexed"):
        open_examples([Path("org/name")], encoder, examples.digest, split="test", text_column="said")
    with pytest.raises(ValueError, match="org/name has the splits train, test: say which one with --split"):
        open_examples([Path("org/name")], encoder)
    with pytest.raises(ValueError, match=r"^org/other is no file, and datasets cannot load it: .* of org/other\.$"):
        open_examples([Path("org/other")], encoder)


def test_an_index_remembers_the_name(asked: list[Any], tmp_path: Path) -> None:
    options = build_parser("0").parse_args([*INDEX.split(), "org/name", "--split", "train"])
    places.check_places(options)
    recipe = Recipe.from_options(options)
    recipe.write(tmp_path)
    assert Recipe.read(tmp_path) == recipe
    assert (recipe.train, recipe.split) == (("org/name",), "train")


def test_a_mistyped_name_is_one_sentence(asked: list[Any], capsys: pytest.CaptureFixture) -> None:
    assert main([*INDEX.split(), "org/nmae"]) == 1
    assert capsys.readouterr().err == (
        "captum-sdi: error: --train org/nmae is no file or folder, and the Hub does not give it: HF_HUB_OFFLINE is "
        "set, and it was never downloaded.\n"
    )
    assert main([*INDEX.split(), "trian.jsonl"]) == 1
    assert capsys.readouterr().err == "captum-sdi: error: trian.jsonl: No such file or directory\n"
    assert asked == []
