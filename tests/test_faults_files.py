"""Files: what is not ours stays, results are whole, and what a file claims is checked before it is believed."""

from __future__ import annotations

import html
import io
import json
import os
import random
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES
from filelock import FileLock
from hostile import mutated_bytes, mutated_json, survives
from index_faults import TEST, TRAIN, influence
from safetensors import safe_open
from safetensors.torch import save_file
from shell_project import INDEX, ROWS, SCORE, contents, make_project, run, write_rows

from captum_sdi import SketchIndex, StepInfluence, find_loop
from captum_sdi.capture.coverage import Coverage
from captum_sdi.cli import pictures
from captum_sdi.cli.output import written_whole
from captum_sdi.cli.recipe import Recipe
from captum_sdi.cli.results import Results
from captum_sdi.cli.rows import JsonLines
from captum_sdi.data.encoder import Encoder
from captum_sdi.index import build, lock
from captum_sdi.index.shards import Shard


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two files, an index and results, made once."""
    folder = tmp_path_factory.mktemp("files")
    make_project(folder, SCORE)
    return folder


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which the shell stands."""
    shutil.copytree(project, tmp_path, dirs_exist_ok=True, copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- files that are not ours ---


def test_e1_results_in_the_way_of_the_users_files_are_refused(here: Path, capsys: pytest.CaptureFixture) -> None:
    mine = here / "mine"
    mine.mkdir()
    for name in ("totals.png", "heatmap-0.png", "heatmap-of-mine.png", "scores.npz"):
        (mine / name).write_text(f"mine: {name}")
    before = contents(mine)
    assert run(f"{SCORE} --out mine --pictures 1") == 1
    assert "mine/heatmap-0.png is in the way" in capsys.readouterr().err
    assert run(f"{SCORE} --out mine") == 1
    assert "mine/scores.npz is in the way" in capsys.readouterr().err
    assert contents(mine) == before
    assert run(f"{SCORE} --out mine --overwrite") == 0  # what is not listed as ours is not removed
    for name in ("totals.png", "heatmap-0.png", "heatmap-of-mine.png"):
        assert (mine / name).read_bytes() == before[name]


def test_e1_only_listed_names_of_ours_are_removed(here: Path) -> None:
    assert run(f"{SCORE} --out drawn --pictures 1") == 0
    (here / "drawn" / "heatmap-7.png").write_text("mine")
    assert run(f"{SCORE} --out drawn --overwrite") == 0
    assert set(os.listdir("drawn")) == {
        "run.json",
        "scores.jsonl",
        "scores.csv",
        "scores.npz",
        "scores.safetensors",
        "heatmap-7.png",
    }
    tensors = here / "drawn" / "scores.safetensors"
    (here / "precious.txt").write_text("mine")
    StepInfluence.load(tensors).save(tensors, files=json.dumps(["../precious.txt", "heatmap-7.png/../x", 3]))
    assert run(f"{SCORE} --out drawn --overwrite") == 0
    assert (here / "precious.txt").read_text() == "mine"


def test_e1_an_index_whose_checkpoint_folder_is_a_link_is_refused(here: Path, capsys: pytest.CaptureFixture) -> None:
    folder = next(path for path in (here / "idx").iterdir() if path.is_dir())
    shutil.rmtree(folder)
    folder.symlink_to(here / "model")
    before = contents(here / "model")
    assert run(f"{SCORE} --out other") == 1
    assert "is a link; an index has its shards in folders of its own" in capsys.readouterr().err
    assert contents(here / "model") == before


def test_e1_a_foreign_file_in_an_index_stays(here: Path) -> None:
    folder = next(path for path in (here / "idx").iterdir() if path.is_dir())
    shutil.copy("model/model.safetensors", folder)
    (here / "idx" / "notes.unfinished").write_text("mine")
    next(folder.glob("0*.safetensors")).unlink()  # something to build
    assert run(f"{SCORE} --out other") == 0
    assert (folder / "model.safetensors").read_bytes() == (here / "model" / "model.safetensors").read_bytes()
    assert (here / "idx" / "notes.unfinished").read_text() == "mine"


# --- whole or not at all ---


@pytest.mark.parametrize("failing", ["write_tensors", "draw"])
def test_e2_old_results_stay_until_the_new_are_complete(
    here: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Results if failing == "write_tensors" else pictures, failing, fail)
    before = contents(here / "out")
    assert run(f"{SCORE} --overwrite --pictures 1") == 1
    assert contents(here / "out") == before


def test_e2_links_are_kept_and_nothing_but_files_replaced(here: Path, capsys: pytest.CaptureFixture) -> None:
    (here / "disk").mkdir()
    (here / "linked").symlink_to("disk")
    assert run(f"{SCORE} --out linked") == 0
    assert (here / "linked").is_symlink()
    assert (here / "disk" / "scores.npz").is_file()
    (here / "disk" / "scores.npz").unlink()
    (here / "disk" / "scores.npz").symlink_to(here / "train.jsonl")
    before = (here / "train.jsonl").read_bytes()
    assert run(f"{SCORE} --out linked --overwrite") == 1
    assert "scores.npz is a link" in capsys.readouterr().err
    assert (here / "train.jsonl").read_bytes() == before
    result = StepInfluence.load(here / "out" / "scores.safetensors")
    (here / "real").write_text("old")
    (here / "link").symlink_to("real")
    result.save(here / "link")
    assert (here / "link").is_symlink()
    assert torch.equal(StepInfluence.load(here / "real").trajectories, result.trajectories)
    os.mkfifo(here / "pipe")
    with pytest.raises(ValueError, match="pipe is a pipe, a device or a socket; name a regular file"):
        result.save(here / "pipe")


def test_b14_half_a_surrogate_in_a_note_is_written(here: Path) -> None:
    (here / "queries.jsonl").write_text('{"input_ids": [1, 2], "note": "\\ud83d"}\n')
    assert run(SCORE.replace("--out out", "--out half")) == 0
    line = json.loads((here / "half" / "scores.jsonl").read_text(encoding="utf-8"))
    assert line["example"]["note"] == "\ud83d"
    with pytest.raises(ValueError, match='"text" holds half of a surrogate pair at character 1'):
        Encoder(vocab_size=9, tokenizer=object())({"text": "a\ud83d"})


def test_b14_a_console_of_another_encoding_shows_what_it_can(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = here / "idx" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["settings"]["loss"] = "perte é"
    manifest.write_text(json.dumps(content))
    shutil.rmtree(next(path for path in (here / "idx").iterdir() if path.is_dir()))
    printed = io.BytesIO()
    console = io.TextIOWrapper(printed, encoding="ascii", write_through=True)
    with monkeypatch.context() as other:
        other.setattr(sys, "stdout", console)
        assert run("show idx") == 0
    assert rb"loss          perte \xe9" in printed.getvalue()


def test_b16_the_modes_of_results_are_alike(here: Path) -> None:
    modes = {file.stat().st_mode for file in (here / "out").iterdir()}
    assert len(modes) == 1


# --- rows ---


def test_a8_default_labels_are_ignored_where_the_mask_is_0() -> None:
    row, _ = Encoder(vocab_size=9)({"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]})
    assert row["labels"] == [5, 6, -100, -100]
    given = {"input_ids": [5, 0], "attention_mask": [1, 0], "labels": [5, 0]}
    assert Encoder(vocab_size=9)(given)[0]["labels"] == [5, 0]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"input_ids": [1], "input_ids": [2]}', 'the key "input_ids" stands twice'),
        ('{"input_ids": [1], "note": {"a": 1, "a": 2}}', 'the key "a" stands twice'),
        ('{"input_ids": ' + "[" * 10**5, "nested too deeply"),
    ],
)
def test_e10_a_line_that_says_two_things_is_refused(line: str, error: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"input_ids": [1]}}\n{line}\n')
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2: .*{error}"):
        JsonLines(tmp_path / "rows.jsonl", Encoder(vocab_size=9))


@pytest.mark.parametrize("what", ["pipe", "folder", "/dev/zero"])
def test_e7_what_is_no_regular_file_is_refused_at_once(what: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    os.mkfifo(here / "pipe")
    (here / "folder").mkdir()
    for command in (
        INDEX.replace("train.jsonl", what),
        SCORE.replace("queries.jsonl", what),
        f"{SCORE} --train {what}",
    ):
        assert run(command.replace("--out out", "--out new")) == 1
        assert "name a regular file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="name a regular file"):
        StepInfluence.load(what)


@pytest.mark.parametrize("change", ["truncated", "grown", "replaced"])
def test_e7_a_file_that_changes_during_a_run_is_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS)
    rows = JsonLines(path, Encoder(vocab_size=9))
    if change == "truncated":
        os.truncate(path, 10)
    elif change == "grown":
        with path.open("a") as file:
            file.write("{}\n")
    else:
        write_rows(tmp_path / "new", ROWS)
        os.replace(tmp_path / "new", path)
    with pytest.raises(ValueError, match=r"rows\.jsonl has changed since its lines were counted"):
        rows[3]
    with pytest.raises(ValueError, match=r"rows\.jsonl has changed since its lines were counted"):
        rows.check_unchanged()


def test_e10_escape_sequences_are_printed_as_such(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("show no\x1b[31m") == 1
    assert "There is no index at no\\x1b[31m" in capsys.readouterr().err
    manifest = here / "idx" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["settings"]["loss"] = "\x1b[2J"
    manifest.write_text(json.dumps(content))
    shutil.rmtree(next(path for path in (here / "idx").iterdir() if path.is_dir()))
    assert run("show idx") == 0
    assert "loss          \\x1b[2J" in capsys.readouterr().out


# --- the index ---


def test_b15_one_lock_is_held_for_the_whole_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.05)
    seen = []
    finish = build.finish

    def look(index: SketchIndex, *rest: Any, **settings: Any) -> None:
        finish(index, *rest, **settings)
        seen.append(json.loads((tmp_path / lock.HOLDER).read_text())["pid"])

    compared = build.TrainIndex._compared

    def second_builder(self: Any, *rest: Any) -> SketchIndex:
        if seen:  # between two checkpoints, and at the second
            said = rf"another process .* \(process {os.getpid()} on '"
            with pytest.raises(BlockingIOError, match=said), lock.locked(tmp_path):
                pass
        return compared(self, *rest)

    monkeypatch.setattr(build, "finish", look)
    monkeypatch.setattr(build.TrainIndex, "_compared", second_builder)
    influence(tmp_path).build_index()
    assert seen == [os.getpid()] * 2
    assert not (tmp_path / lock.HOLDER).exists()
    with FileLock(tmp_path / "building.lock", timeout=0):
        pass


def test_b15_space_is_compared_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    influence(tmp_path / "full").build_index()
    n_bytes = SketchIndex.open(tmp_path / "full").bytes
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(lock.shutil, "disk_usage", lambda _: usage(0, 0, n_bytes // 2))
    with pytest.raises(OSError, match=r"needs .* KiB more, and .* KiB are free .* Nothing was computed"):
        influence(tmp_path / "new").build_index()
    assert not list(tmp_path.glob("new/*/*"))
    influence(tmp_path / "full").build_index()  # needs none


def test_e6_a_shard_beyond_the_manifest_is_damaged(tmp_path: Path) -> None:
    influence(tmp_path).build_index()
    index = SketchIndex.open(tmp_path)
    name = index.checkpoints[0]
    rows, fingerprints = torch.zeros(1, index.width), torch.zeros(1, 8, dtype=torch.uint8)
    far = Shard.write(index.folder(name), 10**9, rows, fingerprints, index.dtype, index.manifest.owner(name))
    index = SketchIndex.open(tmp_path)
    assert index.damaged == [far.path]
    assert len(index.fingerprints()[0]) == len(TRAIN)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "examples": None}))
    with pytest.raises(ValueError, match="a shard claims to hold example 1000000000"):
        SketchIndex.open(tmp_path).fingerprints()


def test_e6_plot_takes_no_memory_for_what_is_absent(here: Path) -> None:
    far = 10**12
    lines = [json.loads(line) for line in (here / "out" / "scores.jsonl").read_text().splitlines()]
    scores = StepInfluence.load(here / "out" / "scores.safetensors")
    first = int(scores.indices[0, 0])
    scores.indices[scores.indices == first] = far
    for line in lines:
        for pair in line["proponents"]:
            pair["index"] = far if pair["index"] == first else pair["index"]
    scores.save(here / "out" / "scores.safetensors")
    write_rows(here / "out" / "scores.jsonl", lines)
    texts = Results.read(here / "out").train_texts
    assert (len(texts), texts[far], texts[far - 1]) == (far + 1, lines[0]["proponents"][0]["example"]["text"], "")


def test_e10_rows_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    influence(tmp_path).build_index()
    index = SketchIndex.open(tmp_path)
    name = index.checkpoints[0]
    shard = index.shards[name][0]
    rows = shard.rows.clone()
    rows[0, 0] = float("nan")
    Shard.write(index.folder(name), shard.start, rows, shard.mapped("fingerprints").clone(), index.dtype, shard.owner)
    with pytest.raises(ValueError, match="holds numbers that are not finite"):
        influence(tmp_path).influence(TEST)


# --- hostile files ---


def test_e8_hostile_manifests_give_only_our_errors(here: Path, seed: int) -> None:
    chance = random.Random(seed)
    file = here / "idx" / "manifest.json"
    good = file.read_text()

    def read() -> None:
        index = SketchIndex.open(here / "idx")
        str(index)
        index.verify()
        index.fingerprints()

    read()
    for _ in range(300):
        file.write_text(mutated_json(good, chance))
        survives(read)


def test_e8_hostile_recipes_give_only_our_errors(here: Path, seed: int) -> None:
    chance = random.Random(seed)
    file = here / "idx" / "command.json"
    good = file.read_text()
    for _ in range(300):
        file.write_text(mutated_json(good, chance))
        survives(lambda: Recipe.read(here / "idx"))


def test_e8_hostile_results_give_only_our_errors(here: Path, seed: int) -> None:
    chance = random.Random(seed)
    lines, tensors = here / "out" / "scores.jsonl", here / "out" / "scores.safetensors"
    good_lines, good_tensors = lines.read_text().splitlines(), tensors.read_bytes()

    def read() -> None:
        results = Results.read(here / "out")
        str(results)
        results.train_texts[0]

    read()
    for _ in range(300):
        lines.write_text("\n".join([mutated_json(good_lines[0], chance).replace("\n", " "), *good_lines[1:]]) + "\n")
        survives(read)
    lines.write_text("\n".join(good_lines) + "\n")
    for _ in range(200):
        tensors.write_bytes(mutated_bytes(good_tensors, chance))
        survives(read)


def test_e6_hostile_shards_give_only_our_errors(here: Path, seed: int) -> None:
    chance = random.Random(seed)
    file = next((here / "idx").glob("*/*.safetensors"))
    good = file.read_bytes()

    def read() -> None:
        index = SketchIndex.open(here / "idx")
        index.verify()
        index.fingerprints()

    for _ in range(300):
        file.write_bytes(mutated_bytes(good, chance))
        survives(read)
    header = b'{"a":' + b"[" * 10**5
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    survives(read)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"prelude": torch.zeros(2, 3)}, "prelude must be of shape"),
        ({"n_steps": torch.tensor([9, 9])}, "n_steps must be from 0 to"),
        ({"indices": torch.tensor([[0, -1], [0, 1]])}, "indices must be from 0 to"),
        ({"indices": torch.tensor([[0, 2**60], [0, 1]])}, "indices must be from 0 to"),
        ({"n_steps": torch.ones(2)}, "n_steps must not be of torch.float32"),
    ],
)
def test_e8_saved_results_whose_fields_disagree_are_refused(
    change: dict[str, torch.Tensor], error: str, here: Path
) -> None:
    file = here / "out" / "scores.safetensors"
    with safe_open(file, "pt") as tensors:
        metadata = tensors.metadata()
        fields = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    save_file({**fields, **change}, file, metadata)
    with pytest.raises(ValueError, match=f"scores.safetensors is damaged: {error}"):
        StepInfluence.load(file)


# --- small things ---


def test_c_tables_in_notebooks(here: Path) -> None:
    result = StepInfluence.load(here / "out" / "scores.safetensors")
    assert "largest step (from 0)" in result._repr_html_()
    model = CASES[0].model(torch.float32)
    found = find_loop(model, TRAIN[:1])
    assert html.escape(str(found)) in found._repr_html_()
    assert "difference" in Coverage(("w",), (1.0,), (1.0,), (0.0,))._repr_html_()


def test_c_sizes_are_said_in_a_unit_that_shows_them(here: Path) -> None:
    text = str(SketchIndex.open(here / "idx"))
    assert "0.0 MiB" not in text
    assert "KiB in 1 shard\n" in text


@pytest.mark.filterwarnings(r"ignore:\d+% of these scores come from")  # one's gradients are much the larger
def test_c_the_winners_bar_does_not_stop_halfway(capsys: pytest.CaptureFixture) -> None:
    influence(None).step_influence(TEST, k=2, show_progress=True)
    bars = capsys.readouterr().err.replace("\n", "\r").split("\r")
    winners = [bar for bar in bars if "score winners step by step" in bar]
    assert winners
    assert not any("%" in bar for bar in winners)
    assert max(len(bar.split(":")[0]) for bar in winners) < 60


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    days = 3 * 24 * 60 * 60

    def leave(name: str, file: str, age: float) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / file).write_text("left")
        for path in (folder / file, folder):
            os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
        return folder

    abandoned = leave(".out.0123abcd.unfinished", "scores.jsonl", days)
    kept = [
        leave(".out.4567abcd.unfinished", "scores.jsonl", 0),  # another process may be writing it
        leave(".out.89ababcd.unfinished", "notes.txt", days),
        leave(".out.mine.unfinished", "scores.jsonl", days),
        leave(".other.0123abcd.unfinished", "scores.jsonl", days),
    ]
    with written_whole(tmp_path / "out", overwrite=False) as stage:
        (stage / "scores.jsonl").write_text("new")
    assert not abandoned.exists()
    assert all(folder.is_dir() for folder in kept)
    assert (tmp_path / "out" / "scores.jsonl").read_text() == "new"
