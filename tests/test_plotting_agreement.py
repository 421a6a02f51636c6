"""Scores against measured effects: the points are the pairs, the title is their correlation."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
import torch

from captum_sdi import plotting


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_points_are_the_pairs(seed):
    scores, measured = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(seed))
    (points, *_) = plotting.plot_agreement(scores, measured).get_lines()
    np.testing.assert_allclose(points.get_xydata(), torch.stack([scores, measured], -1).reshape(-1, 2))


def test_the_title_is_the_mean_rank_correlation_of_test_examples(seed):
    scores = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed))
    measured = scores + torch.randn(5, 9, generator=torch.Generator().manual_seed(seed + 1))
    each = [scipy.stats.spearmanr(one, other).statistic for one, other in zip(scores, measured, strict=True)]
    title = plotting.plot_agreement(scores, measured).get_title(loc="left")
    words, value, low, high = title.replace("[", "").replace("]", "").replace(",", "").split()
    assert words == "Spearman"
    assert float(value) == pytest.approx(np.mean(each), abs=0.005)
    assert float(low) <= float(value) <= float(high)


def test_no_correlation_is_claimed_where_none_is_defined():
    assert plotting.plot_agreement([[1.0, 1.0]], [[1.0, 2.0]]).get_title(loc="left") == ""
    assert plotting.plot_agreement([[1.0, 1.0]], [[1.0, 2.0]], title="mine").get_title(loc="left") == "mine"


@pytest.mark.parametrize(
    ("scores", "measured"), [((2, 3), (2, 4)), ((2, 3, 4), (2, 3, 4)), ((3,), (3,)), ((0, 3), (0, 3))]
)
def test_other_shapes_are_refused(scores, measured):
    with pytest.raises(ValueError, match=r"scores and measured must both be \(q, n\)"):
        plotting.plot_agreement(torch.zeros(scores), torch.zeros(measured))


def test_nan_is_refused():
    with pytest.raises(ValueError, match="measured"):
        plotting.plot_agreement([[1.0, 2.0]], [[float("nan"), 2.0]])
