"""What several results say of one pair: points, error bars, legend, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from test_plotting import LONG, assert_nothing_is_cut_off, assert_steps_are_numbered_from_one, make_result

from captum_sdi import plotting


@pytest.fixture(autouse=True)
def _no_test_leaves_a_figure() -> Iterator[None]:
    plt.switch_backend("agg")
    yield
    plt.close("all")


def bars_of(ax: Axes) -> list[np.ndarray]:
    """Ends of all vertical and horizontal bars, (bars, 2 ends, x and y) for each result drawn."""
    return [np.array(bars.get_segments()) for bars in ax.collections if isinstance(bars, LineCollection)]


@pytest.mark.parametrize("t", [1, 6, 64])
def test_nothing_is_cut_off(t: int) -> None:
    results = {"exact": make_result(t=t, errors=False), "dim 128": make_result(t=t), LONG: make_result(t=t)}
    ax = plotting.plot_comparison(results, 1, train=3, title=LONG)
    assert ax.figure.get_figwidth() == pytest.approx(3.4)
    assert_nothing_is_cut_off(ax.figure)
    assert_steps_are_numbered_from_one(ax.figure, t)


def test_every_result_shows_this_pair_with_two_standard_errors() -> None:
    other = make_result(scale=2.0)
    ax = plotting.plot_comparison({"a": make_result(), "b": other}, 2, train=5)
    first, second = bars_of(ax)
    middle, error = other.trajectories[2, 5].numpy(), other.trajectory_errors[2, 5].numpy()
    np.testing.assert_allclose(second[:, 0, 1], middle - 2 * error, rtol=1e-6)
    np.testing.assert_allclose(second[:, 1, 1], middle + 2 * error, rtol=1e-6)
    np.testing.assert_allclose(np.round(second[:, 0, 0]), np.arange(1, 9))
    assert (first[:, 0, 0] < second[:, 0, 0]).all()  # side by side, not on top of each other


def test_a_result_without_errors_is_a_bar_across_its_step() -> None:
    exact = make_result(errors=False)
    ax = plotting.plot_comparison({"sketched": make_result(), "exact": exact}, train=0)
    _, across = bars_of(ax)
    np.testing.assert_allclose(across[:, :, 1], exact.trajectories[0, 0, :, None].expand(-1, 2).numpy(), rtol=1e-6)
    np.testing.assert_allclose(across.mean(1)[:, 0], np.arange(1, 9))


def test_the_training_example_is_found_among_the_strongest() -> None:
    top = make_result(k=4)
    index = int(top.indices[0, 2])
    ax = plotting.plot_comparison({"top": top}, train=index)
    total = f"{top.influence_scores[0, 2]:+.3f}".replace("-", "−")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["total", f"{total}  top"]
    assert ax.get_title(loc="left") == f"train example {index} on test example 0"


def test_steps_that_were_not_run_are_not_drawn() -> None:
    results = {"exact": make_result(errors=False, depths=[3, 8, 8]), "sketched": make_result(depths=[3, 8, 8])}
    ax = plotting.plot_comparison(results, train=0)
    assert [len(bars) for bars in bars_of(ax)] == [3, 3]


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"results is empty. Pass at least one result under its name"):
        plotting.plot_comparison({}, train=0)
    with pytest.raises(ValueError, match=r"same number of loop steps for this test example, got {'a': 8, 'b': 2}"):
        plotting.plot_comparison({"a": make_result(), "b": torch.zeros(3, 12, 2)}, train=0)
    with pytest.raises(ValueError, match=r"train=\[99\] names examples that the result does not hold"):
        plotting.plot_comparison({"a": make_result()}, train=99)
