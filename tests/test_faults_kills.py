"""Kills while scoring: the results are the old or the new ones, whole, and the next run is right."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from index_faults import DAMAGES, TEST, influence
from kills import KILLED, killed_after, killed_at, n_changes
from shell_project import SCORE, contents, make_project, remember_scores, run

from captum_sdi import SketchIndex
from captum_sdi.cli import output
from captum_sdi.cli.output import COMPLETE, TENSORS
from captum_sdi.cli.results import Results
from captum_sdi.index import folder, writer
from captum_sdi.unrolled import SGD, TrainingRun
from captum_sdi.unrolled.run_files import read_start

KILLS = int(os.environ.get("CAPTUM_SDI_KILLS", "3"))  # `make test-faults` kills more often
MINE = "notes.txt"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a warm process")


class Project:
    """A folder in which results have been written, and what two runs of other settings make of them.

    Args:
        place: The folder, in which the shell stands.
    """

    def __init__(self, place: Path) -> None:
        self.out = place / "out"
        self.out.mkdir()
        (self.out / MINE).write_text("mine")
        make_project(place)
        os.chdir(place)
        self.old = self.written(self.score_old)
        self.kept = place / "kept"
        shutil.copytree(self.out, self.kept)
        began = time.perf_counter()
        self.new = self.written(self.score_new)
        self.seconds = time.perf_counter() - began
        assert "page.html" in self.old.keys() - self.new.keys()

    def score_old(self) -> None:
        """Writes a page, too."""
        assert run(f"{SCORE} --overwrite --html") == 0

    def score_new(self) -> None:
        """Writes other scores, and no page."""
        assert run(f"{SCORE} --overwrite -k 3") == 0

    def written(self, score: Callable[[], None]) -> dict[str, bytes]:
        """What is in the folder of the results afterwards."""
        score()
        return self.visible()

    def reset(self) -> None:
        """Puts the old results there, and nothing else."""
        shutil.rmtree(self.out)
        shutil.copytree(self.kept, self.out)

    def assert_whole(self) -> dict[str, bytes]:
        """Checks that there are the old or the new results, for a program that reads them and for one that looks."""
        for name, content in self.visible().items():
            assert content in (self.old.get(name), self.new.get(name)), name  # at no time is there half a file
        assert self.visible().keys() >= self.old.keys() & self.new.keys()
        is_on_its_way = (self.out / COMPLETE).exists()
        Results.read(self.out)
        assert not (self.out / COMPLETE).exists()
        found = self.visible()
        assert found in ((self.new,) if is_on_its_way else (self.old, self.new))
        return found

    def visible(self) -> dict[str, bytes]:
        """Everything but what a killed process had not finished."""
        seen = contents(self.out)
        return {name: in_order(seen[name], name) for name in seen if not name.startswith(".")}


def in_order(content: bytes, name: str) -> bytes:
    """The bytes of a file, with a safetensors header in order: the library writes it in any."""
    if not name.endswith(".safetensors"):
        return content
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    return content[:8] + header.ljust(end - 8) + content[end:]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    before = os.getcwd()
    try:
        return Project(tmp_path_factory.mktemp("kills").resolve())
    finally:
        os.chdir(before)


@pytest.fixture(autouse=True)
def at_home(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.out.parent)
    project.reset()


def test_e2_killed_before_any_change_of_the_results(
    project: Project, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All moments at which files are made, renamed or removed; their number is drawn in `make test`."""
    remember_scores(monkeypatch)
    project.score_old()
    project.score_new()
    project.reset()
    n_moments = n_changes(project.score_new, project.out)
    assert n_moments > 15
    moments = list(range(n_moments))
    drawn = []
    for population in (moments[:-8], moments[-8:]):  # the last ones are those about the renaming
        drawn += random.Random(seed).sample(population, min(KILLS, len(population)))
    found = []
    for moment in drawn:
        project.reset()
        assert killed_at(project.score_new, project.out, moment) == KILLED
        found.append(project.assert_whole() == project.new)
    assert set(found) == {True, False}  # kills on both sides of the one renaming
    assert run(SCORE) == 1  # what an earlier run wrote is in the way, whole
    project.score_new()
    assert project.visible() == project.new


def test_e2_killed_at_a_random_time(project: Project, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(KILLS):
        assert killed_after(project.score_new, chance.uniform(0, 1.2) * project.seconds) in (0, KILLED)
        project.assert_whole()
        assert SketchIndex.open("idx").complete


def test_e2_new_results_that_cannot_reach_their_places_are_named(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(target).name == TENSORS:
            raise OSError(5, "Input/output error", str(target))
        replace(source, target)

    said = rf"Input/output error: '{project.out / TENSORS}'\. The new files are in {project.out / COMPLETE}\."

    def write() -> None:
        with output.written_whole(project.out, overwrite=True) as stage:
            for name in project.new.keys() - {MINE}:
                (stage / name).write_bytes(project.new[name])

    monkeypatch.setattr(output.os, "replace", fail)
    with pytest.raises(ValueError, match=said):
        write()
    monkeypatch.setattr(output.os, "replace", replace)
    assert project.assert_whole() == project.new


@pytest.mark.parametrize("kind", ["link", "file"])
def test_e2_what_is_not_ours_under_the_name_of_finished_results_is_left_alone(
    kind: str, project: Project, tmp_path: Path
) -> None:
    (tmp_path / TENSORS).write_text("mine")
    target = tmp_path if kind == "link" else tmp_path / TENSORS
    (project.out / COMPLETE).symlink_to(target) if kind == "link" else shutil.copy(target, project.out / COMPLETE)
    for ask in (Results.read, lambda out: output.check_output_folder(out, overwrite=True, pictures=False)):
        with pytest.raises(ValueError, match=f"{COMPLETE} is not the folder that captum-sdi score makes there"):
            ask(project.out)
    assert project.visible() == project.old
    assert (tmp_path / TENSORS).read_text() == "mine"


def test_killed_while_scoring_on_an_index(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One index that is damaged again and again, and a scorer, which repairs it, killed each time."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 3000)
    monkeypatch.setattr(folder, "_PIECE", 0)
    monkeypatch.setattr(folder, "_LEAST", 3)
    theirs = influence(tmp_path).step_influence(TEST)
    began = time.perf_counter()
    influence(tmp_path).step_influence(TEST)
    seconds = time.perf_counter() - began
    chance = random.Random(seed)
    for _ in range(KILLS):
        chance.choice(DAMAGES)(chance.choice(sorted(tmp_path.rglob("*.safetensors"))[1:]))
        wait = chance.uniform(0, 1.5) * seconds
        assert killed_after(lambda: influence(tmp_path).step_influence(TEST), wait) in (0, KILLED)
        SketchIndex.open(tmp_path)
    ours = influence(tmp_path).step_influence(TEST)
    assert torch.equal(ours.trajectories, theirs.trajectories)
    assert torch.equal(ours.trajectory_errors, theirs.trajectory_errors)
    assert SketchIndex.open(tmp_path).complete
    assert not list(tmp_path.rglob("*.unfinished"))


def test_killed_while_a_training_run_is_saved(tmp_path: Path) -> None:
    """At every moment: the run and its start are both the old ones, or both the new ones."""
    states = [torch.get_rng_state()]
    old = TrainingRun(SGD(), [0.1], [[0]], random_states=states)
    new = TrainingRun(SGD(), [0.2], [[1]], random_states=[states[0].roll(1)])
    kept, place = tmp_path / "kept", tmp_path / "run"
    old.save(kept, {"weight": torch.tensor([0.1])})

    def save() -> None:
        new.save(place, {"weight": torch.tensor([0.2])})

    shutil.copytree(kept, place)
    found = set()
    for moment in range(n_changes(save, place)):
        shutil.rmtree(place)
        shutil.copytree(kept, place)
        assert killed_at(save, place, moment) == KILLED
        loaded = TrainingRun.load(place)
        expected = old if loaded.rates == [0.1] else new
        assert read_start(place)["weight"].tolist() == pytest.approx(loaded.rates)
        assert torch.equal(loaded.random_states[0], expected.random_states[0])
        found.add(expected)
    assert found == {old, new}
    save()
    assert {file.suffix for file in place.iterdir()} >= {".json", ".safetensors"}
    assert len(list(place.glob("*.safetensors"))) == 2  # those of the old run are gone
