"""A result as a table: every number at its pair, every text beside it, and a picture that fits into a notebook."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from pages import STEPS, TESTS, TEXTS, TRAINS, random_result, self_influence_of

pandas = pytest.importorskip("pandas")

RESULT = random_result()


def test_a_row_for_each_pair() -> None:
    frame = RESULT.to_pandas()
    assert len(frame) == TESTS * TRAINS
    for name, field in (
        ("total", RESULT.influence_scores),
        ("error", RESULT.score_errors),
        ("prelude", RESULT.prelude),
        ("coda", RESULT.coda),
        ("step_2", RESULT.trajectories[..., 2]),
        ("step_2_error", RESULT.trajectory_errors[..., 2]),
    ):
        table = frame.pivot(index="test", columns="train", values=name)
        torch.testing.assert_close(torch.tensor(table.to_numpy()), field)
    assert f"step_{STEPS}" not in frame


def test_ranks_indices_and_depths() -> None:
    indices = torch.stack([torch.randperm(TRAINS) for _ in range(TESTS)])
    result = dataclasses.replace(RESULT, indices=indices, n_steps=torch.tensor([4, 2, 3]))
    frame = result.to_pandas()
    for row in frame.iloc[::7].itertuples():
        assert indices[row.test, row.rank] == row.train
        assert row.total == RESULT.influence_scores[row.test, row.rank]
    did_run = frame.groupby("test")[[f"step_{step}" for step in range(STEPS)]].count().to_numpy()
    assert (did_run > 0).sum(1).tolist() == [4, 2, 3]


def test_texts_and_their_fields_are_columns() -> None:
    examples = [{"text": text, "id": f"t{index}"} for index, text in enumerate(TEXTS)]
    frame = RESULT.to_pandas(examples, test_texts=["a", "b", "c"])
    assert frame["text"].tolist() == TEXTS * TESTS
    assert frame["id"].tolist() == [f"t{index}" for index in frame["train"]]
    assert frame["test_text"].tolist() == ["a"] * TRAINS + ["b"] * TRAINS + ["c"] * TRAINS


def test_self_influence_has_no_test_example() -> None:
    frame = self_influence_of(RESULT).to_pandas(TEXTS)
    assert frame.columns[0] == "train"
    assert frame["text"].tolist() == TEXTS
    torch.testing.assert_close(torch.tensor(frame["step_1"].to_numpy()), RESULT.trajectories[0, :, 1])


def test_a_notebook_shows_the_strongest_and_their_curves() -> None:
    shown = RESULT._repr_html_()
    rows = re.findall("<tr><td>(.*?)</tr>", shown)
    assert len(rows) == TESTS * 5
    best = int(RESULT.influence_scores[0].argmax())
    assert rows[0].startswith(f"0</td><td>#{best}</td><td><b>{RESULT.influence_scores[0, best]:+.3e}")
    assert rows[0].count("<rect") == STEPS
    assert "<table>" not in self_influence_of(RESULT)._repr_html_()
