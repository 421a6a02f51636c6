"""A full disk: one sentence, the old files whole, no half file; and the next try, with room, is right."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from index_faults import TEST, ended, forked, influence
from pages import random_result
from shell_project import SCORE, contents, make_project, remember_scores, run

from captum_sdi import SketchIndex, StepInfluence
from captum_sdi.index import lock, writer
from captum_sdi.preconditioners.shelf import scratch, write_kept
from captum_sdi.report import write_page
from captum_sdi.scores.influence_map import InfluenceMap
from captum_sdi.unrolled import SGD, TrainingRun

ROOMS = int(os.environ.get("CAPTUM_SDI_KILLS", "3"))
"""How many amounts of room each writer is given; `make test-faults` gives more."""
SAID = r"No space left on device|File too large|is full|needs .* more"
DISK_BYTES = 2**20


class SmallDisk:
    """A file system of one MiB; where none can be mounted, a limit to the size of every file.

    Args:
        folder: Where it is.
        is_mounted: Whether it is one.
    """

    def __init__(self, folder: Path, *, is_mounted: bool) -> None:
        self.folder = folder
        self.is_mounted = is_mounted

    @contextmanager
    def with_room(self, n_bytes: int) -> Iterator[None]:
        """Leaves room for so many bytes."""
        if self.is_mounted:
            filler = self.folder / "filler"
            with filler.open("wb") as file:
                n_free = shutil.disk_usage(self.folder).free
                if n_free > n_bytes:
                    os.posix_fallocate(file.fileno(), 0, n_free - n_bytes)
            try:
                yield
            finally:
                filler.unlink()
        else:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(params=["disk", "limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "limit":
        yield SmallDisk(folder, is_mounted=False)
        return
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        yield SmallDisk(folder, is_mounted=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def a_map(seed: int) -> InfluenceMap:
    values = torch.randn(4, 100, 30, generator=torch.Generator().manual_seed(seed))
    return InfluenceMap(values, ("step",), {"step": tuple(range(30))}, torch.arange(100).repeat(4, 1))


def save_run(folder: Path, seed: int) -> None:
    start = {"weight": torch.full((10_000,), float(seed))}
    TrainingRun(SGD(), [0.1 + seed], [[0]], random_states=[torch.get_rng_state()]).save(folder, start)


WRITERS: dict[str, Callable[[Path, int], Any]] = {
    "scores": lambda folder, seed: random_result(trains=100, seed=seed).save(folder / "scores.safetensors"),
    "map": lambda folder, seed: a_map(seed).save(folder / "map.safetensors"),
    "page": lambda folder, seed: write_page(random_result(trains=100, seed=seed), folder / "page.html"),
    "run": save_run,
}


def rooms(n_bytes: int, seed: int) -> list[int]:
    """Amounts of room from none to one that does not suffice, in pages of memory."""
    chance = random.Random(seed)
    return [0, *(chance.randrange(n_bytes) // 4096 * 4096 for _ in range(ROOMS - 1))]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_on_a_full_disk_is_the_old_one(name: str, disk: SmallDisk, tmp_path: Path, seed: int) -> None:
    write, expected, folder = WRITERS[name], tmp_path / "expected", disk.folder / "written"
    expected.mkdir()
    folder.mkdir()
    write(expected, 1)
    write(folder, 0)
    before = contents(folder)
    sizes = [len(content) for content in contents(expected).values()]
    for room in rooms(max(sizes), seed):
        with disk.with_room(room), pytest.raises(OSError, match=SAID) as caught:
            write(folder, 1)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)
        after = contents(folder)
        assert {file: after[file] for file in before} == before
        assert not list(folder.rglob("*.unfinished"))
    write(folder, 1)
    assert contents(folder).keys() == contents(expected).keys()


def test_results_on_a_full_disk_are_the_old_ones(
    disk: SmallDisk,
    project: Path,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(project)
    remember_scores(monkeypatch)
    line = SCORE.replace("--out out", f"--out {disk.folder}/out --overwrite --html")
    assert run(line) == 0
    before = contents(disk.folder)
    for room in rooms(max(map(len, before.values())), seed):
        capsys.readouterr()
        with disk.with_room(room):
            assert run(f"{line} -k 3") == 1
            said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert any(words in said for words in SAID.split("|")), said
        assert contents(disk.folder) == before
    assert run(f"{line} -k 3") == 0
    assert StepInfluence.load(disk.folder / "out" / "scores.safetensors").influence_scores.shape == (2, 3)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    return folder


def test_an_index_on_a_full_disk_keeps_what_was_written(
    disk: SmallDisk, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space is compared before; here the disk fills up meanwhile."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 3000)
    theirs = influence(tmp_path / "index").step_influence(TEST)
    folder = disk.folder / "index"
    for room in sorted(rooms(40_000 if disk.is_mounted else 3000, seed)):
        with monkeypatch.context() as patch, disk.with_room(room):
            patch.setattr(lock, "free_bytes", lambda _: 2**40)
            with pytest.raises(OSError, match=SAID) as caught:
                influence(folder).build_index()
        assert "\n" not in str(caught.value)
        if (folder / "manifest.json").exists():
            assert SketchIndex.open(folder).damaged == []
    ours = influence(folder).step_influence(TEST)
    assert torch.equal(ours.trajectories, theirs.trajectories)
    assert torch.equal(ours.trajectory_errors, theirs.trajectory_errors)
    assert not list(folder.rglob("*.unfinished"))


def test_memory_in_a_file_is_refused_on_a_full_disk(disk: SmallDisk) -> None:
    """Writing to it would end the process, by SIGBUS."""

    def fill() -> None:
        with disk.with_room(8192), pytest.raises(OSError, match=SAID):
            scratch((100, 1000), torch.float32, disk.folder).fill_(1)

    assert ended(forked(fill)) == 0
    assert contents(disk.folder) == {}


def test_what_was_fitted_is_not_kept_on_a_full_disk(disk: SmallDisk) -> None:
    file = disk.folder / "fisher.safetensors"
    with disk.with_room(4096), pytest.warns(UserWarning, match=f"fisher.safetensors could not be written \\(({SAID})"):
        write_kept(file, "key", {"factor": torch.ones(100, 100)})
    assert contents(disk.folder) == {}
