"""Preconditioners against dense linear algebra on explicit gradients, in float64 and exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, looped_gpt, rows
from reference import Truth, Untying, damped_fisher_inverse, damped_hessian_inverse, next_token_loss, truth
from safetensors import safe_open
from torch import Tensor, nn
from transformers.trainer_pt_utils import get_parameter_names

from captum_sdi import Exact, SDIInfluence, StepInfluence, TensorSketch
from captum_sdi.features import StepFeatures
from captum_sdi.passes import Point
from captum_sdi.preconditioners import Adam, Fisher, Hessian, Preconditioner
from captum_sdi.preconditioners.lanczos import ritz_pairs
from captum_sdi.preconditioners.moments import named_groups
from captum_sdi.train_side import TrainSide

pytestmark = pytest.mark.filterwarnings(r"ignore:\d+% of these scores come from")  # checkpoints differ on purpose

TRAIN, TEST = rows(7, seed=1), rows(3, seed=2)
RATES = (0.5, 0.25)
DAMPING = 0.1
OUTSIDE = {"wte": "prelude", "wpe": "prelude", "ln_f": "coda", "lm_head": "coda"}
CASE = Case(
    "tiny",
    looped_gpt(n_embd=3, n_head=1, n_positions=9, n_prelude=0, n_core=1, n_coda=0, injection="add"),
    Untying(loop=("core",), anchors=("core",), n_steps=3, outside=OUTSIDE),
)
MODEL = CASE.model()
SIZES = {name: parameter.numel() for name, parameter in MODEL.named_parameters()}
N_PARAMETERS = sum(SIZES.values())


def weights(number: int) -> dict[str, Tensor]:
    """The weights of one of two checkpoints."""
    generator = torch.Generator().manual_seed(number)
    state = {}
    for name, tensor in MODEL.state_dict().items():
        state[name] = tensor + 0.05 * number * torch.randn(tensor.shape, generator=generator).to(tensor)
    return state


def load(model: nn.Module, number: int) -> float:
    model.load_state_dict(weights(number))
    return RATES[number]


def squares(number: int) -> dict[str, Tensor]:
    """Second moments that an Adam could have at one of two checkpoints."""
    generator = torch.Generator().manual_seed(10 + number)
    moments = {}
    for name, parameter in MODEL.named_parameters():
        moments[name] = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.01
    return moments


def model_at(number: int) -> nn.Module:
    model = CASE.model()
    load(model, number)
    return model


@dataclass(frozen=True)
class Gradients:
    """Bins ``(2 + t, entries)`` of every example at one checkpoint."""

    train: list[Tensor]
    test: list[Tensor]

    @property
    def whole(self) -> Tensor:
        """The train examples' gradients ``(n, entries)``."""
        return torch.stack([gradient.sum(0) for gradient in self.train])


@pytest.fixture(scope="module")
def gradients() -> list[Gradients]:
    made = []
    for number in range(len(RATES)):
        model = model_at(number)
        train, test = ([CASE.gradients(model, row, None) for row in part] for part in (TRAIN, TEST))
        made.append(Gradients(train, test))
    return made


def mean_loss(model: nn.Module) -> Tensor:
    losses = []
    for row in TRAIN:
        logits = model(input_ids=row["input_ids"].unsqueeze(0)).logits[0]
        losses.append(next_token_loss(logits, row["labels"]))
    return torch.stack(losses).mean()


@pytest.fixture(scope="module")
def hessian_inverse() -> Tensor:
    return damped_hessian_inverse(model_at(1), mean_loss, list(SIZES), DAMPING)


Weighed = list[tuple[float, Tensor, Gradients]]
"""For each checkpoint that counts: its weight, P as a matrix, the gradients."""


@pytest.fixture(params=["fisher", "adam", "hessian"])
def method(request: pytest.FixtureRequest, gradients: list[Gradients]) -> tuple[Preconditioner, Weighed]:
    """A preconditioner, and what it stands for."""
    sizes, n = list(SIZES.values()), len(TRAIN)
    if request.param == "fisher":
        blocks = [damped_fisher_inverse(each.whole, sizes, DAMPING) / n for each in gradients]
        return Fisher(DAMPING), [(0.5, block, each) for block, each in zip(blocks, gradients, strict=True)]
    if request.param == "adam":
        moments = [torch.cat([square.flatten() for square in squares(number).values()]) for number in range(2)]
        diagonals = [torch.diag(1 / (moment.sqrt() + 1e-3)) for moment in moments]
        return Adam(squares, eps=1e-3), list(zip(RATES, diagonals, gradients, strict=True))
    inverse = request.getfixturevalue("hessian_inverse")
    return Hessian(rank=N_PARAMETERS, damping=DAMPING), [(1.0, inverse / n, gradients[1])]


def expected(weighed: Weighed) -> Truth:
    """Every split of ⟨g, P φ⟩ from the definitions; what it says of examples themselves is another thing's."""
    parts = []
    for weight, matrix, each in weighed:
        parts.append((weight, each.train, [bins @ matrix for bins in each.test]))
    return truth(parts)


def influence(preconditioner: Preconditioner | None, **changes: Any) -> SDIInfluence:
    settings: dict[str, Any] = {
        "model": CASE.model(),
        "train_dataset": TRAIN,
        "checkpoints": [0, 1],
        "checkpoints_load_func": load,
        "layers": None,
        "batch_size": 7,
        "sketch": Exact(),
        "preconditioner": preconditioner,
        **changes,
    }
    return SDIInfluence(**settings)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8 * float(theirs.abs().max()))


# --- every split is that of dense matrices ------------------------------------------------------------------------


def test_every_question_is_answered_by_the_dense_matrix(method: tuple[Preconditioner, Weighed], tmp_path: Path) -> None:
    preconditioner, weighed = method
    wanted = expected(weighed)
    sdi = influence(preconditioner)
    assert_close(sdi.influence(TEST), wanted.totals)
    steps = sdi.step_influence(TEST)
    assert_close(steps.trajectories, wanted.trajectories)
    assert_close(steps.prelude, wanted.prelude)
    assert_close(steps.coda, wanted.coda)
    assert_close(steps.trajectories.sum(-1) + steps.prelude + steps.coda, steps.influence_scores)
    assert_close(sdi.step_matrix(TEST), wanted.matrix)

    order = wanted.totals.argsort(dim=1, descending=True)[:, :3]
    for top in (sdi.step_influence(TEST, k=3), sdi.step_influence(TEST, k=3, rerank=5)):
        assert torch.equal(top.indices, order)
        assert_close(top.influence_scores, wanted.totals.gather(1, order))
        assert_close(top.trajectories, wanted.trajectories.gather(1, order.unsqueeze(-1).expand(-1, -1, 3)))
    vectors = sdi.compute_intermediate_quantities(TEST, test=True), sdi.compute_intermediate_quantities(TRAIN)
    assert_close(vectors[0] @ vectors[1].T, wanted.totals)

    own = sum(weight * ((each.whole @ matrix) * each.whole).sum(1) for weight, matrix, each in weighed)
    assert_close(sdi.self_influence(), own)
    assert_close(sdi.step_self_influence().influence_scores, own)
    assert_close(sdi.influence(TEST, aggregate=True), wanted.totals.sum(0, keepdim=True))

    indexed = influence(preconditioner, index=tmp_path)
    assert_close(indexed.step_influence(TEST).trajectories, wanted.trajectories)
    assert torch.equal(indexed.influence(TEST, k=3).indices, order)
    assert_close(indexed.self_influence(), own)
    assert_close(indexed.step_matrix(TEST), wanted.matrix)


@dataclass(frozen=True)
class Whole:
    """P = 1 on all parameters' entries together."""

    acts_on = "whole"

    def fit(self, point: Point, train: TrainSide) -> Callable[[StepFeatures], StepFeatures]:
        return lambda features: features


@pytest.mark.parametrize("pool", [False, True])
def test_exact_features_are_sketched_as_gradients_are(pool: bool) -> None:
    sketch = TensorSketch(16, pool=pool)
    plain, whole = (influence(each, sketch=sketch).step_influence(TEST) for each in (None, Whole()))
    torch.testing.assert_close(whole.trajectories, plain.trajectories, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.score_errors, plain.score_errors, rtol=1e-4, atol=1e-5)


def test_an_index_is_built_where_a_preconditioner_looks(tmp_path: Path) -> None:
    """The Hessian looks at the last checkpoint alone; rows of the others are added when they are asked for."""
    assert influence(Hessian(rank=3), index=tmp_path).build_index().checkpoints == ["1"]
    plain = influence(None, index=tmp_path)
    assert_close(plain.influence(TEST), influence(None).influence(TEST))
    assert plain.build_index().checkpoints == ["1", "0"]


# --- unit norms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["train", "both"])
def test_unit_norms_are_those_of_whole_gradients_at_each_checkpoint(
    gradients: list[Gradients], normalize: str, tmp_path: Path
) -> None:
    parts = []
    for each in gradients:
        matrix = damped_fisher_inverse(each.whole, list(SIZES.values()), DAMPING) / len(TRAIN)
        train = [bins / bins.sum(0).norm() for bins in each.train]
        test = [bins @ matrix for bins in each.test]
        if normalize == "both":
            test = [bins / bins.sum(0).norm() for bins in test]
        parts.append((0.5, train, test))
    wanted = truth(parts)
    order = wanted.totals.argsort(dim=1, descending=True)[:, :3]
    for index in (None, tmp_path / "index"):
        sdi = influence(Fisher(DAMPING), normalize=normalize, index=index)
        assert_close(sdi.influence(TEST), wanted.totals)
        steps = sdi.step_influence(TEST)
        assert_close(steps.trajectories, wanted.trajectories)
        assert_close(steps.trajectories.sum(-1) + steps.prelude + steps.coda, steps.influence_scores)
        assert_close(sdi.step_matrix(TEST), wanted.matrix)
        top = sdi.step_influence(TEST, k=3)
        for result in (steps, top, sdi.step_self_influence(), sdi.step_influence(TEST, per="token")):
            assert result.is_normalized
        top.save(tmp_path / "top.safetensors")
        assert StepInfluence.load(tmp_path / "top.safetensors").to(torch.float32).is_normalized
        assert torch.equal(top.indices, order)
        assert_close(top.influence_scores, wanted.totals.gather(1, order))
    reranked = sdi.influence(TEST, k=3, rerank=5)
    assert_close(reranked.influence_scores, wanted.totals.gather(1, order))
    vectors = sdi.compute_intermediate_quantities(TEST, test=True), sdi.compute_intermediate_quantities(TRAIN)
    assert_close(vectors[0] @ vectors[1].T, wanted.totals)
    assert_close(sdi.self_influence(), influence(Fisher(DAMPING), normalize=normalize).influence(TRAIN).diagonal())


def test_another_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r'normalize= must be "train", "both" or None, got True'):
        influence(None, normalize=True)


# --- what is kept -------------------------------------------------------------------------------------------------


def kept_files(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"{kind}-*.safetensors"))


def touched(file: Path) -> int:
    return file.stat().st_mtime_ns


@pytest.mark.parametrize(
    ("kind", "preconditioner", "count"), [("fisher", Fisher(), 2), ("hessian", Hessian(rank=3), 1)]
)
def test_fits_are_kept_beside_the_index(kind: str, preconditioner: Preconditioner, count: int, tmp_path: Path) -> None:
    first = influence(preconditioner, index=tmp_path).influence(TEST)
    files = kept_files(tmp_path, kind)
    assert len(files) == count
    times = [touched(file) for file in files]
    assert torch.equal(influence(preconditioner, index=tmp_path).influence(TEST), first)
    assert [touched(file) for file in kept_files(tmp_path, kind)] == times

    damaged = bytearray(files[0].read_bytes())
    damaged[-1] ^= 0x80
    files[0].write_bytes(damaged)
    assert torch.equal(influence(preconditioner, index=tmp_path).influence(TEST), first)
    with safe_open(files[0], framework="pt") as opened:
        assert set(opened.metadata()) == {"key", "digest"}

    def other_load(model: nn.Module, number: int) -> float:
        return load(model, 1 - number)

    (tmp_path / "other").mkdir()
    moved = influence(preconditioner, index=tmp_path / "other", checkpoints_load_func=other_load)
    for file in files:
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    alone = influence(preconditioner, checkpoints_load_func=other_load).influence(TEST)
    assert_close(moved.influence(TEST), alone)


def test_a_hessian_is_computed_once_and_anew_where_weights_or_examples_change(monkeypatch: pytest.MonkeyPatch) -> None:
    from captum_sdi.preconditioners import hessian

    runs = []
    ritz_pairs = hessian.ritz_pairs
    monkeypatch.setattr(hessian, "ritz_pairs", lambda *args: runs.append(1) or ritz_pairs(*args))
    rows_at_hand = [dict(row) for row in TRAIN]
    sdi = influence(Hessian(rank=3), checkpoints=None, train_dataset=rows_at_hand)
    before = sdi.influence(TEST)
    sdi.step_influence(TEST)
    assert len(runs) == 1
    with torch.no_grad():
        sdi.model.lm_head.weight.mul_(1.5)
    assert not torch.allclose(sdi.influence(TEST), before)
    assert len(runs) == 2
    rows_at_hand[0]["input_ids"] = rows_at_hand[0]["input_ids"].flip(0)
    sdi.influence(TEST)
    assert len(runs) == 3


# --- the Hessian's settings ---------------------------------------------------------------------------------------


def test_a_hessian_on_disk_is_the_same_and_leaves_no_file(tmp_path: Path) -> None:
    in_memory = influence(Hessian(rank=5)).influence(TEST)
    on_disk = influence(Hessian(rank=5, on_disk=True), index=tmp_path)
    assert_close(on_disk.influence(TEST), in_memory)
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_hessian_of_some_examples_and_of_a_part_of_the_parameters() -> None:
    chosen = [TRAIN[1], TRAIN[3], TRAIN[5]]  # the middles of three thirds
    names = [name for name in SIZES if name.startswith("core.")]
    n_core = sum(SIZES[name] for name in names)

    def loss(model: nn.Module) -> Tensor:
        losses = []
        for row in chosen:
            logits = model(input_ids=row["input_ids"].unsqueeze(0)).logits[0]
            losses.append(next_token_loss(logits, row["labels"]))
        return torch.stack(losses).mean()

    model = model_at(1)
    inverse = damped_hessian_inverse(model, loss, names, DAMPING) / len(TRAIN)
    train, test = ([CASE.gradients(model, row, "loop") for row in part] for part in (TRAIN, TEST))
    wanted = truth([(1.0, train, [bins @ inverse for bins in test])])
    hessian = Hessian(rank=n_core, damping=DAMPING, examples=3)
    assert_close(influence(hessian, layers="loop").step_influence(TEST).trajectories, wanted.trajectories)


def test_few_vectors_are_those_of_the_krylov_space() -> None:
    """From the definition: H on the span of its powers times the start, an orthonormal basis of which QR gives."""
    factor = torch.randn(40, 40, dtype=torch.float64)
    matrix = factor @ torch.diag(torch.linspace(-2, 9, 40).double()) @ factor.T
    rank = 6
    basis = torch.empty(rank, 40, dtype=torch.float64)
    values = ritz_pairs(lambda vector: matrix @ vector, basis, torch.Generator().manual_seed(0))
    power = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    powers = []
    for _ in range(rank):
        powers.append(power / power.norm())
        power = matrix @ powers[-1]
    span, _ = torch.linalg.qr(torch.stack(powers, dim=1))
    wanted, rotation = torch.linalg.eigh(span.T @ matrix @ span)
    torch.testing.assert_close(values, wanted, rtol=1e-7, atol=1e-7 * float(wanted.abs().max()))
    projections = torch.einsum("ri,rj->rij", basis, basis)
    vectors = (span @ rotation).T
    torch.testing.assert_close(projections, torch.einsum("ri,rj->rij", vectors, vectors), rtol=1e-5, atol=1e-6)


def test_few_vectors_already_hold_the_largest_curvatures(hessian_inverse: Tensor, gradients: list[Gradients]) -> None:
    """With 30 of 219 vectors scores are nearly those of all, as plain products of gradients are not."""
    full = expected([(1.0, hessian_inverse, gradients[1])]).totals.flatten()
    few = influence(Hessian(rank=30, damping=DAMPING)).influence(TEST).flatten()
    plain = influence(None, checkpoints=[1]).influence(TEST).flatten()
    assert correlation(full, few) > 0.999
    assert correlation(full, plain) < 0.99


def correlation(ours: Tensor, theirs: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1])


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: Hessian(rank=0), ValueError, r"Hessian\(rank=\.\.\.\) must be at least 1, got 0"),
        (lambda: Hessian(rank=2.5), TypeError, r"Hessian\(rank=\.\.\.\) must be an int, got 2\.5"),
        (lambda: Hessian(examples=0), ValueError, r"Hessian\(examples=\.\.\.\) must be at least 1, got 0"),
        (lambda: Hessian(damping=0), ValueError, r"Hessian\(damping=\.\.\.\) must be positive and finite, got 0"),
        (lambda: Fisher(damping=float("nan")), ValueError, r"Fisher\(damping=\.\.\.\) must be positive and finite"),
        (lambda: Fisher(damping="0.1"), TypeError, r"Fisher\(damping=\.\.\.\) must be a number, got '0\.1'"),
        (lambda: Adam(eps=-1), ValueError, r"Adam\(eps=\.\.\.\) must not be negative, got -1"),
        (lambda: Adam(eps="small"), TypeError, r"Adam\(eps=\.\.\.\) must be a number, got 'small'"),
        (lambda: Adam(moments=squares(0)), TypeError, r"Adam\(moments=\.\.\.\) must be a function of a checkpoint"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Callable[[], object], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        make()


def test_more_vectors_than_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=rf"Hessian\(rank=10000\) is more than the {N_PARAMETERS} entries"):
        influence(Hessian(rank=10_000)).influence(TEST)


def test_half_precision_has_no_hessian() -> None:
    sdi = influence(Hessian(rank=2), model=CASE.model(torch.bfloat16), checkpoints=None)
    with pytest.raises(ValueError, match="Half precision rounds them away"):
        sdi.influence(TEST)


def test_wide_rows_are_refused_before_the_shortlist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captum_sdi.preconditioners.fisher.WIDEST", 20)
    sdi = influence(Fisher(), sketch=TensorSketch(16))
    sdi.influence(TEST)
    batches = iter(range(100))
    monkeypatch.setattr("captum_sdi.queries.top_examples", lambda *args: next(batches))
    with pytest.raises(ValueError, match=r"Fisher\(\) needs a matrix of .* for '.*', whose rows have as many numbers"):
        sdi.influence(TEST, k=2, rerank=3)
    assert next(batches) == 0


# --- Adam's moments -----------------------------------------------------------------------------------------------


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The parameter groups of a Trainer, by transformers' own function."""
    patterns = ["bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [nn.LayerNorm], patterns))
    groups = [[p for name, p in model.named_parameters() if (name in decayed) == decays] for decays in (True, False)]
    return [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]


def one_group(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def matrices_and_vectors(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [p for p in model.parameters() if (p.ndim > 1) == matrix]} for matrix in (True, False)]


GROUPS = {"trainer": decay_groups, "one": one_group, "by axes": matrices_and_vectors}


def trained(groups: str) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Tensor]]:
    """A model after three updates, its optimizer, and v̂ written out for every parameter."""
    model = CASE.model()
    optimizer = torch.optim.AdamW(GROUPS[groups](model), lr=1e-3, betas=(0.9, 0.95), eps=1e-3)
    moments = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        mean_loss(model).backward()
        for name, parameter in model.named_parameters():
            moments[name] = 0.95 * moments[name] + 0.05 * parameter.grad.square()
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, {name: moment / (1 - 0.95**3) for name, moment in moments.items()}


def saved_as_folder(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """What a Trainer leaves."""
    checkpoint = folder / "checkpoint-3"
    model.save_pretrained(checkpoint)
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    log = {"global_step": 3, "max_steps": 9, "log_history": [{"step": 3, "learning_rate": 0.5}]}
    (checkpoint / "trainer_state.json").write_text(json.dumps(log))
    return checkpoint


@pytest.mark.parametrize("groups", GROUPS)
def test_moments_are_found_by_group_and_shape(groups: str, tmp_path: Path) -> None:
    model, optimizer, moments = trained(groups)
    folder = saved_as_folder(tmp_path, model, optimizer)
    file = tmp_path / "step-3.pt"
    state = {
        "model_state_dict": model.state_dict(),
        "learning_rate": 0.5,
        "optimizer_state_dict": optimizer.state_dict(),
    }
    torch.save(state, file)
    given = influence(Adam(lambda checkpoint: moments, eps=1e-3), **at(folder)).influence(TEST)
    plain = influence(None, **at(folder)).influence(TEST)
    assert correlation(given.flatten(), plain.flatten()) < 0.99
    for source in (folder, file, folder / "model.safetensors"):
        assert_close(influence(Adam(), **at(source)).influence(TEST), given)


class Gated(nn.Module):
    """Parameters that the Trainer's rule alone tells apart: a norm that is no `nn.LayerNorm`, and a decayed vector."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm = nn.RMSNorm(4)
        self.fc = nn.Linear(4, 3)
        self.gate = nn.Parameter(torch.ones(5))


@pytest.mark.parametrize("frozen", ["", "fc.bias"])
def test_the_trainers_groups_are_known_by_its_own_rule(frozen: str) -> None:
    model = Gated()
    trainable = [name for name, _ in model.named_parameters() if name != frozen]
    model.get_parameter(frozen or "gate").requires_grad_(not frozen)
    groups = decay_groups(model)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    optimizer = torch.optim.AdamW(groups)
    sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad).backward()
    optimizer.step()
    spared = [name for name in ("q_norm.weight", "fc.bias") if name != frozen]
    expected = [[name for name in trainable if name not in spared], spared]
    assert named_groups(optimizer.state_dict(), model, trainable) == expected


def at(source: Path) -> dict[str, Any]:
    from captum_sdi import load_checkpoint

    return {"checkpoints": [str(source)], "checkpoints_load_func": load_checkpoint}


def refusal_of(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Ask for influence with a changed optimizer's state."""
    model, optimizer, _ = trained("one")
    checkpoint = saved_as_folder(folder, model, optimizer)
    state = optimizer.state_dict()
    change(state)
    torch.save(state, checkpoint / "optimizer.pt")
    influence(Adam(), **at(checkpoint)).influence(TEST)


def in_reversed_order(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"].reverse()


def without_squares(state: dict[str, Any]) -> None:
    for each in state["state"].values():
        each["momentum_buffer"] = each.pop("exp_avg_sq")


def without_betas(state: dict[str, Any]) -> None:
    del state["param_groups"][0]["betas"]


def before_the_first_step(state: dict[str, Any]) -> None:
    state["state"][0]["step"] = torch.tensor(0.0)


def without_one(state: dict[str, Any]) -> None:
    del state["state"][0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (in_reversed_order, "by position, and neither their order nor the Trainer's rule for weight decay alone gives"),
        (without_squares, "has no exp_avg_sq and step of every parameter"),
        (without_betas, "holds the state of an optimizer that is no Adam"),
        (before_the_first_step, "was saved before the optimizer's first step"),
        (without_one, "has no second moments of 'wte.weight', only of 'wpe.weight'"),
    ],
)
def test_an_optimizer_that_cannot_be_read_is_refused(
    change: Callable[[dict[str, Any]], object], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        refusal_of(tmp_path, change)


def test_missing_moments_are_refused_before_the_work(tmp_path: Path) -> None:
    model, optimizer, _ = trained("one")
    checkpoint = saved_as_folder(tmp_path, model, optimizer)
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"There is no .*optimizer\.pt, which Adam\(\) reads second moments from"):
        influence(Adam(), **at(checkpoint)).study()
    with pytest.raises(ValueError, match=r"reads second moments beside a checkpoint's weights; None is no path"):
        influence(Adam(), checkpoints=None).study()
    for answer, sentence in ((None, "must return second moments by"), (dict.fromkeys(SIZES, "a"), "no tensor of")):
        with pytest.raises(TypeError, match=f"moments= .*{sentence}"):
            influence(Adam(moments=lambda checkpoint, answer=answer: answer)).influence(TEST)
    wrong = {name: torch.ones(2) for name in SIZES}
    zeros = {name: 0 * moment for name, moment in squares(0).items()}
    with pytest.raises(ValueError, match=r"moments= has second moments of shape \(2,\) for 'wte\.weight'"):
        influence(Adam(lambda checkpoint: wrong)).influence(TEST)
    with pytest.raises(ValueError, match=r"divides by √v \+ ε, which is 0 in 'wte\.weight'"):
        influence(Adam(lambda checkpoint: zeros, eps=0)).influence(TEST)
