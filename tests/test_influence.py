"""`SDIInfluence` with `Exact()` against the slow truth, for every case, layer choice, batch size and dtype."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, rows
from reference import Truth, spread, truth
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from captum_sdi import Exact, LoopSpec, SDIInfluence, StepInfluence, TensorSketch
from captum_sdi.data.collate import Collator

TRAIN, TEST = rows(5, seed=1), rows(3, seed=2)
ETAS = (0.5, 0.125)


def checkpoints_of(case: Case) -> list[tuple[float, dict[str, Tensor]]]:
    """Two sets of float32 weights with different learning rates."""
    models = case.model(torch.float32), spread(case.model(torch.float32), 0.1, seed=5)
    return [(eta, dict(model.state_dict())) for eta, model in zip(ETAS, models, strict=True)]


def load(model: nn.Module, checkpoint: tuple[float, dict[str, Tensor]]) -> float:
    eta, weights = checkpoint
    model.load_state_dict(weights)
    return eta


@functools.cache
def truth_of(case: Case, layers: str | None, **test_forward: int) -> Truth:
    """What the definitions say, in float64."""
    parts = []
    model = case.model(torch.float64)
    for checkpoint in checkpoints_of(case):
        eta = load(model, checkpoint)
        train = [case.gradients(model, row, layers) for row in TRAIN]
        parts.append((eta, train, [case.gradients(model, row, layers, **test_forward) for row in TEST]))
    return truth(parts)


def assert_close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Relative to the largest entry: 1e-5 in float32, 1e-10 in float64."""
    assert ours.shape == theirs.shape
    assert ours.dtype == dtype
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    scale = theirs.abs().max()
    assert (ours.double() - theirs).abs().max() <= tolerance * scale


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("layers", ["loop", None])
@pytest.mark.filterwarnings(r"ignore:\d+% of these scores come from")  # rates and depths differ on purpose
def test_everything_equals_the_truth(case: Case, layers: str | None, dtype: torch.dtype) -> None:
    expected = truth_of(case, layers)
    sdi = SDIInfluence(case.model(dtype), TRAIN, checkpoints_of(case), load, layers, batch_size=2, sketch=Exact())
    steps = sdi.step_influence(TEST)
    assert_close(sdi.influence(TEST), expected.totals, dtype)
    assert_close(steps.influence_scores, expected.totals, dtype)
    assert_close(steps.trajectories, expected.trajectories, dtype)
    assert_close(sdi.step_matrix(TEST), expected.matrix, dtype)
    assert_close(sdi.self_influence(), expected.self_totals, dtype)
    self_steps = sdi.step_self_influence()
    assert_close(self_steps.influence_scores, expected.self_totals, dtype)
    assert_close(self_steps.trajectories, expected.self_trajectories, dtype)
    if layers is None:
        assert_close(steps.prelude, expected.prelude, dtype)
        assert_close(steps.coda, expected.coda, dtype)
    else:
        assert not steps.prelude.any()
        assert not steps.coda.any()
    assert not steps.score_errors.any()
    assert not steps.trajectory_errors.any()
    assert steps.n_steps.tolist() == [case.untying.n_steps] * len(TEST)
    assert steps.indices is None


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 50])
def test_batch_size_and_padding_change_nothing(case: Case, batch_size: int) -> None:
    """Batches of one are unpadded; the last batch of two is smaller; fifty holds all of them, padded to the longest."""
    expected = truth_of(case, None)
    kwargs = {"batch_size": batch_size, "sketch": Exact()}
    steps = SDIInfluence(case.model(), TRAIN, checkpoints_of(case), load, None, **kwargs).step_influence(TEST)
    assert_close(steps.influence_scores, expected.totals, torch.float64)
    assert_close(steps.trajectories, expected.trajectories, torch.float64)


@pytest.mark.parametrize("n_loops", [1, 2, 5])
@pytest.mark.filterwarnings(r"ignore:\d+% of these scores come from")  # rates and depths differ on purpose
def test_the_test_side_may_run_another_number_of_steps(n_loops: int) -> None:
    case = CASES[0]
    expected = truth_of(case, None, n_loops=n_loops)
    kwargs = {"sketch": Exact(), "test_forward_kwargs": {"n_loops": n_loops}}
    sdi = SDIInfluence(case.model(), TRAIN, checkpoints_of(case), load, None, batch_size=2, **kwargs)
    steps = sdi.step_influence(TEST)
    assert_close(steps.trajectories, expected.trajectories, torch.float64)
    assert_close(sdi.step_matrix(TEST), expected.matrix, torch.float64)
    assert steps.n_steps.tolist() == [n_loops] * len(TEST)


def test_depth_may_differ_from_batch_to_batch() -> None:
    """Shallower test examples are padded with zeros to the deepest; `n_steps` tells."""
    case = CASES[0]
    model = case.model()
    depth = lambda batch: {"n_loops": 1 + batch["input_ids"].shape[1] % 3}  # noqa: E731
    sdi = SDIInfluence(model, TRAIN, layers=None, batch_size=1, sketch=Exact(), forward_kwargs=depth)
    steps = sdi.step_influence(TEST)
    depths = [1 + len(row["input_ids"]) % 3 for row in TEST]
    assert steps.n_steps.tolist() == depths
    assert steps.trajectories.shape == (3, 5, max(depths))
    train = [case.gradients(model, row, None, n_loops=1 + len(row["input_ids"]) % 3) for row in TRAIN]
    for q, row in enumerate(TEST):
        steps_of_q = case.gradients(model, row, None, n_loops=depths[q])[2:]
        expected = torch.stack([steps_of_q @ g.sum(0) for g in train])
        assert_close(steps.trajectories[q, :, : depths[q]], expected, torch.float64)
        assert not steps.trajectories[q, :, depths[q] :].any()
        matrix, deep = sdi.step_matrix(TEST)[q], max(1 + len(row["input_ids"]) % 3 for row in TRAIN)
        by_step = [case.gradients(model, row, None, n_loops=1 + len(row["input_ids"]) % 3)[2:] for row in TRAIN]
        padded = torch.stack([F.pad(g, (0, 0, 0, deep - len(g))) @ steps_of_q.T for g in by_step])
        assert_close(matrix[..., : depths[q]], padded, torch.float64)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.filterwarnings(r"ignore:\d+% of these scores come from")  # rates and depths differ on purpose
def test_checkpoints_may_differ_in_depth(indexed: bool, tmp_path: Path) -> None:
    """A step that a checkpoint does not run counts as zero there, also when it is what training examples rank by."""

    def deepen(model: nn.Module, depth: int) -> float:
        model.config.n_loops = depth
        return 1.0

    index = {"index": tmp_path / "index"} if indexed else {}
    sdi = SDIInfluence(CASES[0].model(), TRAIN, [2, 4], deepen, batch_size=2, sketch=TensorSketch(64), **index)
    whole = sdi.step_influence(TEST)
    assert whole.trajectories.shape == (3, 5, 4)
    best = sdi.step_influence(TEST, k=2, rank_by=3)
    expected = whole.trajectories[..., 3].sort(dim=1, descending=True)
    assert torch.equal(best.indices, expected.indices[:, :2])
    torch.testing.assert_close(best.trajectories[..., 3], expected.values[:, :2])
    with pytest.raises(ValueError, match="rank_by=4, but the test side runs 4 loop steps"):
        sdi.step_influence(TEST, k=2, rank_by=4)


@pytest.mark.parametrize("settings", [{}, {"rerank": 3}], ids=["sketched", "reranked"])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_step_beyond_the_depth_is_refused_before_a_train_example_is_read(
    settings: dict[str, int],
    indexed: bool,
    tmp_path: Path,
) -> None:
    class Unread(Dataset[Any]):
        def __len__(self) -> int:
            return len(TRAIN)

        def __getitem__(self, position: int) -> Any:
            raise AssertionError("a train example was read")

    index = {"index": tmp_path / "index"} if indexed else {}
    sdi = SDIInfluence(CASES[0].model(), Unread(), checkpoints_of(CASES[0]), load, batch_size=2, loop="core", **index)
    with pytest.raises(ValueError, match="rank_by=3, but the test side runs 3 loop steps"):
        sdi.step_influence(TEST, k=2, rank_by=3, **settings)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("layers", ["loop", None])
def test_conservation_against_plain_autograd(case: Case, layers: str | None) -> None:
    """The sum over steps is TracIn from one ordinary gradient per example, without anything untied."""
    model = case.model(torch.float32)
    parameters = [p for name, p in model.named_parameters() if name in case.names(model, layers)]

    def gradient(row: dict[str, Tensor]) -> Tensor:
        labels = row["labels"] if case.causal else torch.cat([row["labels"][:1], row["labels"]])
        logits = model(input_ids=row["input_ids"].unsqueeze(0)).logits[0]
        loss = nn.functional.cross_entropy(logits[: len(labels) - 1], labels[1:])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    train, test = (torch.stack([gradient(row) for row in rows]) for rows in (TRAIN, TEST))
    steps = SDIInfluence(model, TRAIN, layers=layers, batch_size=3, sketch=Exact()).step_influence(TEST)
    assert_close(steps.trajectories.sum(-1) + steps.prelude + steps.coda, (test @ train.T).double(), torch.float32)


@pytest.mark.parametrize("n_checkpoints", [1, 2])
@pytest.mark.parametrize("proponents", [True, False])
@pytest.mark.parametrize("rank_by", [None, 0, 2])
def test_top_k_is_the_whole_result_sorted(n_checkpoints: int, proponents: bool, rank_by: int | None) -> None:
    model = CASES[0].model()
    checkpoints = checkpoints_of(CASES[0])[:n_checkpoints]
    sdi = SDIInfluence(model, TRAIN, checkpoints, load, None, batch_size=2)
    whole = sdi.step_influence(TEST)
    ranked = whole.influence_scores if rank_by is None else whole.trajectories[..., rank_by]
    order = ranked.argsort(dim=1, descending=proponents)[:, :2]
    best = sdi.step_influence(TEST, k=2, proponents=proponents, rank_by=rank_by)
    assert best.indices is not None
    assert best.indices.tolist() == order.tolist()
    for name in ("influence_scores", "prelude", "coda", "score_errors"):
        assert_close(getattr(best, name), getattr(whole, name).gather(1, order), torch.float64)
    at = order.unsqueeze(-1).expand(-1, -1, 3)
    assert_close(best.trajectories, whole.trajectories.gather(1, at), torch.float64)
    assert_close(best.trajectory_errors, whole.trajectory_errors.gather(1, at), torch.float64)
    if rank_by is None:
        captum = sdi.influence(TEST, k=2, proponents=proponents)
        assert captum.indices.tolist() == order.tolist()


class WholeNumbers(nn.Module):
    """A linear loop of whole numbers: every sum is exact, in any order and by any kernel of the processor's."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.core = nn.Linear(4, 4, bias=False).double()
        self.core.weight.data = torch.randint(-3, 4, (4, 4), generator=generator).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.core(self.core(x))


def summed(output: Tensor, labels: Tensor) -> Tensor:
    return (output * labels).sum(1)


summed.reduction = "none"  # type: ignore[attr-defined]


def test_of_equal_scores_the_first_comes_first() -> None:
    generator = torch.Generator().manual_seed(1)
    one, other = torch.randint(-3, 4, (2, 2, 4), generator=generator).double()
    twins = [tuple(one), tuple(other), tuple(one), tuple(one)]
    for batch_size in (1, 2, 4):
        settings = {"batch_size": batch_size, "loss_fn": summed, "loop": "core", "sketch": Exact()}
        found = SDIInfluence(WholeNumbers(), twins, **settings).step_influence([tuple(one)], k=4).indices
        assert found is not None
        assert [i for i in found[0].tolist() if i != 1] == [0, 2, 3]


def test_aggregate_is_the_sum_over_the_test_side() -> None:
    model = CASES[0].model()
    sdi = SDIInfluence(model, TRAIN, checkpoints_of(CASES[0]), load, None, batch_size=2, sketch=Exact())
    whole, summed = sdi.step_influence(TEST), sdi.step_influence(TEST, aggregate=True)
    assert_close(summed.trajectories, whole.trajectories.sum(0, keepdim=True), torch.float64)
    assert_close(sdi.influence(TEST, aggregate=True), whole.influence_scores.sum(0, keepdim=True), torch.float64)
    assert summed.n_steps.tolist() == [3]


def test_step_matrix_of_chosen_examples() -> None:
    model = CASES[0].model()
    sdi = SDIInfluence(model, TRAIN, checkpoints_of(CASES[0]), load, batch_size=2, sketch=Exact())
    assert_close(sdi.step_matrix(TEST, indices=[4, 0, 4]), sdi.step_matrix(TEST)[:, [4, 0, 4]], torch.float64)


@pytest.mark.parametrize("sketched", [False, True])
def test_intermediate_quantities_multiply_to_influence(sketched: bool) -> None:
    model = CASES[0].model()
    checkpoints = checkpoints_of(CASES[0])
    kwargs = {} if sketched else {"sketch": Exact()}
    sdi = SDIInfluence(
        model, TRAIN, checkpoints, load, None, batch_size=2, test_forward_kwargs={"n_loops": 2}, **kwargs
    )
    train, test = sdi.compute_intermediate_quantities(TRAIN), sdi.compute_intermediate_quantities(TEST, test=True)
    assert_close(test @ train.T, sdi.influence(TEST), torch.float64)
    n_parameters = len(list(model.named_parameters()))
    size = n_parameters * 2048 if sketched else sum(p.numel() for p in model.parameters())
    assert train.shape == (len(TRAIN), len(checkpoints) * size)
    total = sdi.compute_intermediate_quantities(TRAIN, aggregate=True)
    assert_close(total, train.sum(0, keepdim=True), torch.float64)


@pytest.mark.parametrize("form", ["mapping", "tuple", "loader", "dataset"])
def test_inputs_come_in_any_form(form: str) -> None:
    model = CASES[0].model()
    batch = Collator()(TEST)
    sdi = SDIInfluence(model, TRAIN, batch_size=2, sketch=Exact())
    inputs = {
        "mapping": batch,
        "tuple": (batch["input_ids"], batch["attention_mask"], batch["labels"]),
        "loader": DataLoader(TEST, batch_size=2, collate_fn=Collator()),
        "dataset": TEST,
    }[form]
    assert_close(sdi.influence(inputs), sdi.influence(batch), torch.float64)


def test_layers_by_name_count_in_full_frozen_or_not() -> None:
    case = CASES[0]
    model = case.model()
    model.core.blocks[0].requires_grad_(False)
    expected = [n for n, _ in model.named_parameters() if n.startswith(("core.blocks.0.", "lm_head."))]

    def gradient(row: dict[str, Tensor]) -> Tensor:
        whole = copy.deepcopy(model).requires_grad_(True)
        logits = whole(input_ids=row["input_ids"].unsqueeze(0)).logits[0]
        loss = nn.functional.cross_entropy(logits[:-1], row["labels"][1:])
        named = dict(whole.named_parameters())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [named[name] for name in expected])])

    train, test = (torch.stack([gradient(row) for row in rows]) for rows in (TRAIN, TEST))
    sdi = SDIInfluence(model, TRAIN, layers=["core.blocks.0", "lm_head"], batch_size=2, sketch=Exact())
    assert_close(sdi.influence(TEST), test @ train.T, torch.float64)
    assert not any(p.requires_grad for p in model.core.blocks[0].parameters())


@pytest.mark.parametrize("loop", [None, "core", ["core"], LoopSpec(("core",)), LoopSpec(("core",), ("core.adapter",))])
def test_the_loop_by_name_by_spec_or_found(loop: object) -> None:
    model = CASES[0].model()
    expected = SDIInfluence(model, TRAIN, sketch=Exact(), loop="core").step_influence(TEST)
    found = SDIInfluence(model, TRAIN, sketch=Exact(), loop=loop).step_influence(TEST)
    assert_close(found.trajectories, expected.trajectories, torch.float64)


@pytest.mark.parametrize("layers", ["loop", None])
def test_activation_checkpointing_changes_no_number(layers: str | None) -> None:
    model = CASES[0].model()
    plain = SDIInfluence(model, TRAIN, layers=layers, batch_size=2, sketch=Exact()).step_influence(TEST)
    sdi = SDIInfluence(model, TRAIN, layers=layers, batch_size=2, sketch=Exact(), activation_checkpointing=True)
    recomputed = sdi.step_influence(TEST)
    assert_close(recomputed.trajectories, plain.trajectories, torch.float64)
    assert_close(recomputed.coda, plain.coda, torch.float64)
    assert "forward" not in vars(model.core)


def test_the_losses_of_the_two_sides_may_differ() -> None:
    """The test side asks about a logit instead of a loss."""
    model = CASES[0].model()

    def logit(output: object, labels: Tensor) -> Tensor:
        return output.logits[:, -1, 3]  # type: ignore[attr-defined]

    logit.reduction = "none"  # type: ignore[attr-defined]
    sdi = SDIInfluence(model, TRAIN, batch_size=1, sketch=Exact(), test_loss_fn=logit)
    core = [p for name, p in model.named_parameters() if name.startswith("core.")]
    row = TEST[0]
    value = model(input_ids=row["input_ids"].unsqueeze(0)).logits[0, -1, 3]
    asked = torch.cat([g.flatten() for g in torch.autograd.grad(value, core)])
    whole = SDIInfluence(model, TRAIN, batch_size=1, sketch=Exact())
    trained = whole.compute_intermediate_quantities(TRAIN)
    assert_close(sdi.influence([row]), (trained @ asked).unsqueeze(0), torch.float64)


def test_scores_come_back_from_disk(tmp_path: Path) -> None:
    sdi = SDIInfluence(CASES[0].model(), TRAIN, layers=None)
    for result in (sdi.step_influence(TEST), sdi.step_influence(TEST, k=2), sdi.step_self_influence()):
        result.save(tmp_path / "scores.safetensors")
        loaded = StepInfluence.load(tmp_path / "scores.safetensors")
        for name in ("indices", "influence_scores", "trajectories", "prelude", "n_steps", "trajectory_errors"):
            ours, theirs = getattr(loaded, name), getattr(result, name)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
        assert result.to(torch.float16).trajectories.dtype == torch.float16
        assert result.to(torch.float16).n_steps.dtype == torch.long
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a saved StepInfluence: missing fields"):
        StepInfluence.load(tmp_path / "other.safetensors")
    newer = {"format": "captum_sdi.StepInfluence", "version": "10"}
    save_file({"weight": torch.zeros(2)}, tmp_path / "newer.safetensors", newer)
    with pytest.raises(ValueError, match="saved by a newer captum_sdi, in version 10"):
        StepInfluence.load(tmp_path / "newer.safetensors")
    (tmp_path / "words").write_text("no tensors")
    with pytest.raises(ValueError, match="words is not a saved StepInfluence"):
        StepInfluence.load(tmp_path / "words")
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing to save scores in"):
        result.save(tmp_path / "missing" / "scores")


def test_a_result_is_itself_and_prints_its_shapes() -> None:
    result = SDIInfluence(CASES[0].model(), TRAIN).step_influence(TEST, k=2)
    assert result in [result]
    assert result != result.to("cpu")
    assert repr(result).startswith("StepInfluence(indices=(3, 2), influence_scores=(3, 2), trajectories=(3, 2, 3), ")


@pytest.mark.parametrize("sketch", [Exact(), TensorSketch(64)])
def test_inside_autocast_only_the_model_is_in_half_precision(sketch: Exact | TensorSketch) -> None:
    """Conservation holds to float32 rounding, though activations and backprops are bfloat16."""
    sdi = SDIInfluence(CASES[0].model(torch.float32), TRAIN, layers=None, batch_size=2, sketch=sketch)
    whole = sdi.step_influence(TEST)
    with torch.autocast("cpu", torch.bfloat16):
        steps, matrix = sdi.step_influence(TEST), sdi.step_matrix(TEST)
    assert_close(
        steps.trajectories.sum(-1) + steps.prelude + steps.coda, steps.influence_scores.double(), torch.float32
    )
    assert matrix.dtype == torch.float32
    assert not torch.equal(steps.influence_scores, whole.influence_scores)
    cosine = torch.cosine_similarity(steps.influence_scores.flatten(), whole.influence_scores.flatten(), 0)
    assert cosine > 0.99
