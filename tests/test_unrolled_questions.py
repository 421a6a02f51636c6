"""The questions beside totals and trajectories, what is kept of a run, the gauge, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from cases import Case
from test_unrolled import CONCAT, TEST, TIED, TRAIN, N
from torch import Tensor, nn

from captum_sdi.data import Collator
from captum_sdi.data.losses import default_loss
from captum_sdi.unrolled import SGD, AdamW, Gauge, TrainingRun, UnrolledInfluence
from captum_sdi.unrolled.estimate import UnrolledEstimate
from captum_sdi.unrolled.gauge import noise_share, warn_unless_trusted
from captum_sdi.unrolled.updates import Updates

BATCHES = [[2, 0, 3], [1, 2], [3, 1, 0]]
RATES = [0.002, 0.003, 0.001]


def trained(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: list[dict[str, Tensor]] = TRAIN,
    weights: Tensor | None = None,
    loss_fn: Any = None,
    **forward: Any,
) -> None:
    """Train in place, as anybody would."""
    weights = torch.ones(len(train), dtype=torch.float64) if weights is None else weights
    for rate, batch in zip(RATES, BATCHES, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        raw = Collator()([train[i] for i in batch])
        labels = raw.pop("labels")
        losses = (loss_fn or default_loss(model))(model(**raw, **forward), labels)
        optimizer.zero_grad()
        (weights[batch] * losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def ran(case: Case = TIED, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[nn.Module, UnrolledInfluence]:
    model = case.model(dtype)
    start = copy.deepcopy(model.state_dict())
    trained(model, torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), eps=1e-6))
    run = TrainingRun(AdamW(betas=(0.9, 0.99), eps=1e-6), RATES, BATCHES)
    return model, UnrolledInfluence(model, TRAIN, run, start, **{"layers": None, "check": False, **settings})


def shallowly_trained(**settings: Any) -> tuple[nn.Module, UnrolledInfluence]:
    """Train with the depth of ``forward_kwargs``."""
    model = TIED.model()
    start = copy.deepcopy(model.state_dict())
    depth = settings.get("forward_kwargs", {})
    trained(model, torch.optim.SGD(model.parameters()), **depth)
    run = TrainingRun(SGD(), RATES, BATCHES)
    return model, UnrolledInfluence(model, TRAIN, run, start, check=False, **settings)


# --- what is kept ---


@pytest.mark.parametrize("keep", ["all", "sqrt", 1])
def test_scores_do_not_depend_on_what_is_kept(keep: Any, tmp_path: Path) -> None:
    _, unrolled = ran(keep="all")
    _, other = ran(keep=keep, folder=tmp_path)
    expected = unrolled.influence(TEST)
    assert torch.equal(other.influence(TEST), expected)
    assert torch.equal(other.influence(TEST), expected)
    assert len(list(tmp_path.glob("run-*/state-*"))) == {"all": 3, "sqrt": 2, 1: 1}[keep]


@pytest.mark.parametrize("n_before", [1, 2, 5])
def test_a_killed_question_goes_on_where_it_was(n_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ran(keep="all")[1].influence(TEST)
    n_micro_batches = len(BATCHES)
    counted: list[int] = []
    read = Updates.micro_batches

    def dying(self: Updates, update: int) -> Any:
        if len(counted) == n_before:
            raise KeyboardInterrupt
        counted.append(update)
        return read(self, update)

    _, killed = ran(keep="all", folder=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Updates, "micro_batches", dying)
        with pytest.raises(KeyboardInterrupt):
            killed.influence(TEST)
    counted.clear()
    _, resumed = ran(keep="all", folder=tmp_path)
    monkeypatch.setattr(Updates, "micro_batches", lambda self, update: (counted.append(update), read(self, update))[1])
    assert torch.equal(resumed.influence(TEST), expected)
    forwards = n_micro_batches - max(0, min(n_before, n_micro_batches - 1))
    backwards = n_micro_batches - max(0, n_before - n_micro_batches)
    assert len(counted) == forwards + backwards
    assert not list(tmp_path.glob("run-*/scores-*"))


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_place_of_the_folder_is_refused_before_the_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"folder=.*file is no folder"):
        ran(folder=tmp_path / place)


def test_states_of_another_run_are_not_taken(tmp_path: Path) -> None:
    ran(folder=tmp_path)[1].influence(TEST)
    model, _ = ran()
    other_rows = [{**row, "labels": row["labels"].roll(1)} for row in TRAIN]
    run = TrainingRun(AdamW(betas=(0.9, 0.99), eps=1e-6), RATES, BATCHES)
    other = UnrolledInfluence(model, other_rows, run, TIED.model().state_dict(), folder=tmp_path, check=False)
    with pytest.raises(ValueError, match="does not end at the model's weights"):
        other.influence(TEST)
    assert len(list(tmp_path.glob("run-*/state-00000000.safetensors"))) == 2


def test_a_float32_run_of_torch_is_replayed_to_the_bit_nearly() -> None:
    _, precise = ran()
    _, single = ran(dtype=torch.float32)
    assert single.check().replay_error < 1e-5
    expected = precise.influence(TEST)
    assert (single.influence(TEST) - expected).norm() < 1e-3 * expected.norm()


# --- questions ---


def test_the_model_comes_back_as_it_was() -> None:
    model, unrolled = ran()
    model.train()
    before = copy.deepcopy(model.state_dict())
    objects = [id(parameter) for parameter in model.parameters()]
    unrolled.step_matrix(TEST, [1])
    unrolled.predicted_losses(TEST, torch.ones(1, N, dtype=torch.bool))
    assert model.training
    assert objects == [id(parameter) for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_top_k_are_the_best_of_all() -> None:
    _, unrolled = ran()
    whole = unrolled.step_influence(TEST)
    best = unrolled.step_influence(TEST, k=2)
    assert torch.equal(best.indices, whole.influence_scores.argsort(descending=True)[:, :2])
    assert torch.equal(best.trajectories[1, 0], whole.trajectories[1, best.indices[1, 0]])
    worst = unrolled.influence(TEST, k=1, proponents=False)
    assert torch.equal(worst.indices[:, 0], whole.influence_scores.argmin(1))
    by_step = unrolled.step_influence(TEST, k=1, rank_by=1)
    assert torch.equal(by_step.indices[:, 0], whole.trajectories[..., 1].argmax(1))
    together = unrolled.influence(TEST, aggregate=True)
    assert torch.allclose(together, whole.influence_scores.sum(0, keepdim=True))


def test_a_step_matrix_sums_to_the_trajectory_where_the_loop_is_all_that_is_trained() -> None:
    model = CONCAT.model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("core."))
    start = copy.deepcopy(model.state_dict())
    trained(model, torch.optim.SGD(model.parameters(), momentum=0.9))
    run = TrainingRun(SGD(momentum=0.9), RATES, BATCHES, micro_batch_size=2)
    unrolled = UnrolledInfluence(model, TRAIN, run, start, check=False)
    matrix, trajectories = unrolled.step_matrix(TEST), unrolled.step_influence(TEST).trajectories
    assert matrix.shape == (len(TEST), N, 2, 2)
    assert torch.allclose(matrix.sum(2), trajectories, rtol=1e-9)
    assert torch.equal(unrolled.step_matrix(TEST, [3, 1]), matrix[:, [3, 1]])


def test_a_step_matrix_of_one_update_is_a_product_of_step_gradients() -> None:
    start = CONCAT.model()
    model, rate = copy.deepcopy(start), 0.01
    train = CONCAT.gradients(start, TRAIN[1], None)
    with torch.no_grad():
        for parameter, piece in zip(
            model.parameters(), train.sum(0).split([p.numel() for p in model.parameters()]), strict=True
        ):
            parameter.sub_(rate * piece.view_as(parameter))
    run = TrainingRun(SGD(), [rate], [[1]])
    unrolled = UnrolledInfluence(model, TRAIN, run, start.state_dict(), layers=None, check=False)
    test = CONCAT.gradients(model, TEST[0], None)
    expected = rate * train[2:] @ test[2:].T
    assert torch.allclose(unrolled.step_matrix(TEST[:1], [1])[0, 0], expected, rtol=1e-9)


def test_predicted_losses_add_the_influence_of_what_is_left_out() -> None:
    model, unrolled = ran()
    _, loop_alone = ran(layers="loop")
    kept = torch.tensor([[True] * N, [True, False, True, False]])
    raw = Collator()(TEST)
    labels = raw.pop("labels")
    losses = default_loss(model)(model(**raw), labels).detach()
    left_out = unrolled.influence(TEST)[:, [1, 3]].sum(1)
    expected = torch.stack([losses, losses + left_out])
    assert torch.allclose(unrolled.predicted_losses(TEST, kept), expected, rtol=1e-9)
    assert torch.allclose(loop_alone.predicted_losses(TEST, kept), expected, rtol=1e-9)


# --- models of transformers ---


@pytest.mark.parametrize(
    ("name", "step", "tolerance"),
    [("gpt2", 1e-5, 1e-6), ("qwen3", 0.02, 1e-3), ("gemma", 0.02, 1e-3)],  # the latter two have norms in float32
)
def test_looped_models_of_transformers_are_taken_back(name: str, step: float, tolerance: float) -> None:
    looped = next(model for model in zoo.ZOO if model.name == name)
    start, train, test = looped.model(), looped.rows(4), looped.rows(1, seed=2)
    start.config.use_cache = False  # a looped block would append to the cache of its previous iteration
    run = TrainingRun(SGD(momentum=0.9), RATES, BATCHES)

    def end(weights: Tensor | None = None) -> nn.Module:
        model = copy.deepcopy(start)
        trained(model, torch.optim.SGD(model.parameters(), momentum=0.9), train, weights)
        return model

    change = step * torch.tensor([0, 0, 1, 0], dtype=torch.float64)
    model, above, below = end(), end(1 + change), end(1 - change)
    raw = Collator()(test)
    labels = raw.pop("labels")
    gradients = torch.autograd.grad(default_loss(model)(model(**raw), labels).sum(), list(model.parameters()))
    moved = zip(gradients, above.parameters(), below.parameters(), strict=True)
    expected = sum(float((gradient * (a - b).detach()).sum()) for gradient, a, b in moved) / (2 * step)
    unrolled = UnrolledInfluence(model, train, run, start.state_dict(), layers=None, loop=looped.loop, check=False)
    found = float(unrolled.influence(test)[0, 2])
    assert abs(found + expected) < tolerance * abs(expected)


# --- the gauge ---


def test_a_gentle_run_is_trusted_and_a_wild_one_is_not() -> None:
    model = TIED.model()
    start = copy.deepcopy(model.state_dict())
    trained(model, torch.optim.SGD(model.parameters()))
    gentle = UnrolledInfluence(model, TRAIN, TrainingRun(SGD(), RATES, BATCHES), start)
    gentle.influence(TEST)  # no warning
    gauge = gentle.check()
    assert gauge.metasmoothness > 0.98
    assert gauge.replay_error < 1e-9
    assert "can be believed" in str(gauge)
    wild = Gauge(replay_error=0.0, metasmoothness=0.3, growth=414.0, noise_share=0.2)
    assert "compare with float64" in wild.verdict
    with pytest.warns(UserWarning, match="metasmoothness is 0.30. .*lower peak learning rate, warm-up, a cosine"):
        warn_unless_trusted(wild)


def test_metasmoothness_is_the_formula_of_two_more_trainings() -> None:
    _, unrolled = ran()
    found = unrolled.check().metasmoothness
    change = 0.05 * torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = []
    for multiple in range(3):
        model = TIED.model()
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), eps=1e-6)
        trained(model, optimizer, weights=1 + multiple * change)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    whole = (ends[2] - ends[0]).abs()
    signs = (ends[1] - ends[0]).sign() * (ends[2] - ends[1]).sign()
    assert abs(found - float((whole / whole.sum() * signs).sum())) < 1e-6


def test_the_share_of_noise_counts_small_moments_but_none_of_zero() -> None:
    second_moment = torch.tensor([1.0, 1.0, 1e-20, 0.0])
    state = torch.zeros(4), torch.zeros(4), second_moment
    assert noise_share(state, TrainingRun(AdamW(), [0.1], [[0]])) == 0.25
    assert noise_share(state[:2], TrainingRun(SGD(), [0.1], [[0]])) == 0


def test_an_estimate_counts_updates_and_seeds_and_says_when_retraining_is_cheaper() -> None:
    _, unrolled = ran()
    cost = unrolled.estimate(n_seeds=8)
    expected = len(BATCHES) * (2 * cost.update_seconds + 8 * cost.seed_seconds)
    assert cost.seconds == pytest.approx(expected)
    assert cost.memory_bytes > 8 * 3 * sum(parameter.nbytes for parameter in TIED.model().parameters())
    cheap = UnrolledEstimate(
        n_seeds=8, n_updates=3, n_examples=4, update_seconds=1.0, seed_seconds=1.0, memory_bytes=1000
    )
    assert "Training again without each of 4 examples is cheaper: 12 s." in str(cheap)
    assert "cheaper" not in str(dataclasses.replace(cheap, n_examples=100))
    with pytest.raises(ValueError, match="n_seeds must be an int of at least 1, got 0"):
        unrolled.estimate(0)


@pytest.mark.parametrize("loop", [None, "core"])
def test_the_loop_is_looked_for_as_tests_are_run(loop: str | None) -> None:
    """A model trained without a loop may loop in its tests: no warning, and the tests' steps."""
    deeper: dict[str, Any] = {"loop": loop, "forward_kwargs": {"n_loops": 1}, "test_forward_kwargs": {"n_loops": 3}}
    _, asked_first = shallowly_trained(**deeper)
    _, checked_first = shallowly_trained(**deeper)
    checked_first.check()
    found = checked_first.step_influence(TEST)
    assert found.n_steps.tolist() == [3, 3]
    assert found.trajectories.abs().amin(dim=(0, 1)).gt(0).all()
    assert torch.equal(asked_first.step_influence(TEST).trajectories, found.trajectories)


@pytest.mark.parametrize("loop", [None, "core"])
@pytest.mark.parametrize("depths", [{"forward_kwargs": {"n_loops": 1}}, {"test_forward_kwargs": {"n_loops": 1}}])
def test_tests_that_do_not_loop_are_warned_of(loop: str | None, depths: dict[str, Any]) -> None:
    _, unrolled = shallowly_trained(loop=loop, **depths)
    with pytest.warns(UserWarning, match="Nothing repeats"):
        unrolled.step_influence(TEST)


# --- what is refused ---


def test_a_replay_that_ends_elsewhere_is_refused() -> None:
    model, _ = ran()
    start = TIED.model().state_dict()
    for changes in (
        {"rates": [0.002, 0.003, 0.002]},
        {"batches": [[2, 0, 3], [1, 2], [3, 1, 2]]},
        {"reduction": "sum"},
    ):
        settings = {"rates": RATES, "batches": BATCHES, **changes}
        run = TrainingRun(AdamW(betas=(0.9, 0.99), eps=1e-6), **settings)
        with pytest.raises(ValueError, match=r"misses them by 0\.\d+ of the way .*one update early or late"):
            UnrolledInfluence(model, TRAIN, run, start).influence(TEST)


def test_bad_arguments_are_refused_before_any_work() -> None:
    model = TIED.model()
    run, start = TrainingRun(SGD(), RATES, BATCHES), model.state_dict()
    with pytest.raises(ValueError, match="all float32, or all float64"):
        UnrolledInfluence(TIED.model(torch.bfloat16), TRAIN, run, start)
    with pytest.raises(ValueError, match="names example 3, but train_dataset has 2"):
        UnrolledInfluence(model, TRAIN[:2], run, start)
    with pytest.raises(ValueError, match=r"start= lacks these trainable parameters.*'wte.weight'"):
        UnrolledInfluence(model, TRAIN, run, {})
    with pytest.raises(ValueError, match=r"as torch\.float32, the model as torch.float64"):
        UnrolledInfluence(model, TRAIN, run, TIED.model(torch.float32).state_dict())
    with pytest.raises(ValueError, match="keep must be 'all', 'sqrt' or a number"):
        UnrolledInfluence(model, TRAIN, run, start, keep=0)
    with pytest.raises(TypeError, match="run= must be a TrainingRun, got dict"):
        UnrolledInfluence(model, TRAIN, {}, start)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="holds no training run"):
        UnrolledInfluence(model, TRAIN, run, "nowhere")
    with pytest.raises(ValueError, match="no_decay='biass' is in no trainable parameter's name"):
        UnrolledInfluence(model, TRAIN, TrainingRun(AdamW(no_decay=("biass",)), RATES, BATCHES), start)
    unrolled = UnrolledInfluence(model, TRAIN, run, start)
    with pytest.raises(ValueError, match=r"kept must be booleans of shape \(m, 4\)"):
        unrolled.predicted_losses(TEST, torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"indices= names training examples \[9\]"):
        unrolled.step_matrix(TEST, [9])
    with pytest.raises(AssertionError, match="`inputs` argument is required"):
        unrolled.influence()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": torch.optim.AdamW}, "optimizer= must be captum_sdi.unrolled.AdamW"),
        ({"rates": [0.1]}, "got 1 learning rates and 3 batches"),
        ({"rates": [0.1, -1, 0.1]}, r"rates\[1\] must be a number of at least 0"),
        ({"batches": [[0], [], [1]]}, r"batches\[1\] must be positions"),
        ({"batches": [[0], [0.5], [1]]}, r"batches= must hold integers, .* got 0.5"),
        ({"batches": [[0], "01", [1]]}, r"batches= must hold integers, .* got '0'"),
        ({"batches": [[0], torch.tensor([True, False]), [1]]}, r"batches= must hold integers, .* got tensor\(True\)"),
        ({"rates": [0.1, "1_0", 0.1]}, "rates= must be numbers, got '1_0'"),
        ({"max_grad_norm": 0}, "max_grad_norm must be a number above 0"),
        ({"reduction": "avg"}, "reduction must be one of"),
        ({"micro_batch_size": 0}, "micro_batch_size must be an int of at least 1"),
        ({"reduced_over": "epoch"}, "reduced_over must be one of"),
        ({"random_states": [torch.get_rng_state()]}, "for each of 3 micro-batches, got 1"),
    ],
)
def test_an_impossible_run_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        TrainingRun(**{"optimizer": SGD(), "rates": RATES, "batches": BATCHES, **settings})


def test_impossible_optimizers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"betas=\.\.\.\) must be two numbers"):
        AdamW(betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"weight_decay=\.\.\.\) must be a number of at least 0"):
        AdamW(weight_decay=-1)
    with pytest.raises(ValueError, match=r"nesterov=True\) needs a momentum"):
        SGD(nesterov=True)
    with pytest.raises(ValueError, match="no_decay= must be a tuple of names"):
        AdamW(no_decay="bias")  # type: ignore[arg-type]
