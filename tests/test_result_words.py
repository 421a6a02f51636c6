"""Results know what their examples say: from the data sets, through a file, to a table and a page."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from pages import TEST_TEXTS, TEXTS, TRAINS, random_result
from safetensors import safe_open
from safetensors.torch import save_file
from test_report import Contents
from test_texts import make_tokenizer
from torch.utils.data import DataLoader, Subset

import captum_sdi
from captum_sdi import SDIInfluence, StepInfluence, plotting
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
from captum_sdi.report import write_page
from captum_sdi.scores.words import NOTE, Words

TRAIN = [{"text": "a b c", "id": "first"}, "c d \n e", {"prompt": "a ", "completion": "b"}, "h g"]
TEST = [{"prompt": "a b ", "completion": "c d"}, "e f"]


@pytest.fixture(scope="module")
def sdi() -> SDIInfluence:
    torch.manual_seed(0)
    config = LoopedGPTConfig(vocab_size=18, n_embd=8, n_head=2, n_positions=8, n_loops=2)
    train = captum_sdi.texts(TRAIN, make_tokenizer(ends=False))
    return SDIInfluence(LoopedGPTForCausalLM(config), train, batch_size=4)


@pytest.fixture(scope="module")
def test_set() -> captum_sdi.data.texts.Texts:
    return captum_sdi.texts(TEST, make_tokenizer(ends=False))


def test_a_result_knows_both_sides(sdi: SDIInfluence, test_set: object, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    result = sdi.step_influence(test_set, k=2)
    frame = result.to_pandas()
    assert frame["test_text"].tolist() == ["a b c d", "a b c d", "e f", "e f"]
    everything = ["a b c", "c d \n e", "a b", "h g"]
    assert frame["text"].tolist() == [everything[index] for index in frame["train"]]
    result.to(torch.float64).save(tmp_path / "result")
    loaded = StepInfluence.load(tmp_path / "result")
    assert loaded.to_pandas()["text"].tolist() == frame["text"].tolist()
    used = set(frame["train"])
    assert [loaded.words.train[index] for index in range(4) if index not in used] == [""] * (4 - len(used))
    contents = Contents(write_page([loaded, loaded], tmp_path / "page.html").path)
    assert [test["entry"] for test in contents.chunks["tests"]] == [["a b c d", {}, [[4, 7]]], ["e f"]]
    assert "words" not in repr(loaded)


def test_a_part_of_a_data_set_remembers_its_words(sdi: SDIInfluence, test_set: object) -> None:
    part = Subset(Subset(sdi.train_dataloader.dataset, [3, 2, 0]), [2, 0])
    result = SDIInfluence(sdi.model, part, batch_size=2).step_influence(Subset(test_set, [1]))
    assert list(result.words.train) == [{"text": "a b c", "id": "first"}, {"text": "h g"}]
    assert list(result.words.test) == [{"text": "e f"}]
    assert pickle.loads(pickle.dumps(result)).words.train[1] == {"text": "h g"}


def test_a_picture_says_what_the_result_knows(sdi: SDIInfluence, test_set: object) -> None:
    result = sdi.step_influence(test_set)
    bars = plotting.plot_totals(result, tests=[1], k=1, ax=Figure(figsize=(9, 4)).subplots())
    assert bars.get_yticklabels()[0].get_text() == "test 1: e f"
    everything = ("a b c", "c d e", "a b", "h g")
    lines = plotting.plot_trajectories(result, ax=Figure(figsize=(9, 4)).subplots()).get_legend().get_texts()
    named = [line.get_text().partition(": ")[2] for line in lines if "#" in line.get_text()]
    assert named
    assert set(named) <= set(everything)
    other = (
        plotting.plot_trajectories(result, texts=["mine"] * 4, ax=Figure(figsize=(9, 4)).subplots())
        .get_legend()
        .get_texts()
    )
    assert sum(line.get_text().endswith(": mine") for line in other) == len(named)


def test_a_printed_result_shows_the_strongest_and_what_they_say() -> None:
    words = Words(test=["a\nb", "c", "d", "e"], train=["x" * 70, "first", {"text": "second", "id": 7}])
    totals = torch.tensor([[-0.5, 2.0, 0.25]]).expand(4, 3)
    steps = torch.stack([totals, -2 * totals], 2)
    zero = torch.zeros(4, 3)
    ranked = StepInfluence(None, totals, steps, zero, zero, torch.full((4,), 2), zero + 0.1, 0 * steps, None, words)
    lines = str(ranked).splitlines()
    assert lines[0] == "StepInfluence of 4 test examples x 3 training examples, 2 loop steps"
    assert lines[2:5] == [
        "test 0:  a b",
        "     #1  +2.00e+00    1e-01     1  first",
        "     #2  +2.50e-01    1e-01     1  second",
    ]
    assert lines[5].endswith(f"  {'x' * 59}…")
    assert lines[-1] == "... and 1 more test example"
    tokens = dataclasses.replace(ranked, token_of=torch.tensor([[0, 4], [0, 5], [1, 2], [1, 3]]))
    assert "test 1, token 2:  c\n" in str(tokens)
    assert "4 target tokens x 3 training examples" in str(tokens)
    opponents = dataclasses.replace(
        ranked, indices=torch.tensor([[0, 2]]).expand(4, 2), influence_scores=totals[:, [0, 2]]
    )
    assert re.findall(r"#(\d)", str(opponents))[:2] == ["0", "2"]
    alone = StepInfluence(None, totals[0], steps[0], zero[0], zero[0], torch.tensor([2] * 3), zero[0], 0 * steps[0])
    assert re.findall(r"#(\d)", str(alone)) == ["1", "2", "0"]
    nothing = StepInfluence(None, totals[:0], steps[:0], zero[:0], zero[:0], torch.ones(0), zero[:0], steps[:0])
    assert str(nothing) == "StepInfluence of 0 test examples x 3 training examples, 2 loop steps"


def test_loaders_other_tests_and_self_influence(sdi: SDIInfluence, test_set: object) -> None:
    pytest.importorskip("pandas")
    loaded = sdi.step_influence(DataLoader(test_set, batch_size=1))
    assert loaded.words.test[0] == {"text": "a b c d", "learned_characters": [[4, 7]]}
    assert sdi.step_influence([test_set[0]]).words.test is None
    assert sdi.step_influence(test_set, aggregate=True).words.test is None
    assert sdi.step_self_influence().to_pandas()["id"].tolist()[0] == "first"
    assert sdi.step_self_influence(test_set).to_pandas()["text"].tolist() == ["a b c d", "e f"]


def test_results_of_other_data_sets_know_nothing(sdi: SDIInfluence, tmp_path: Path) -> None:
    rows = [{"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([5, 6])}]
    assert SDIInfluence(sdi.model, rows, batch_size=1).step_influence(rows).words is None
    random_result().save(tmp_path / "result")
    with safe_open(tmp_path / "result", "pt") as file:
        assert NOTE not in file.metadata()


@pytest.mark.parametrize(
    "note",
    [
        "[", "7", "[" * 10**5, '{"test": [7], "train": 3}', '{"train": {"size": -1, "kept": {"x": "y", "1": 2}}}',
        '{"test": "abc", "train": {"size": "7", "kept": {}}}',
    ],
)  # fmt: skip
def test_words_that_are_none_are_no_reason_to_refuse_numbers(note: str, tmp_path: Path) -> None:
    result = random_result()
    tensors = {name: value for name, value in vars(result).items() if isinstance(value, torch.Tensor)}
    header = {"format": "captum_sdi.StepInfluence", "version": "1", NOTE: note}
    save_file(tensors, tmp_path / "result", metadata=header)
    loaded = StepInfluence.load(tmp_path / "result")
    assert torch.equal(loaded.influence_scores, result.influence_scores)
    assert loaded.words is None or (loaded.words.test is None and not loaded.words.train)


def test_arguments_come_before_what_is_known(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    result = random_result().with_words(Words(["x", "y", "z"], ["t"] * TRAINS))
    assert set(result.to_pandas()["text"]) == {"t"}
    assert set(result.to_pandas(TEXTS, TEST_TEXTS)["test_text"]) == set(TEST_TEXTS)
    contents = Contents(write_page(result, tmp_path / "page.html", texts=TEXTS).path)
    assert len(contents.rows("texts")) == TRAINS
    assert json.dumps(contents.chunks["tests"][2]["entry"]) == '["z"]'
