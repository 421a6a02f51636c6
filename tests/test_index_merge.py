"""Indexes of parts of a train set, made one: the rows of the whole, or a sentence about what does not fit."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from index_faults import TEST, TRAIN, edited, influence
from kills import KILLED, killed_at, n_changes

from captum_sdi import Exact, SketchIndex
from captum_sdi.__main__ import main
from captum_sdi.index import folder, merge, writer
from captum_sdi.index.reader import Reader

pytestmark = pytest.mark.filterwarnings(r"ignore:\d+% of these scores come from")  # one's gradients are much the larger
CUTS = [slice(0, 8), slice(8, 12), slice(12, 23)]
"""Multiples of the batch size: rows are computed in the same company as in one piece."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts and the whole, in half precision, each of several shards."""
    place = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_BYTES", 3000)
        patch.setattr(folder, "_PIECE", 0)
        patch.setattr(folder, "_LEAST", 3)
        for number, cut in enumerate(CUTS):
            part = influence(place / f"part{number}", train_dataset=TRAIN[cut], index_dtype=torch.float16)
            part.build_index()
        influence(place / "whole", index_dtype=torch.float16).build_index()
    return place


@pytest.fixture
def here(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path


def parts_in(place: Path) -> list[Path]:
    return [place / f"part{number}" for number in range(len(CUTS))]


def assert_is_whole(merged: SketchIndex, place: Path) -> None:
    whole = SketchIndex.open(place / "whole")
    assert merged.complete
    assert merged.verify() == []
    assert merged.manifest == whole.manifest
    for name in whole.checkpoints:
        ours, theirs = (Reader(index, name, torch.float32).read(0, 23) for index in (merged, whole))
        assert torch.equal(ours, theirs)
    assert torch.equal(merged.fingerprints()[1], whole.fingerprints()[1])


def test_parts_are_the_whole(here: Path) -> None:
    merged = SketchIndex.merge(here / "merged", parts_in(here))
    assert_is_whole(merged, here)
    asked = influence(here / "merged")
    ours, theirs = asked.step_influence(TEST, k=5), influence(here / "whole").step_influence(TEST, k=5)
    assert torch.equal(ours.indices, theirs.indices)
    assert torch.equal(ours.influence_scores, theirs.influence_scores)
    stamps = {file: file.stat().st_mtime_ns for file in (here / "merged").rglob("*.safetensors")}
    assert_is_whole(SketchIndex.merge(here / "merged", parts_in(here)), here)
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps


def test_a_killed_merge_goes_on(built: Path, tmp_path: Path) -> None:
    """Before some of the changes of a file; what was left is never taken for the whole."""
    place = tmp_path / "merged"

    def merged() -> SketchIndex:
        return SketchIndex.merge(place, parts_in(built))

    total = n_changes(merged, place)
    assert total > 20
    for change in torch.linspace(0, total - 1, 4).int().tolist():
        shutil.rmtree(place)
        assert killed_at(merged, place, change) == KILLED
        if (place / "manifest.json").exists() and SketchIndex.open(place).complete:
            assert_is_whole(SketchIndex.open(place), built)
        assert_is_whole(merged(), built)
    assert not list(place.rglob("*.unfinished"))


def test_what_a_model_computed_meanwhile_is_kept(here: Path) -> None:
    """Shards that end elsewhere than the parts' do: only what lies between is copied."""
    merged = SketchIndex.merge(here / "merged", parts_in(here))
    for name in merged.checkpoints:
        for shard in merged.shards[name][1:]:
            shard.path.unlink()
    of_whole = SketchIndex.open(here / "whole").shards[merged.checkpoints[0]][2]
    shutil.copy(of_whole.path, merged.folder(merged.checkpoints[0]))
    assert_is_whole(SketchIndex.merge(here / "merged", parts_in(here)), here)
    assert (merged.folder(merged.checkpoints[0]) / of_whole.path.name).exists()


def lacking(place: Path) -> None:
    next(place.glob("part1/*/*.safetensors")).unlink()


def damaged(place: Path) -> None:
    edited(next(place.glob("part1/*/*.safetensors")))


def of_another_sketch(place: Path) -> None:
    shutil.rmtree(place / "part1")
    influence(place / "part1", train_dataset=TRAIN[8:12], index_dtype=torch.float16, sketch=Exact()).build_index()


def of_other_weights(place: Path) -> None:
    manifest = json.loads((place / "part1" / "manifest.json").read_text())
    next(iter(manifest["checkpoints"].values()))["weights"] = "0" * 32
    (place / "part1" / "manifest.json").write_text(json.dumps(manifest))


def of_the_same_examples(place: Path) -> None:
    shutil.rmtree(place / "part1")
    shutil.copytree(place / "part0", place / "part1")


def merged_from_others(place: Path) -> None:
    SketchIndex.merge(place / "merged", parts_in(place)[:2])


def full_of_other_things(place: Path) -> None:
    (place / "merged").mkdir()
    (place / "merged" / "thesis.tex").write_text("years of work")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lacking, r"part1 lacks rows: 4 of 4 examples at '#0'; \d of 4 examples at '#1'. Complete it by what built it"),
        (damaged, "part1 is damaged: damaged .*part1.*Complete it by what built it, then merge again"),
        (of_another_sketch, "part1 is of something else than .*part0: .*TensorSketch in the first, Exact in this one"),
        (of_other_weights, "part1.* was written for another model, checkpoint, sketch or version"),
        (of_the_same_examples, "part0 and .*part1 are of the same examples"),
        (merged_from_others, "merged is of something else: examples: 12 in the index, 23 here"),
        (full_of_other_things, r"merged.* is no index, and holds other things \(thesis.tex\)"),
    ],
    ids=lambda spoil: getattr(spoil, "__name__", ""),
)
def test_what_does_not_fit_is_said(here: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(here)
    with pytest.raises(ValueError, match=said):
        SketchIndex.merge(here / "merged", parts_in(here))


def test_names_that_cannot_be_meant(here: Path) -> None:
    with pytest.raises(TypeError, match=r"parts= must be a list of folders, got '.*part0'"):
        SketchIndex.merge(here / "merged", str(here / "part0"))
    with pytest.raises(ValueError, match="parts= is empty"):
        SketchIndex.merge(here / "merged", [])
    with pytest.raises(ValueError, match="part0 is named twice"):
        SketchIndex.merge(here / "merged", [here / "part0", here / "part0"])
    with pytest.raises(ValueError, match=r"part0 is one of the parts"):
        SketchIndex.merge(here / "part0", parts_in(here))
    with pytest.raises(ValueError, match="There is no index at"):
        SketchIndex.merge(here / "merged", [here / "part9"])
    assert not (here / "merged").exists()


def test_parts_that_overlap_are_told(here: Path) -> None:
    shutil.rmtree(here / "part1")
    influence(here / "part1", train_dataset=TRAIN[6:12], index_dtype=torch.float16).build_index()
    with pytest.warns(UserWarning, match="2 train examples stand in more than one of the merged parts"):
        assert SketchIndex.merge(here / "merged", parts_in(here)).examples == 25


def test_a_disk_that_is_too_small(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "free_bytes", lambda _: 1)
    with pytest.raises(OSError, match=r"merged needs .* more") as caught:
        SketchIndex.merge(here / "merged", parts_in(here))
    assert caught.value.errno == errno.ENOSPC


def test_an_index_made_in_python_is_merged_in_python(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", *map(str, parts_in(here)), "--index", str(here / "merged")]) == 1
    assert "Indexes made in Python are merged in Python, with SketchIndex.merge" in capsys.readouterr().err
    assert not (here / "merged").exists()
