"""What a page holds, read back from its file without a browser; and what it refuses before it writes anything."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.influence._utils.common import KMostInfluentialResults
from pages import HOSTILE, STEPS, TEST_TEXTS, TESTS, TEXTS, TRAINS, random_map, random_result, self_influence_of

from captum_sdi import StepInfluence
from captum_sdi.report import Page, write_page
from captum_sdi.report.chunks import rounded
from captum_sdi.scores.influence_map import InfluenceMap
from captum_sdi.scores.words import Words

RESULT = random_result()
LIBRARY = "d81e1e0b67d33dce8f480691c7ccceeaacff59241eb6145ea7ea795e9ff15b92"


class Contents:
    """The data of a page, unpacked."""

    def __init__(self, path: Path) -> None:
        self.document = path.read_text(encoding="utf-8")
        facts = re.search('<script type="application/json" id="facts">(.*?)</script>', self.document)
        assert facts is not None
        self.facts = json.loads(facts[1])
        packed = re.findall(
            '<script type="text/plain" id="chunk-([a-z0-9-]+)">([A-Za-z0-9+/=]*)</script>', self.document
        )
        self.chunks = {name: json.loads(zlib.decompress(base64.b64decode(text))) for name, text in packed}
        plain = re.findall('<script type="application/json" id="chunk-([a-z0-9-]+)">(.*?)</script>', self.document)
        self.plain = dict(plain)
        self.chunks |= {name: json.loads(text) for name, text in plain}

    def rows(self, name: str) -> list[Any]:
        """The rows of a list in all its chunks."""
        rows = []
        number = 0
        while f"{name}-{number}" in self.chunks:
            rows += self.chunks[f"{name}-{number}"]
            number += 1
        return rows


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "page.html"


def test_all_numbers_and_all_texts_are_there(target: Path) -> None:
    contents = Contents(write_page(RESULT, target, texts=TEXTS, test_texts=TEST_TEXTS).path)
    texts = contents.rows("texts")
    for test, row in enumerate(contents.rows("pairs")):
        assert sorted(row["train"]) == list(range(TRAINS))
        assert [texts[number][0] for number in row["text"]] == [TEXTS[index] for index in row["train"]]
        for name, field in (
            ("total", RESULT.influence_scores),
            ("error", RESULT.score_errors),
            ("steps", RESULT.trajectories),
            ("stepErrors", RESULT.trajectory_errors),
            ("prelude", RESULT.prelude),
            ("coda", RESULT.coda),
        ):
            np.testing.assert_allclose(row[name], field[test, row["train"]].numpy(), rtol=1e-5, err_msg=name)
    assert [test["entry"] for test in contents.chunks["tests"]] == [[text] for text in TEST_TEXTS]
    assert (contents.facts["tests"], contents.facts["steps"], contents.facts["hasAll"]) == (TESTS, STEPS, True)


def test_what_is_seen_first_comes_before_the_scripts_and_is_plain(target: Path) -> None:
    contents = Contents(write_page(random_result(60, 60), target, texts=["x" * 500] * 59 + ["last"]).path)
    scripts = contents.document.index("<script>")
    assert set(contents.plain) == {"tests", "pairs-0", "texts-0"}
    assert max(contents.document.index(f'id="chunk-{name}"') for name in contents.plain) < scripts
    assert contents.document.index('id="chunk-pairs-1"') > scripts
    assert len(contents.rows("pairs")) == 60
    large = Contents(write_page(RESULT, target, test_texts=["x" * 1_000_000, "y", "z"]).path)
    assert "tests" not in large.plain
    assert large.chunks["tests"][1]["entry"] == ["y"]


def test_a_text_stands_there_once(target: Path) -> None:
    contents = Contents(write_page(RESULT, target, texts=["the same"] * 28 + [{"text": "it", "id": 7}] * 2).path)
    assert sorted(contents.rows("texts")) == [["it", {"id": "7"}], ["the same"]]


def test_no_text_can_leave_its_place(target: Path) -> None:
    examples = [{"text": text, "id": HOSTILE[1]} for text in TEXTS]
    page = write_page(RESULT, target, texts=examples, test_texts=list(HOSTILE[:3]), title=HOSTILE[1] + "{{script}}")
    contents = Contents(page.path)
    document = contents.document
    for text in contents.plain.values():
        assert "<" not in text  # so no element begins or ends in it
        document = document.replace(text, "")
    assert "hacked'" not in document.replace(
        r"\u003c/script>\u003cscript>document.title='hacked'\u003c/script>", ""
    ).replace("&lt;/script&gt;&lt;script&gt;document.title=&#x27;hacked&#x27;&lt;/script&gt;", "")
    assert document.count("<script>") == 2  # the library, and the page's own
    assert document.count('"use strict";\n// What the file holds') == 1


def test_the_policy_names_what_is_in_the_file(target: Path) -> None:
    document = write_page(RESULT, target).path.read_text(encoding="utf-8")
    policy = re.search('http-equiv="Content-Security-Policy" content="(.*?)"', document)
    assert policy is not None
    for element in ("script", "style"):
        for text in re.findall(f"<{element}>(.*?)</{element}>", document, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy[1]
    assert policy[1].startswith("default-src 'none'; ")
    assert "unsafe" not in policy[1]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", document)


def test_the_library_is_the_one_that_was_looked_at() -> None:
    vendor = files("captum_sdi.report") / "vendor"
    library = (vendor / "preact-htm.js").read_bytes()
    assert hashlib.sha256(library).hexdigest() == LIBRARY
    assert f"{len(library)} bytes" in (vendor / "README.md").read_text()
    assert "MIT" in (vendor / "preact.LICENSE").read_text()
    assert "Apache License" in (vendor / "htm.LICENSE").read_text()


def test_the_same_result_makes_the_same_file(tmp_path: Path) -> None:
    first = write_page(RESULT, tmp_path / "first.html", texts=TEXTS)
    second = write_page(RESULT, tmp_path / "second.html", texts=TEXTS)
    assert first.path.read_bytes() == second.path.read_bytes()


def test_proponents_and_opponents_come_together(target: Path) -> None:
    order = RESULT.influence_scores.argsort(descending=True)
    parts = []
    for indices in (order[:, :20], order[:, -20:].flip(1)):  # ten of them are in both
        fields = {
            name: value.gather(1, indices.unflatten(1, (-1, *[1] * (value.dim() - 2))).expand(-1, -1, *value.shape[2:]))
            for name, value in vars(RESULT).items()
            if isinstance(value, torch.Tensor) and value.dim() > 1
        }
        parts.append(dataclasses.replace(RESULT, indices=indices, **fields))
    contents = Contents(write_page(parts, target, texts=TEXTS).path)
    assert [row["train"] for row in contents.rows("pairs")] == order.tolist()
    assert not contents.facts["hasAll"]
    other = dataclasses.replace(RESULT, n_steps=torch.ones(TESTS, dtype=torch.long))
    with pytest.raises(ValueError, match="of different test examples"):
        write_page([RESULT, other], target)


def test_steps_that_did_not_run_are_not_shown(target: Path) -> None:
    shallow = dataclasses.replace(RESULT, n_steps=torch.tensor([4, 2, 3]))
    contents = Contents(write_page(shallow, target).path)
    assert [len(row["steps"][0]) for row in contents.rows("pairs")] == [4, 2, 3]
    assert {number for row in contents.rows("pairs") for number in row["text"]} == {-1}


def test_shares_of_steps_are_means_over_test_examples(target: Path) -> None:
    contents = Contents(write_page(RESULT, target).path)
    sizes = torch.cat([RESULT.prelude[..., None], RESULT.trajectories, RESULT.coda[..., None]], -1).abs().sum(1)
    expected = (sizes / sizes.sum(1, keepdim=True)).mean(0)
    np.testing.assert_allclose(contents.facts["shares"]["mean"], expected.numpy(), rtol=1e-5)


def test_matrices_maps_and_self_influence(target: Path) -> None:
    matrix = torch.randn(TESTS, 2, STEPS, STEPS)
    page = write_page(
        RESULT,
        target,
        map=[random_map()],
        step_matrix=matrix,
        step_matrix_indices=[4, 8],
        self_influence=self_influence_of(RESULT),
    )
    contents = Contents(page.path)
    np.testing.assert_allclose(contents.rows("matrices")[2]["values"], matrix[2].numpy(), rtol=1e-5)
    assert contents.rows("matrices")[2]["train"] == [4, 8]
    (shown_map,) = contents.chunks["map-0-0"]
    assert shown_map["labels"] == [["core.attn", "core.mlp"], ["1", "2", "3", "4", "coda"], ["0", "1", "2", "3", "4"]]
    assert shown_map["testTokens"][1] == "<b>which</b>"
    np.testing.assert_allclose(shown_map["values"], random_map().values[0].flatten().numpy(), rtol=1e-5)
    np.testing.assert_allclose(shown_map["errors"], random_map().errors[0].flatten().numpy(), rtol=1e-5)
    totals = [total for _, _, total, *_ in contents.rows("self")]
    np.testing.assert_allclose(totals, RESULT.influence_scores[0].sort(descending=True)[0].numpy(), rtol=1e-5)


def test_a_map_of_the_library_is_shown(target: Path) -> None:
    shown = InfluenceMap(
        values=torch.randn(1, 2, 3, 2),
        axes=("step", "train_token"),
        labels={"step": ("prelude", 0, 1), "train_token": (0, 1)},
        indices=torch.tensor([[5, 6]]),
        train_tokens={5: ("a", "b"), 6: ("c",)},
    )
    contents = Contents(write_page(RESULT, target, map=shown).path)
    (row,) = contents.chunks["map-0-0"]
    assert row["labels"] == [["prelude", "1", "2"], ["0", "1"]]
    assert (row["testTokens"], row["trainTokens"]) == (None, [["a", "b"], ["c", ""]])
    assert row["errors"] is None
    assert contents.facts["maps"] == [{"axes": ["step", "train_token"], "tests": 1}]


def test_a_row_for_each_target_token_names_it(target: Path) -> None:
    rows = dataclasses.replace(RESULT, token_of=torch.tensor([[0, 1], [0, 2], [1, 1]]))
    contents = Contents(write_page(rows, target, test_texts=["first", {"text": "second", "id": 7}]).path)
    assert [test["entry"] for test in contents.chunks["tests"]] == [
        ["first", {"target token": "1"}],
        ["first", {"target token": "2"}],
        ["second", {"target token": "1", "id": "7"}],
    ]
    pytest.importorskip("pandas")
    frame = rows.to_pandas(test_texts=["first", "second"])
    assert frame.groupby("test_text")["token"].unique().map(list).to_dict() == {"first": [1, 2], "second": [1]}
    assert rows.with_words(Words(["first", "second"], None)).words.test == ["first", "second"]


def test_numbers_are_rounded_to_six_digits() -> None:
    numbers = 10.0 ** np.linspace(-20, 12, 500) * np.random.default_rng(0).normal(size=500)
    expected = [float(f"{number:.6g}") for number in numbers]
    np.testing.assert_allclose(rounded(numbers), expected, rtol=1e-15)


NOT_FINITE = dataclasses.replace(RESULT, coda=RESULT.coda.clone().index_fill_(1, torch.tensor([3]), float("nan")))


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (
            {"result": KMostInfluentialResults(torch.ones(1, 1), torch.ones(1, 1))},
            TypeError,
            "a StepInfluence, got KMost",
        ),
        ({"result": []}, ValueError, "an empty list"),
        ({"result": self_influence_of(RESULT)}, ValueError, r"goes to self_influence="),
        ({"result": NOT_FINITE}, ValueError, r"result.coda holds nan at \(0, 3\)"),
        ({"texts": TEXTS[:-1]}, ValueError, "texts must hold 30 texts, one per example, got 29"),
        ({"texts": "a text"}, TypeError, "texts must be a sequence of texts, one per example, got str"),
        ({"texts": [7] * TRAINS}, TypeError, r"texts\[\d+\] must be a text, or a mapping with a 'text', got int"),
        ({"test_texts": TEXTS}, ValueError, "test_texts must hold 3 texts"),
        ({"self_influence": RESULT}, ValueError, "pass what step_self_influence returns"),
        ({"self_influence": torch.ones(3)}, TypeError, "a StepInfluence, got Tensor"),
        ({"step_matrix": torch.ones(TESTS, 2, 4)}, ValueError, r"of shape \(q, n, s, t\)"),
        ({"step_matrix": torch.ones(TESTS, 2, 4, 4), "step_matrix_indices": [1]}, ValueError, "name the 2 training"),
        ({"map": RESULT}, TypeError, "map must be what influence_map returns, an InfluenceMap; StepInfluence has no"),
        ({"map": dataclasses.replace(random_map(), values=torch.ones(4, 3, 2, 5, 5))}, ValueError, "at most 3 test"),
        ({"map": dataclasses.replace(random_map(), errors=torch.ones(1, 3))}, ValueError, "the shape of map.values"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    target: Path, arguments: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    result = arguments.pop("result", RESULT)
    with pytest.raises(error, match=sentence):
        write_page(result, target, **arguments)
    assert not target.exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*absent to save page.html in"):
        write_page(RESULT, tmp_path / "absent" / "page.html")


def test_e2_nothing_but_a_regular_file_is_replaced_and_a_link_stays_one(tmp_path: Path) -> None:
    kept, link, pipe = tmp_path / "kept.html", tmp_path / "link.html", tmp_path / "pipe"
    kept.touch()
    link.symlink_to(kept)
    os.mkfifo(pipe)
    assert write_page(RESULT, link).path == link
    assert link.is_symlink()
    assert kept.read_text(encoding="utf-8").startswith("<!doctype html>")
    for path in (pipe, tmp_path):
        with pytest.raises(ValueError, match="name a regular file"):
            write_page(RESULT, path)
    assert pipe.is_fifo()
    with pytest.raises(TypeError, match="title must be a text, got None"):
        write_page(RESULT, kept, title=None)  # type: ignore[arg-type]


def test_a_notebook_shows_the_page_or_says_where_it_is(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_page(RESULT, target, test_texts=TEST_TEXTS)
    shown = page._repr_html_()
    assert 'sandbox="allow-scripts"' in shown
    assert shown.count("<") == 2
    monkeypatch.setattr("captum_sdi.report.page.LARGEST_IN_NOTEBOOK", 10)
    assert "open it in a browser of its own" in Page(target)._repr_html_()


def test_one_question_of_a_model_without_a_loop(target: Path) -> None:
    one = random_result(tests=1, trains=1, steps=1)
    nothing = dataclasses.replace(one, **{name: 0 * value for name, value in vars(one).items() if name in NUMBERS})
    contents = Contents(write_page(nothing, target).path)
    assert contents.facts["shares"]["mean"] == [pytest.approx(1 / 3, rel=1e-5)] * 3
    assert isinstance(nothing, StepInfluence)


NUMBERS = {"influence_scores", "trajectories", "prelude", "coda", "score_errors", "trajectory_errors"}
