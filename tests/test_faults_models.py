"""A model that changes between calls, and calls from several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import CASES, rows
from torch import nn

from captum_sdi import Exact, SDIInfluence

TRAIN, TEST = rows(7, seed=1), rows(3, seed=2)
CASE = CASES[0]


def asked(model: nn.Module, **settings: object) -> SDIInfluence:
    return SDIInfluence(model, TRAIN, batch_size=3, sketch=Exact(), **settings)


def test_e4_parameters_that_are_frozen_between_calls_no_longer_count() -> None:
    model = CASE.model()
    sdi = asked(model)
    whole = sdi.influence(TEST)
    model.core.blocks[0].requires_grad_(False)
    half = sdi.influence(TEST)
    assert torch.equal(half, asked(model).influence(TEST))
    assert (half - whole).abs().max() > 0.05 * whole.abs().max()
    model.core.blocks[0].requires_grad_(True)
    assert torch.equal(sdi.influence(TEST), whole)
    model.core.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter in the loop"):
        sdi.influence(TEST)


def test_e4_a_block_that_is_appended_or_removed_between_calls_is_seen() -> None:
    model = CASE.model()
    sdi = asked(model)
    before = sdi.influence(TEST)
    extra = CASE.model().core.blocks[0]
    model.core.blocks.append(extra)
    longer = sdi.influence(TEST)
    assert torch.equal(longer, asked(model).influence(TEST))
    assert not torch.allclose(longer, before)
    del model.core.blocks[2]
    assert torch.equal(sdi.influence(TEST), before)


def test_e5_two_threads_ask_one_model_one_after_the_other() -> None:
    model = CASE.model().train()
    sdi = asked(model)
    expected = sdi.step_influence(TEST)
    state = torch.get_rng_state()
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: asked(model).step_influence(TEST), range(8)))
    for result in results:
        assert torch.equal(result.trajectories, expected.trajectories)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
