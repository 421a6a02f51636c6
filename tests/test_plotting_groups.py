"""What the picture of groups of pairs says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from captum_sdi import plotting
from captum_sdi.scores.result import StepInfluence


def drawn(result, groups):
    ax = plotting.plot_groups(result, groups, ax=Figure().subplots())
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    return ax, [np.asarray(line.get_ydata(), dtype=float) for line in ax.get_lines()[: len(groups) + 1]], words


def test_lines_are_means_over_test_examples_and_bands_their_spread():
    trajectories = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(0))
    member = torch.zeros(5, 7).bool()
    member[0, :3] = member[1, 5:] = member[4, 0] = True
    ax, (everyone, group), words = drawn(trajectories, {"mine": member})
    rows = []
    for q in (0, 1, 4):
        row = trajectories[q].double().numpy()
        rows.append(row[member[q].numpy()].mean(0) / np.abs(row).mean())
    np.testing.assert_allclose(group, np.mean(rows, 0), atol=1e-12)
    sizes = trajectories.double().abs().mean((1, 2), keepdim=True)
    np.testing.assert_allclose(everyone, (trajectories.double() / sizes).mean((0, 1)), atol=1e-12)
    assert words == ["all pairs (35)", "mine (6)"]
    band = next(c for c in ax.collections[1:] if isinstance(c, PolyCollection)).get_paths()[0].vertices[:, 1]
    reach = 2 * np.std(rows, 0, ddof=1) / np.sqrt(3)
    assert band.max() == pytest.approx((np.mean(rows, 0) + reach).max())
    assert band.min() == pytest.approx((np.mean(rows, 0) - reach).min())


def test_the_scale_of_a_test_example_does_not_count():
    trajectories = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1))
    member = torch.arange(18).reshape(3, 6) % 3 == 0
    scaled = trajectories * torch.tensor([1e-6, 1.0, 1e3])[:, None, None]
    for one, other in zip(drawn(trajectories, {"x": member})[1], drawn(scaled, {"x": member})[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_steps_that_a_test_example_did_not_run_are_left_out():
    trajectories = torch.tensor([[[1.0, 1.0]], [[2.0, 0.0]]])
    zero = torch.zeros(2, 1)
    result = StepInfluence(
        indices=None, influence_scores=trajectories.sum(-1), trajectories=trajectories, prelude=zero, coda=zero,
        n_steps=torch.tensor([2, 1]), score_errors=zero, trajectory_errors=torch.zeros(2, 1, 2),
    )  # fmt: skip
    assert drawn(result, {"x": torch.ones(2, 1)})[1][1].tolist() == [1.0, 1.0]


def test_one_test_example_has_no_band_and_no_influence_is_zero():
    ax, lines, _ = drawn(np.zeros((1, 3, 2)), {"x": [[1, 0, 0]]})
    assert lines[1].tolist() == [0.0, 0.0]
    assert not [c for c in ax.collections if isinstance(c, PolyCollection)]


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ({}, "groups is an empty mapping"),
        ({"x": [[True]]}, r"groups\['x'\] must be booleans \(q, n\) = \(2, 3\), got shape \(1, 1\)"),
        ({"x": np.full((2, 3), 0.5)}, r"groups\['x'\] must be booleans"),
        ({"x": np.zeros((2, 3))}, r"groups\['x'\] marks no pair"),
    ],
)
def test_what_cannot_be_drawn(groups, says):
    with pytest.raises(ValueError, match=says):
        plotting.plot_groups(torch.ones(2, 3, 4), groups)
