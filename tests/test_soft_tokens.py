"""`feedback="tokens"`: the loop hands on its answer, through head, softmax and embedding; what is exact of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import N_LOOPS, Case, looped_gpt, rows
from reference import Untying, next_token_loss, truth, with_block_swapped
from torch import nn
from transformers import AutoModelForCausalLM

from captum_sdi import Exact, LoopSpec, SDIInfluence, find_loop
from captum_sdi.evaluate import block_swap
from captum_sdi.models import LoopedGPTConfig

WHOLE = Untying(
    loop=("wte", "wpe", "prelude.0", "core", "coda.0", "ln_f", "lm_head"),
    anchors=("wte",),
    n_steps=N_LOOPS,
)
SMALL: dict[str, Any] = {"feedback": "tokens", "n_core": 1, "initializer_range": 0.2}
REWRITING = Case("in place", looped_gpt(**SMALL, is_causal=False, bias=True), WHOLE, causal=False)
TIED = Case("tied", looped_gpt(**SMALL, injection="none", tie_word_embeddings=True), WHOLE)
TRAIN, TEST = rows(3, seed=1, longest=6), rows(2, seed=2, longest=5)


@pytest.fixture(scope="module", params=[REWRITING, TIED], ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def scores(model: nn.Module, **settings: Any) -> SDIInfluence:
    """Trained on single steps, asked for several, as one who trained on facts asks for chains."""
    depths = {"forward_kwargs": {"n_loops": 1}, "test_forward_kwargs": {"n_loops": N_LOOPS}}
    loop = find_loop(model, TRAIN)
    return SDIInfluence(model, TRAIN, loop=loop, batch_size=2, sketch=Exact(), **depths, **settings)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_every_use_of_head_and_embedding_belongs_to_its_step(case: Case, recompute: bool) -> None:
    model = case.model()
    train = [case.gradients(model, row, None, n_loops=1) for row in TRAIN]
    test = [case.gradients(model, row, None) for row in TEST]
    expected = truth([(1.0, train, test)])
    assert expected.trajectories.abs().amin((0, 1)).min() > 0  # every step has a share
    steps = scores(model, layers=None, activation_checkpointing=recompute).step_influence(TEST)
    largest = expected.trajectories.abs().max()
    assert (steps.trajectories - expected.trajectories).abs().max() <= 1e-10 * largest
    assert (steps.influence_scores - expected.totals).abs().max() <= 1e-10 * largest
    assert not steps.prelude.any()
    assert not steps.coda.any()


def test_the_loop_is_all_of_the_model(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name at any depth, and by watching at several."""
    model = case.model()
    containers = tuple(name.removesuffix(".0") for name in WHOLE.loop)
    known = LoopSpec(containers, WHOLE.anchors)
    found = find_loop(model, TRAIN)
    assert found == known
    assert found.n_steps == N_LOOPS
    with pytest.warns(UserWarning, match="runs once"):
        assert find_loop(model, TRAIN, forward_kwargs={"n_loops": 1}) == known
    assert set(scores(model).step_influence(TEST).trajectories.shape) == {2, 3, N_LOOPS}
    monkeypatch.setattr("captum_sdi.loop.presets.PRESETS", {})
    assert find_loop(model, TRAIN) == LoopSpec(WHOLE.loop, WHOLE.anchors)


def test_positions_of_soft_tokens_sum_to_the_example() -> None:
    model = TIED.model()
    train = torch.tensor([[0, 1, 2]] * len(TEST))
    influence = scores(model, layers=["wte"])
    split = influence.influence_map(TEST, train, axes=("token", "step"))
    assert split.values.shape[:3] == (2, 3, len(TEST[0]["input_ids"]))
    torch.testing.assert_close(split.sum().values, influence.influence(TEST))


def test_one_step_has_another_models_weights() -> None:
    model, other = REWRITING.model(), REWRITING.make().double()
    row = TEST[0]
    expected = []
    for step in range(N_LOOPS):
        swapped = with_block_swapped(model, other, WHOLE, step)
        logits = swapped(input_ids=row["input_ids"].unsqueeze(0)).logits[0]
        expected.append(next_token_loss(logits, row["labels"], causal=False).detach())
    torch.testing.assert_close(block_swap(model, other, [row])[0], torch.stack(expected))


@pytest.mark.parametrize("injection", ["add", "none"])
def test_a_step_reads_the_answers_of_the_last_one(injection: str) -> None:
    model = Case("", looped_gpt(**SMALL, injection=injection), WHOLE).model()
    ids = torch.arange(6).unsqueeze(0)
    inputs = state = model.prelude[0](model.wte.weight[ids] + model.wpe.weight[:6], None)
    for step in range(N_LOOPS):
        if step > 0:
            said = torch.softmax(model.ln_f(model.coda[0](state, None)) @ model.lm_head.weight.T, dim=-1)
            state = model.prelude[0](said @ model.wte.weight + model.wpe.weight[:6], None)
        mixed = state + inputs if injection == "add" else state
        state = model.core.blocks[0](mixed, None)
    expected = model.ln_f(model.coda[0](state, None)) @ model.lm_head.weight.T
    torch.testing.assert_close(model(ids).logits, expected)


def test_padding_changes_no_real_position() -> None:
    model = REWRITING.model()
    short, ids = TEST[1]["input_ids"], torch.full((1, 7), 5)
    ids[0, : len(short)] = short
    padded = model(ids, attention_mask=(torch.arange(7) < len(short)).long().unsqueeze(0)).logits
    torch.testing.assert_close(padded[0, : len(short)], model(short.unsqueeze(0)).logits[0])


def test_it_is_saved_recomputed_and_generates(tmp_path: Path) -> None:
    model, ids = TIED.model(torch.float32), torch.arange(4).unsqueeze(0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.feedback == "tokens"
    assert loaded.lm_head.weight is loaded.wte.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    following = model(ids, n_loops=2).logits[0, -1].argmax()
    assert model.generate(ids, max_new_tokens=1, do_sample=False, n_loops=2)[0, -1] == following

    expected = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = loaded.train()(ids, labels=ids).loss
    for recomputed, kept in zip(torch.autograd.grad(loss, list(loaded.parameters())), expected, strict=True):
        torch.testing.assert_close(recomputed, kept)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"feedback": "words"}, r"feedback='words' is unknown; use one of \('state', 'tokens'\)"),
        ({"injection": "none", "state_init": "zeros"}, r"state_init='zeros': the model would never read its tokens"),
    ],
)
def test_impossible_configs_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LoopedGPTConfig(**settings)
