"""`InfluenceMap` by itself: its parts, its words and tables, and its file, which is not believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from captum_sdi import InfluenceMap, StepInfluence

VALUES = torch.arange(24, dtype=torch.float64).reshape(1, 2, 3, 4) - 9
LABELS = {"token": (0, 1, 2), "layer": ("a", "b", "c", "d")}
INDICES = torch.tensor([[7, 3]])


def split(**changes: Any) -> InfluenceMap:
    fields = {
        "values": VALUES,
        "axes": ("token", "layer"),
        "labels": LABELS,
        "indices": INDICES,
        "errors": torch.ones_like(VALUES),
        "test_tokens": (("the", "cat", "the"),),
        "train_tokens": {7: ("a", "dog"), 3: ("עברית",)},
        **changes,
    }
    return InfluenceMap(**fields)


def test_sums_and_their_errors() -> None:
    layers = split().sum("token")
    assert layers.axes == ("layer",)
    assert torch.equal(layers.values, VALUES.sum(2))
    assert layers.errors is not None
    assert torch.equal(layers.errors, torch.full((1, 2, 4), 3.0, dtype=torch.float64)), "tokens share hashes: a bound"
    tokens = split().sum("layer")
    assert torch.equal(tokens.errors, torch.full((1, 2, 3), 2.0, dtype=torch.float64)), "layers do not: √4"
    assert torch.equal(split().sum().values, VALUES.sum((2, 3)))
    assert torch.equal(split().total(), VALUES.sum((2, 3)))
    assert torch.equal(split(errors=None).sum("layer", "token").total(), VALUES.sum((2, 3)))
    with pytest.raises(ValueError, match="no axis 'step'"):
        split().sum("step")


def test_places_are_picked_by_label() -> None:
    assert torch.equal(split().sel(layer="c").values, VALUES[..., 2])
    assert torch.equal(split().sel(layer=["d", "a"], token=1).values, VALUES[:, :, 1, [3, 0]])
    assert split().sel(layer=["d", "a"]).labels["layer"] == ("d", "a")
    assert torch.equal(split().sel(token="cat").values, VALUES[:, :, 1])
    with pytest.raises(KeyError, match=r"'the' stands at \[0, 2\]"):
        split().sel(token="the")
    with pytest.raises(KeyError, match="no 'dog' along 'token'"):
        split().sel(token="dog")
    with pytest.raises(KeyError, match="no 9 along 'token', but 0, 1, 2"):
        split().sel(token=9)


def test_the_top_of_an_axis_is_by_absolute_sum() -> None:
    values = torch.tensor([[[1.0, -5.0, 3.0]]])
    plain = InfluenceMap(values, ("step",), {"step": (0, 1, 2)}, indices=torch.tensor([[0]]))
    assert plain.top("step", 2).labels["step"] == (1, 2)
    assert plain.top("step", 9).values.tolist() == [[[-5.0, 3.0, 1.0]]]
    with pytest.raises(ValueError, match="k of at least 1"):
        plain.top("step", 0)


def test_tokens_along_an_axis_end_with_the_text() -> None:
    assert split().tokens_along("token", 0, 1) == ("the", "cat", "the")
    longer = InfluenceMap(
        VALUES[..., 0], ("train_position",), {"train_position": (0, 1, 2)}, INDICES, train_tokens={7: ("a", "dog")}
    )
    assert longer.tokens_along("train_position", 0, 0) == ("a", "dog", "")
    assert longer.tokens_along("train_position", 0, 1) is None


def test_a_map_prints_its_axes_and_totals() -> None:
    lines = str(split()).splitlines()
    assert lines[0] == "InfluenceMap of 1 test example x 2 train examples, total +60.0000"
    assert lines[1] == "  token  3: 0 -12.0000, 1 +20.0000, 2 +52.0000"
    assert len(lines) == 3


def test_a_notebook_shows_a_map_as_a_table() -> None:
    values = torch.tensor([[[0.5, -0.25]]])
    shown = InfluenceMap(values, ("layer",), {"layer": ("<b>", "core")}, torch.tensor([[7]]))._repr_html_()
    assert "<tr><th>layer</th><th>&lt;b&gt;</th><th>core</th></tr>" in shown
    assert "<tr><th>sum</th><td>+0.5</td><td>-0.25</td></tr>" in shown
    assert "1 test example x 1 train example, total +0.2500" in shown


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"axes": ("token",)}, "needs labels for each of its axes"),
        ({"axes": ("token", "token")}, "needs labels for each of its axes"),
        ({"labels": {**LABELS, "layer": ("a",)}}, r"values=\.\.\.\) must be of shape \(1, 2, 3, 1\)"),
        ({"errors": torch.ones(2)}, r"errors=\.\.\.\) must be of shape"),
        ({"indices": torch.tensor([7, 3])}, r"indices \(q, k\)"),
        ({"test_tokens": ((), ())}, "has 1 test examples, and tokens of 2"),
    ],
)
def test_fields_that_do_not_fit_each_other(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        split(**changes)


# --- tables ---


def test_pandas_has_a_row_for_each_number() -> None:
    pytest.importorskip("pandas")
    frame = split().to_pandas()
    assert list(frame.columns) == ["test", "train", "token", "layer", "influence", "error"]
    assert len(frame) == VALUES.numel()
    picked = frame[(frame.train == 3) & (frame.token == 2) & (frame.layer == "b")]
    assert picked.influence.item() == VALUES[0, 1, 2, 1]


def test_xarray_has_the_same_axes() -> None:
    pytest.importorskip("xarray")
    array = split().to_xarray()
    assert array.dims == ("test", "pair", "token", "layer")
    assert float(array.sel(layer="b")[0, 1, 2]) == VALUES[0, 1, 2, 1]


# --- the file ---


def test_a_map_comes_back_from_its_file(tmp_path: Path) -> None:
    split().save(tmp_path / "map.safetensors")
    back = InfluenceMap.load(tmp_path / "map.safetensors")
    assert torch.equal(back.values, VALUES)
    assert torch.equal(back.indices, INDICES)
    assert torch.equal(back.errors, torch.ones_like(VALUES))
    for name in ("axes", "labels", "test_tokens", "train_tokens"):
        assert getattr(back, name) == getattr(split(), name)
    split(errors=None, test_tokens=None, train_tokens={}).save(tmp_path / "map.safetensors")
    bare = InfluenceMap.load(tmp_path / "map.safetensors")
    assert bare.errors is None
    assert bare.test_tokens is None


def written(path: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A file as `save` writes it, but for some changes."""
    words = {"axes": ["token", "layer"], "labels": LABELS, "test_tokens": None, "train_tokens": {}}
    metadata = {"format": "captum_sdi.InfluenceMap", "version": "1", "words": json.dumps(words)}
    own = {"values": VALUES, "indices": INDICES} if tensors is None else tensors
    save_file(own, path, metadata={**metadata, **changes})
    return path


WORDS = {"axes": ["token", "layer"], "labels": LABELS, "test_tokens": None, "train_tokens": {}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "captum_sdi.StepInfluence"}, "is not a saved InfluenceMap"),
        ({"version": "2"}, "saved by a newer captum_sdi"),
        ({"words": "{"}, "is damaged"),
        ({"words": "[" * 100_000}, "nested too deeply"),
        ({"words": json.dumps({**WORDS, "axes": "token"})}, "axes must be a list of a string"),
        ({"words": json.dumps({**WORDS, "labels": {"token": [0.5]}})}, "labels must be an object"),
        (
            {"words": json.dumps({**WORDS, "labels": {"token": [0], "layer": ["a"]}})},
            r"must be of shape \(1, 2, 1, 1\)",
        ),
        ({"words": json.dumps({**WORDS, "train_tokens": {"seven": []}})}, "under train indices, not 'seven'"),
        ({"words": json.dumps({**WORDS, "train_tokens": {"٣": []}})}, "under train indices"),
        ({"tensors": {"values": VALUES}}, r"missing fields \['indices'\]"),
        ({"tensors": {"values": VALUES, "indices": INDICES, "more": VALUES + 1}}, r"unknown fields \['more'\]"),
        ({"tensors": {"values": VALUES.long(), "indices": INDICES}}, "values must be floating point"),
        ({"tensors": {"values": VALUES, "indices": -INDICES}}, "indices must be whole numbers of at least 0"),
        ({"tensors": {"values": VALUES, "indices": INDICES.double()}}, "indices must be whole numbers"),
    ],
)
def test_a_file_that_is_no_map_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        InfluenceMap.load(written(tmp_path / "map.safetensors", **changes))


def test_what_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="is not a saved InfluenceMap"):
        InfluenceMap.load(tmp_path / "text")
    with pytest.raises(ValueError, match="a folder"):
        InfluenceMap.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="make it first"):
        split().save(tmp_path / "none" / "map")
    with pytest.raises(ValueError, match="is not a saved StepInfluence"):
        StepInfluence.load(written(tmp_path / "map.safetensors"))
