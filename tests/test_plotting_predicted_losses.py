"""`plot_predicted_losses`: what is drawn, and what is said where the gauge says no."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from captum_sdi.plotting import plot_predicted_losses
from captum_sdi.unrolled import Gauge

PREDICTED = torch.tensor([[[0.5, 2.0], [0.75, 3.0], [1.0, 4.0]], [[0.1, 1.0], [0.2, 1.5], [0.3, 2.0]]])
MEASURED = PREDICTED.flip(1) + 0.125


@pytest.fixture
def ax() -> Axes:
    return Figure().subplots()


def test_points_are_runs_and_tests_at_each_point_of_training(ax: Axes) -> None:
    plot_predicted_losses(PREDICTED, MEASURED, times=("half", "end"), ax=ax)
    for place, line in enumerate(ax.get_lines()[:2]):
        pairs = torch.stack([PREDICTED[place].flatten(), MEASURED[place].flatten()], 1)
        np.testing.assert_allclose(line.get_xydata(), pairs)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["half", "end"]


def test_the_title_is_the_runs_correlation_at_the_end_and_the_gauges_no(ax: Axes) -> None:
    plot_predicted_losses(PREDICTED[1], MEASURED[1], ax=ax)
    assert ax.get_title(loc="left") == "correlation -1.00"  # runs in reverse, whatever the tests' own losses are
    distrusted = Gauge(replay_error=0.0, metasmoothness=0.29, growth=414.0, noise_share=0.0)
    plot_predicted_losses(PREDICTED[1], PREDICTED[1], gauge=distrusted, ax=ax)
    assert ax.get_title(loc="left") == "correlation 1.00"
    assert [text.get_text() for text in ax.texts] == ["not to be believed:\nmetasmoothness 0.29"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"predicted": PREDICTED[0, :2], "measured": MEASURED[0]}, r"must both be \(m, q\), or \(c, m, q\)"),
        ({"predicted": PREDICTED, "measured": MEASURED}, "times names 0 points of training, and there are 2"),
        ({"predicted": PREDICTED[0], "measured": MEASURED[0] * float("nan")}, "measured"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: dict[str, torch.Tensor], sentence: str, ax: Axes) -> None:
    with pytest.raises(ValueError, match=sentence):
        plot_predicted_losses(**arguments, ax=ax)
