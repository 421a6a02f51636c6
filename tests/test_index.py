"""The index: the same scores as without it, and what differs is said before anything is lost."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, rows
from filelock import FileLock
from index_faults import TEST, TRAIN, checkpoints, influence
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from captum_sdi import Exact, SDIInfluence, SketchIndex, TensorSketch, whole_file
from captum_sdi.data.collate import Collator
from captum_sdi.data.fingerprints import example_fingerprints
from captum_sdi.data.losses import TokenCrossEntropy
from captum_sdi.index import folder, identity, lock, verify, writer
from captum_sdi.passes import Point

pytestmark = pytest.mark.filterwarnings(r"ignore:\d+% of these scores come from")  # one's gradients are much the larger
CASE = CASES[0]
FIELDS = ("influence_scores", "trajectories", "prelude", "coda", "score_errors", "trajectory_errors")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches to a shard, three examples to a piece: ends fall everywhere."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 3000)
    monkeypatch.setattr(folder, "_PIECE", 0)
    monkeypatch.setattr(folder, "_LEAST", 3)
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.05)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return CASE.model(dtype)


def sdi(path: Path | None, **changes: Any) -> SDIInfluence:
    return influence(path, **{"model": model(), **changes})


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


class Stream(IterableDataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


# --- the same numbers ---


@pytest.mark.parametrize(
    ("sketch", "dtype"),
    [(TensorSketch(64), torch.float32), (TensorSketch(64, pool=True), torch.float32), (Exact(), torch.float64)],
    ids=["sketch", "pooled", "exact"],
)
def test_every_call_gives_what_it_gives_without_an_index(tmp_path: Path, sketch: Any, dtype: torch.dtype) -> None:
    layers = None if isinstance(sketch, Exact) else "loop"
    settings = {"sketch": sketch, "model": model(dtype), "layers": layers}
    plain, indexed = sdi(None, **settings), sdi(tmp_path / "index", **settings)
    # Rows are stored as sketched; a float64 model's scores are still sums of float64.
    tolerance = 1e-10 if dtype == torch.float64 else 2e-6
    for call in (
        lambda s: s.step_influence(TEST),
        lambda s: s.step_influence(TEST, k=4),
        lambda s: s.step_influence(TEST, k=3, rank_by=1, proponents=False),
        lambda s: s.step_influence(TEST, k=50, aggregate=True),
        lambda s: s.step_self_influence(),
    ):
        ours, theirs = call(indexed), call(plain)
        assert ours.indices is theirs.indices or torch.equal(ours.indices, theirs.indices)
        assert ours.n_steps.tolist() == theirs.n_steps.tolist()
        for field in FIELDS:
            assert_close(getattr(ours, field), getattr(theirs, field), tolerance)
    assert_close(indexed.influence(TEST), plain.influence(TEST), tolerance)
    ours, theirs = indexed.influence(TEST, k=5), plain.influence(TEST, k=5)
    assert torch.equal(ours.indices, theirs.indices)
    assert_close(ours.influence_scores, theirs.influence_scores, tolerance)
    assert_close(indexed.self_influence(), plain.self_influence(), tolerance)
    assert_close(indexed.step_matrix(TEST, indices=[7, 2]), plain.step_matrix(TEST, indices=[7, 2]), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
def test_half_precision_is_half_the_size(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    """Also for gradients far below what float16 can hold: rows carry a scale."""
    tiny = lambda output, labels: 1e-9 * TokenCrossEntropy()(output, labels)  # noqa: E731
    for loss in (None, tiny):
        if loss is not None:
            loss.reduction = "none"
        whole = sdi(tmp_path / f"whole{loss is tiny}", loss_fn=loss)
        half = sdi(tmp_path / f"half{loss is tiny}", loss_fn=loss, index_dtype=dtype)
        assert_close(half.influence(TEST), whole.influence(TEST), tolerance)
        assert half.build_index().bytes < 0.62 * whole.build_index().bytes
        assert sdi(half.build_index().path, loss_fn=loss).build_index().dtype == dtype  # None: as it is


def test_a_second_question_recomputes_nothing_of_the_train_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdi(tmp_path).build_index()
    asked = sdi(tmp_path)
    passes: list[tuple[str, int]] = []
    batch = Point.batch

    def counted(self: Point, raw: Any, side: Any, positions: Any, **settings: Any) -> Any:
        passes.append((side.name, len(positions)))
        return batch(self, raw, side, positions, **settings)

    monkeypatch.setattr(Point, "batch", counted)
    first = asked.step_influence(TEST, k=3)
    assert passes == [("train", 1), ("test", 3)] * 2  # one stored row for each checkpoint
    passes.clear()
    assert torch.equal(asked.step_influence(TEST, k=3).influence_scores, first.influence_scores)
    assert passes == [("test", 3)] * 2


def test_the_test_sides_depth_may_change_between_questions(tmp_path: Path) -> None:
    sdi(tmp_path).build_index()
    for n_loops in (1, 5):
        ours = sdi(tmp_path, test_forward_kwargs={"n_loops": n_loops}).step_influence(TEST, k=4)
        theirs = sdi(None, test_forward_kwargs={"n_loops": n_loops}).step_influence(TEST, k=4)
        assert torch.equal(ours.indices, theirs.indices)
        assert_close(ours.trajectories, theirs.trajectories, 2e-6)


@pytest.mark.parametrize("proponents", [True, False])
def test_exact_gradients_decide_among_the_shortlisted(tmp_path: Path, proponents: bool) -> None:
    """A pooled sketch this small orders wrongly; with everybody shortlisted the top k is the exact one."""
    sketch = TensorSketch(8, pool=True)
    pooled, exact = sdi(tmp_path, sketch=sketch), sdi(None, sketch=Exact())
    theirs = exact.step_influence(TEST, k=4, proponents=proponents)
    assert not torch.equal(pooled.step_influence(TEST, k=4, proponents=proponents).indices, theirs.indices)
    ours = pooled.step_influence(TEST, k=4, proponents=proponents, rerank=len(TRAIN))
    assert torch.equal(ours.indices, theirs.indices)
    for field in FIELDS:
        assert_close(getattr(ours, field), getattr(theirs, field), 1e-5)
    assert torch.equal(pooled.influence(TEST, 4, proponents, rerank=len(TRAIN)).indices, theirs.indices)
    few = pooled.influence(TEST, k=2, rerank=3)
    shortlist = pooled.influence(TEST, k=3).indices
    assert all(set(best) <= set(listed) for best, listed in zip(few.indices.tolist(), shortlist.tolist(), strict=True))
    with pytest.raises(ValueError, match=r"rerank=2 is how many candidates.*at least k"):
        pooled.influence(TEST, k=3, rerank=2)


# --- train sets of every kind ---


def test_streams_are_numbered_in_order(tmp_path: Path) -> None:
    stream = sdi(tmp_path, train_dataset=Stream(TRAIN))
    theirs = sdi(None).step_influence(TEST, k=4)
    for _ in range(2):
        ours = stream.step_influence(TEST, k=4)
        assert torch.equal(ours.indices, theirs.indices)
        assert_close(ours.trajectories, theirs.trajectories, 2e-6)
    assert SketchIndex.open(tmp_path).examples == len(TRAIN)
    with pytest.raises(ValueError, match="another train_dataset: it has 20 examples, the index 23"):
        sdi(tmp_path, train_dataset=Stream(TRAIN[:20])).influence(TEST)


def test_a_streaming_set_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    listed = [{key: value.tolist() for key, value in row.items()} for row in TRAIN]
    streamed = datasets.Dataset.from_list(listed).to_iterable_dataset()
    ours = sdi(tmp_path, train_dataset=streamed).step_influence(TEST, k=4)
    theirs = sdi(None).step_influence(TEST, k=4)
    assert torch.equal(ours.indices, theirs.indices)
    assert_close(ours.trajectories, theirs.trajectories, 2e-6)


def test_a_large_set_is_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete index asks for a sample of a large set, and for nothing else."""
    monkeypatch.setattr(verify, "CHECKED", 6)

    class Counting:
        def __init__(self) -> None:
            self.asked: list[int] = []

        def __len__(self) -> int:
            return len(TRAIN)

        def __getitem__(self, i: int) -> Any:
            self.asked.append(i)
            return TRAIN[i]

    sdi(tmp_path).build_index()
    data = Counting()
    asked = sdi(tmp_path, train_dataset=data)
    asked.influence(TEST)
    assert set(data.asked) == {0, 1, 2, 3, 20, 21, 22}  # the batches of the first three and of the last three
    data.asked.clear()
    asked.step_matrix(TEST, indices=[20])
    assert set(data.asked) == {20, 21, 22}


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_an_index_does_not_depend_on_the_batch_size(tmp_path: Path, size: int) -> None:
    sdi(tmp_path, batch_size=4).build_index()
    assert_close(sdi(tmp_path, batch_size=size).influence(TEST), sdi(None).influence(TEST), 2e-6)


def test_fingerprints_ignore_padding_and_nothing_else() -> None:
    collate = Collator(pad_token_id=7)
    alone = [bytes(example_fingerprints(collate([row]))[0].tolist()) for row in TRAIN]
    assert len(set(alone)) == len(TRAIN)
    for size in (2, 5, 23):
        for start in range(0, len(TRAIN), size):
            some = example_fingerprints(collate(TRAIN[start : start + size]))
            assert [bytes(row.tolist()) for row in some] == alone[start : start + size]
    row = {"input_ids": torch.tensor([3, 4, 5]), "labels": torch.tensor([-100, 4, 5])}
    changed = [
        {**row, "input_ids": torch.tensor([3, 4, 6])},
        {**row, "labels": torch.tensor([-100, -100, 5])},
        {**row, "attention_mask": torch.tensor([0, 1, 1])},
        {key: value[:2] for key, value in row.items()},
        {**row, "scores": torch.tensor(0.5)},
    ]
    prints = {bytes(example_fingerprints(collate([r]))[0].tolist()) for r in (row, *changed)}
    assert len(prints) == 6
    pairs = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 0.0]]), torch.tensor([0, 1, 2])
    assert len(set(map(tuple, example_fingerprints(pairs).tolist()))) == 3
    assert torch.equal(example_fingerprints((pairs[0][1:], pairs[1][1:])), example_fingerprints(pairs)[1:])


# --- what differs is said ---


def refused(path: Path, match: str, **changes: Any) -> None:
    before = {file: file.read_bytes() for file in path.rglob("*.safetensors")}
    with pytest.raises(ValueError, match=match):
        sdi(path, **changes).influence(TEST)
    assert {file: file.read_bytes() for file in path.rglob("*.safetensors")} == before


def test_an_index_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdi(tmp_path).build_index()
    refused(tmp_path, "sketch dim: 64 in the index, 32 here", sketch=TensorSketch(32))
    refused(tmp_path, "sketch seed: 0 in the index, 5 here", sketch=TensorSketch(64, seed=5))
    refused(tmp_path, "sketch kind: TensorSketch in the index, Exact here", sketch=Exact())
    refused(tmp_path, "index_dtype: float32 in the index, float16 here", index_dtype=torch.float16)
    refused(tmp_path, "parameters wte.weight: none in the index", layers=None)
    refused(tmp_path, "loop modules: ", loop="core.blocks.0")
    refused(tmp_path, "forward_kwargs: None in the index, {'n_loops': 2} here", forward_kwargs={"n_loops": 2})
    refused(tmp_path, "loss: next-token cross.* here", loss_fn=TokenCrossEntropy(shift=False))
    others = [(eta, {**weights, "ln_f.weight": weights["ln_f.weight"] + 1}) for eta, weights in checkpoints()]
    refused(tmp_path, "checkpoint '#0' weights: ", checkpoints=others)
    refused(tmp_path, "it has 22 examples, the index 23", train_dataset=TRAIN[:-1])
    edited = [*TRAIN[:9], rows(1, seed=8)[0], *TRAIN[10:]]
    refused(tmp_path, "example 9 is the first that differs", train_dataset=edited)
    refused(tmp_path, "example 9 is the first that differs", train_dataset=Stream(edited))
    monkeypatch.setattr(identity, "version", lambda _: "0.0.1")
    refused(tmp_path, "captum_sdi: .* in the index, 0.0.1 here")


def test_other_hash_tables_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a torch whose generator draws other numbers."""
    sdi(tmp_path).build_index()
    draw = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: draw(*args, **kwargs).flip(0))
    refused(tmp_path, "checkpoint '#0' hash tables: .* in the index")


def test_a_stored_row_is_recomputed_when_an_index_is_opened(tmp_path: Path) -> None:
    """What no setting tells: here a loss of the same name."""

    def loss(factor: float) -> Any:
        def scaled(output: Any, labels: Tensor) -> Tensor:
            return factor * TokenCrossEntropy()(output, labels)

        scaled.reduction = "none"
        return scaled

    sdi(tmp_path, loss_fn=loss(1.0)).build_index()
    refused(tmp_path, "the row of train example 0 at checkpoint '#0' differs .* by 0.5 of", loss_fn=loss(1.5))


def test_another_checkpoint_is_added_and_the_rate_may_change(tmp_path: Path) -> None:
    first, second = checkpoints()
    sdi(tmp_path, checkpoints=[first]).build_index()
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    edited = [*TRAIN[:9], rows(1, seed=8)[0], *TRAIN[10:]]
    refused(tmp_path, "example 9 is the first that differs", checkpoints=[first, second], train_dataset=edited)
    both = sdi(tmp_path, checkpoints=[(0.1, first[1]), second])
    assert_close(both.influence(TEST), sdi(None, checkpoints=[(0.1, first[1]), second]).influence(TEST), 2e-6)
    assert SketchIndex.open(tmp_path).checkpoints == ["#0", "#1"]
    after = {file.name: file.stat().st_mtime_ns for file in SketchIndex.open(tmp_path).folder("#0").iterdir()}
    assert {name: after[name] for name in before} == before


def test_the_models_weights_may_not_change_under_an_index(tmp_path: Path) -> None:
    trained = model()
    asked = sdi(tmp_path, model=trained, checkpoints=None)
    asked.influence(TEST)
    with torch.no_grad():
        trained.ln_f.weight.add_(1)
    with pytest.raises(ValueError, match="checkpoint 'current' weights"):
        asked.influence(TEST)


# --- the folder ---


def test_a_summary_without_a_model(tmp_path: Path) -> None:
    sdi(tmp_path).build_index()
    index = SketchIndex.open(tmp_path)
    assert (index.examples, index.dim, index.complete, index.checkpoints) == (23, 64, True, ["#0", "#1"])
    assert index.bytes == sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    for line in ("state         complete", "examples      23", "dim=64, seed=0, pool=False", "learning rate 0.25, 23"):
        assert line in str(index)
    next(index.folder("#1").glob("*.safetensors")).unlink()
    assert not SketchIndex.open(tmp_path).complete
    assert "incomplete" in str(SketchIndex.open(tmp_path))
    with pytest.raises(ValueError, match=r"There is no index at .*empty: no manifest.json"):
        SketchIndex.open(tmp_path / "empty")


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match=r"holds other things \(thesis.tex\)"):
        sdi(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        sdi(tmp_path / "thesis.tex")
    with pytest.raises(TypeError, match="index= must be the path of a folder, got int"):
        sdi(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"index_dtype= must be one of .* got torch.int8"):
        sdi(tmp_path / "new", index_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"build_index.. needs a folder"):
        sdi(None).build_index()


@pytest.mark.parametrize("damage", ["removed", "truncated"])
def test_a_lost_manifest_is_written_anew(tmp_path: Path, damage: str) -> None:
    expected = sdi(tmp_path).influence(TEST)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    manifest = tmp_path / "manifest.json"
    if damage == "truncated":
        manifest.write_text(manifest.read_text()[:100])
        with pytest.raises(ValueError, match=r"manifest.json is damaged .* Remove it"):
            sdi(tmp_path).influence(TEST)
    manifest.unlink()
    assert torch.equal(sdi(tmp_path).influence(TEST), expected)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == before
    manifest.unlink()
    with pytest.raises(ValueError, match="was written for another model, checkpoint, sketch or version"):
        sdi(tmp_path, sketch=TensorSketch(32)).influence(TEST)


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    sdi(tmp_path).build_index()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(ValueError, match="'format_version': 99}, this version of captum_sdi reads"):
        SketchIndex.open(tmp_path)


def test_one_builder_at_a_time(tmp_path: Path) -> None:
    with FileLock(tmp_path / "building.lock"), pytest.raises(OSError, match="another process is building the index"):
        sdi(tmp_path).build_index()
    asked = sdi(tmp_path)
    expected = asked.influence(TEST)
    with FileLock(tmp_path / "building.lock"):
        assert torch.equal(asked.influence(TEST), expected)  # reading needs no lock


@pytest.mark.parametrize(
    ("code", "match"),
    [(errno.ENOSPC, "the disk of the index at .* is full. Every shard written so far is kept"),
     (errno.EROFS, "lacks rows or is damaged, and the folder is read-only: 0 of . examples at '#0'")],
)  # fmt: skip
def test_a_disk_that_does_not_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, match: str) -> None:
    """After the second shard; the rest follows when there is room again."""
    expected = sdi(None).influence(TEST)
    written = whole_file._sync
    calls = iter(range(1000))

    def failing(path: Path) -> None:
        if next(calls) >= 4:
            raise OSError(code, os.strerror(code))
        written(path)

    index = tmp_path / "index"
    with monkeypatch.context() as patch:
        patch.setattr(whole_file, "_sync", failing)
        with pytest.raises(OSError, match=match if code == errno.ENOSPC else "read-only"):
            sdi(index).influence(TEST)
    kept = list(index.rglob("*.safetensors"))
    assert len(kept) == 1
    assert not list(index.rglob("*.unfinished"))
    stamp = kept[0].stat().st_mtime_ns
    assert_close(sdi(index).influence(TEST), expected, 2e-6)
    assert kept[0].stat().st_mtime_ns == stamp


def test_a_read_only_index_is_read_but_not_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sdi(tmp_path).influence(TEST)

    def refuse(path: Any, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system", str(path))

    for name in ("mkdir", "unlink", "write_bytes", "write_text"):
        monkeypatch.setattr(Path, name, refuse)
    assert torch.equal(sdi(tmp_path).influence(TEST), expected)
    shard = max(tmp_path.rglob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(PermissionError, match=f"read-only: damaged {shard}; .*21 of 23 examples at '#1'"):
        sdi(tmp_path).influence(TEST)
    assert shard.exists()


def test_an_error_of_the_train_set_stays_its_own(tmp_path: Path) -> None:
    class Locked(list):
        def __getitem__(self, i: Any) -> Any:
            if i == 9:
                raise PermissionError(errno.EACCES, "no", "/data/9")
            return super().__getitem__(i)

    with pytest.raises(PermissionError, match="/data/9"):
        sdi(tmp_path, train_dataset=Locked(TRAIN)).build_index()


# --- memory of a GPU ---


class Hungry(nn.Module):
    """Says that memory is out above so many examples."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.core, self.most, self.sizes = nn.Linear(4, 4), most, []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        for _ in range(3):
            x = x + torch.tanh(self.core(x))
        return x


def squared(output: Tensor, labels: Tensor) -> Tensor:
    return (output - labels).square().sum(1)


squared.reduction = "none"  # type: ignore[attr-defined]


def vectors(n: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randn(2, 4, generator=generator)) for _ in range(n)]  # type: ignore[misc]


def test_a_batch_that_does_not_fit_is_halved() -> None:
    torch.manual_seed(0)
    hungry = Hungry(most=3)
    asked = SDIInfluence(hungry, vectors(20), loss_fn=squared, batch_size=16, loop="core", sketch=Exact())
    with pytest.warns(UserWarning, match=r"not suffice for (16|8|4) examples: going on with \d at a time"):
        ours = asked.step_influence(vectors(1))
    assert max(hungry.sizes[hungry.sizes.index(16) + 3 :]) <= 3  # 16, 8, 4, and never more than fits again
    hungry.most = 100
    theirs = SDIInfluence(hungry, vectors(20), loss_fn=squared, batch_size=1, loop="core", sketch=Exact())
    assert_close(ours.trajectories, theirs.step_influence(vectors(1)).trajectories, 1e-6)
    hungry.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        asked.influence(vectors(1))


def test_auto_finds_the_largest_batch_that_fits() -> None:
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    hungry = Hungry(most=5)
    asked = SDIInfluence(hungry, vectors(20), loss_fn=squared, batch_size="auto", loop="core", sketch=Exact())
    assert asked.batch_size == 5
    assert hungry.sizes[-3:] == [1, 5, 1]  # one: what is compared with its row in the batch that fits
    hungry.sizes.clear()
    asked.influence(vectors(4))
    assert set(hungry.sizes) == {4, 5}
    roomy = SDIInfluence(Hungry(100), vectors(20), loss_fn=squared, batch_size="auto", loop="core", sketch=Exact())
    assert roomy.batch_size == 16
    loader = DataLoader(vectors(20), 7)
    given = SDIInfluence(Hungry(100), loader, loss_fn=squared, batch_size="auto", loop="core", sketch=Exact())
    assert given.train_dataloader is loader
