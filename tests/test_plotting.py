"""What the pictures say: artists, words and scales; and that no word is cut off."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from captum.influence._utils.common import KMostInfluentialResults
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from captum_sdi import plotting
from captum_sdi.plotting._lines import OPPONENT, PROPONENT, draw_line
from captum_sdi.plotting._text import clip
from captum_sdi.scores.result import StepInfluence

LONG = "The cost of $5 and $7 was said to be too high for a pair of loops that never end, " * 3
TEXTS = ["1 0 1 1 0", LONG, "café and\na new\tline", "$x$ \\alpha_1 $", "", "W" * 200, "tab\x00\x1b\ud800", "short"]
CHINESE = "中文文本 " * 30  # the default font has no such characters
NEW = {"backend"}  # pyplot resolves the backend when first used


def make_result(
    q: int = 3, n: int = 12, t: int = 8, k: int | None = None, *, ends: bool = False, errors: bool = True,
    scale: float = 1.0, depths: list[int] | None = None,
) -> StepInfluence:  # fmt: skip
    """Random trajectories that keep the promises of `StepInfluence`, also about ends and depths."""
    draw = torch.Generator().manual_seed(0)
    n_steps = torch.tensor(depths or [t] * q)
    ran = torch.arange(t) < n_steps[:, None, None]
    trajectories = scale * torch.randn(q, n, t, generator=draw) * ran
    prelude, coda = (scale * ends * torch.randn(q, n, generator=draw) for _ in range(2))
    step_errors = scale * errors * (0.1 + torch.rand(q, n, t, generator=draw)) * ran
    fields = {
        "influence_scores": trajectories.sum(-1) + prelude + coda,
        "trajectories": trajectories,
        "prelude": prelude,
        "coda": coda,
        "score_errors": step_errors.sum(-1),
        "trajectory_errors": step_errors,
    }
    indices = None
    if k is not None:
        indices = fields["influence_scores"].topk(k).indices
        fields = {name: torch.stack([row[i] for row, i in zip(value, indices, strict=True)])
                  for name, value in fields.items()}  # fmt: skip
    return StepInfluence(indices=indices, n_steps=n_steps, **fields)


def make_self_influence(n: int = 12, t: int = 8, scale: float = 1.0) -> StepInfluence:
    draw = torch.Generator().manual_seed(1)
    trajectories = scale * torch.rand(n, t, generator=draw)
    n_steps = torch.full((n,), t)
    n_steps[0] = 1
    trajectories[0, 1:] = 0
    zero = torch.zeros(n)
    return StepInfluence(
        indices=None, influence_scores=trajectories.sum(-1), trajectories=trajectories, prelude=zero, coda=zero,
        n_steps=n_steps, score_errors=zero, trajectory_errors=0.01 * trajectories,
    )  # fmt: skip


def texts_for(n: int) -> list[str]:
    return [TEXTS[i % len(TEXTS)] for i in range(n)]


def make_matrix(t: int = 8, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(2, 3, t, t, generator=torch.Generator().manual_seed(2))


def groups_of(result: StepInfluence) -> dict[str, list[int]]:
    return {"easy $1": [0], LONG: list(range(1, len(result.trajectories)))}


# Every picture in the sizes and scales it has to survive.
KINDS: dict[str, Callable[[int, float, Axes | None], Axes]] = {
    "trajectories": lambda t, c, ax: plotting.plot_trajectories(make_result(t=t, scale=c), 1, ax=ax),
    "trajectories-texts": lambda t, c, ax: plotting.plot_trajectories(
        make_result(t=t, scale=c, ends=True), k=2, texts=texts_for(12), title=LONG, ax=ax
    ),
    "trajectories-panels": lambda t, c, ax: plotting.plot_trajectories(
        make_result(t=t, scale=c, ends=True), k=3, texts=texts_for(12), title=LONG, ax=ax
    ),
    "heatmap": lambda t, c, ax: plotting.plot_heatmap(
        make_result(t=t, scale=c), texts=texts_for(12), title=LONG, ax=ax
    ),
    "heatmap-many": lambda t, c, ax: plotting.plot_heatmap(
        make_result(n=300, t=t, scale=c), sort="step", texts=texts_for(300), ax=ax
    ),
    "step-matrix": lambda t, c, ax: plotting.plot_step_matrix(make_matrix(t, c), title=LONG, ax=ax),
    "self-influence": lambda t, c, ax: plotting.plot_self_influence(
        make_self_influence(t=t, scale=c), k=8, texts=texts_for(12), ax=ax
    ),
    "totals": lambda t, c, ax: plotting.plot_totals(make_result(t=t, scale=c, ends=True), k=1, ax=ax),
    "totals-texts": lambda t, c, ax: plotting.plot_totals(
        make_result(t=t, scale=c), texts=texts_for(12), test_texts=texts_for(3), title=LONG, ax=ax
    ),
    "step-share": lambda t, c, ax: plotting.plot_step_share(make_result(t=t, scale=c), ax=ax),
    "step-share-groups": lambda t, c, ax: plotting.plot_step_share(
        make_result(q=9, t=t, scale=c, ends=True), groups_of(make_result(q=9)), ax=ax
    ),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _no_picture_changes_a_setting() -> Iterator[None]:
    gc.freeze()  # collections need not search all of torch and transformers, which takes 0.3 s each time
    plt.switch_backend("agg")
    before = {name: value for name, value in mpl.rcParams.items() if name not in NEW}
    yield
    assert {name: value for name, value in mpl.rcParams.items() if name not in NEW} == before


@pytest.fixture(autouse=True)
def _no_test_leaves_a_figure() -> Iterator[None]:
    plt.close("all")  # those of examples in docstrings
    yield
    plt.close("all")


def drawn_words(figure: Figure) -> list[Text]:
    """Lays out, and returns the texts that were drawn: matplotlib also keeps tick labels that are out of view."""
    drawn: list[Text] = []
    plain = Text.draw

    def recording(text: Text, renderer: object) -> None:
        drawn.append(text)
        plain(text, renderer)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", recording)
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
    return [text for text in drawn if text.get_visible() and text.get_text().strip()]


def assert_nothing_is_cut_off(figure: Figure) -> list[Text]:
    words = drawn_words(figure)
    for text in words:
        box = text.get_window_extent()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert inside, f"{text.get_text()!r} at {box} leaves the figure {figure.bbox}"
    return words


def overlapping(texts: list[Text]) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text().strip()]
    return [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[i + 1 :] if x.overlaps(y)]


@pytest.mark.parametrize(("t", "scale"), [(8, 1.0), (1, 1e-6), (64, 0.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_is_labelled_and_nothing_is_cut_off(kind: str, t: int, scale: float) -> None:
    ax = KINDS[kind](t, scale, None)
    figure = ax.figure
    assert isinstance(figure, Figure)
    assert plt.get_fignums() == [figure.number]  # type: ignore[attr-defined]
    assert figure.get_figwidth() == pytest.approx(3.4)
    words = assert_nothing_is_cut_off(figure)
    assert ax.get_xlabel() or kind == "trajectories-panels"  # there it stands below the lowest ones
    assert ax.get_ylabel()
    assert not overlapping(words)
    assert all(6 <= text.get_fontsize() <= 9 for text in words)
    assert_steps_are_numbered_from_one(figure, t)


def assert_steps_are_numbered_from_one(figure: Figure, t: int) -> None:
    ax = next(one for one in figure.axes if "loop step" in one.get_xlabel())
    labels = [(x, label.get_text()) for x, label in zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)]
    steps = [(x, int(text)) for x, text in labels if text not in ("prelude", "coda")]
    assert all(x == step for x, step in steps)
    assert steps[0][1] == 1
    assert steps[-1][1] == t
    assert len(steps) <= 13


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_axes_is_used_and_pyplot_left_alone(kind: str) -> None:
    mine = plt.figure()
    figure = Figure(figsize=(9, 5), layout="constrained")
    left, right = figure.subfigures(1, 2)
    above, below = right.subplots(2, 1)
    assert KINDS[kind](8, 1.0, below) is below
    assert_nothing_is_cut_off(figure)
    assert plt.get_fignums() == [mine.number]
    assert plt.gcf() is mine
    assert not mine.axes
    assert not left.axes
    assert not above.has_data()


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_layout_engine_words_are_cut_to_the_margins(kind: str) -> None:
    figure = Figure(figsize=(6.4, 4.8))
    KINDS[kind](8, 1.0, figure.subplots())
    assert_nothing_is_cut_off(figure)


@pytest.mark.parametrize("kind", ["trajectories-texts", "trajectories-panels", "totals-texts", "step-matrix"])
def test_axes_outside_a_grid(kind: str) -> None:
    figure = Figure(figsize=(6, 5))
    ax = figure.add_axes((0.3, 0.25, 0.45, 0.6))
    assert KINDS[kind](8, 1.0, ax) is ax
    assert_nothing_is_cut_off(figure)


# ------------------------------------------------------------------------------------ trajectories


def lines_of(ax: Axes) -> list:
    """Lines over steps, without the zero line."""
    return [line for line in ax.get_lines() if line.get_transform() == ax.transData]


def test_trajectories_show_the_strongest_of_both_signs_with_two_standard_errors() -> None:
    result = make_result(n=30)
    ax = plotting.plot_trajectories(result, 2)
    totals = result.influence_scores[2]
    order = totals.argsort(descending=True).tolist()
    drawn = [*order[:2], *order[:-3:-1]]
    lines = lines_of(ax)
    assert len(lines) == 4
    for line, index in zip(lines, drawn, strict=True):
        np.testing.assert_allclose(line.get_xdata(), np.arange(1, 9))
        np.testing.assert_allclose(line.get_ydata(), result.trajectories[2, index].numpy(), rtol=1e-6)
    bands = [band for band in ax.collections if isinstance(band, PolyCollection)]
    assert len(bands) == 4
    for band, index in zip(bands, drawn, strict=True):
        corners = band.get_paths()[0].vertices
        for step in range(8):
            at_step = corners[corners[:, 0] == step + 1, 1]
            middle, error = result.trajectories[2, index, step], result.trajectory_errors[2, index, step]
            np.testing.assert_allclose(
                [at_step.min(), at_step.max()], [middle - 2 * error, middle + 2 * error], rtol=1e-5
            )


def test_proponents_and_opponents_differ_without_colour() -> None:
    ax = Figure().subplots()
    lines = [draw_line(ax, np.ones(3), np.ones(3), np.ones(3), styles, rank)
             for styles in (PROPONENT, OPPONENT) for rank in range(6)]  # fmt: skip
    assert {line.get_linestyle() for line in lines[:6]} == {"-"}
    assert {line.get_linestyle() for line in lines[6:]} == {"--"}
    looks = [(line.get_marker(), to_rgba(line.get_markerfacecolor()) == to_rgba("white")) for line in lines]
    assert len(set(looks)) == 12
    assert len({(line.get_color(), *look) for line, look in zip(lines, looks, strict=True)}) == 12


def legend_of(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_the_legend_gives_totals_and_texts() -> None:
    steps = torch.tensor([[[0.5, 0.25], [-0.5, -1.0], [0.1, 0.0]]])
    texts = ["1 0 1", "costs $5 or $6", LONG]
    named = legend_of(plotting.plot_trajectories(steps, texts=texts))
    assert named[0] == "proponents: total"
    assert named[1] == "+0.750  #0: 1 0 1"
    assert re.fullmatch(r"\+0\.100  #2: The cost of \\\$5 and \\\$7.*…", named[2])
    assert named[3:] == ["opponents: total", r"−1.500  #1: costs \$5 or \$6"]  # an escaped $ is drawn as $
    bare = legend_of(plotting.plot_trajectories(steps))
    assert bare == ["proponents: total", "+0.750  #0", "+0.100  #2", "opponents: total", "−1.500  #1", " "]
    whole = make_result(ends=True)
    assert legend_of(plotting.plot_trajectories(whole))[0] == "proponents: total incl. prelude, coda"


def test_a_result_of_the_k_strongest_is_named_by_training_index() -> None:
    result = make_result(k=4)
    assert result.indices is not None
    texts = [f"text of {i}" for i in range(12)]
    named = legend_of(plotting.plot_trajectories(result, 1, k=4, texts=texts))
    assert [name.split("  ")[1] for name in named[1:]] == [f"#{i}: text of {i}" for i in result.indices[1].tolist()]
    chosen = result.indices[1, 2].item()
    assert len(lines_of(plotting.plot_trajectories(result, 1, train=[chosen]))) == 1
    rows = plotting.plot_heatmap(result, 1).get_yticklabels()
    assert [row.get_text() for row in rows] == [f"#{i}" for i in result.indices[1].tolist()]


def test_only_the_steps_that_ran_are_drawn() -> None:
    result = make_result(depths=[8, 3, 8])
    assert all(len(line.get_xdata()) == 3 for line in lines_of(plotting.plot_trajectories(result, 1)))
    assert plotting.plot_heatmap(result, 1).get_images()[0].get_array().shape == (12, 3)
    bars = plotting.plot_totals(result, k=1)
    cells = bars.figure.axes[-2].get_images()[0].get_array()
    headings = [row for row, label in enumerate(bars.get_yticklabels()) if label.get_text().startswith("test")]
    assert np.ma.getmaskarray(cells)[headings[1] + 1 : headings[2], 3:].all()
    assert np.ma.getmaskarray(cells).sum() == 5 * (headings[2] - headings[1] - 1)


def test_one_step_has_bars_in_place_of_bands() -> None:
    result = make_result(t=1)
    ax = plotting.plot_trajectories(result, k=2)
    assert len(ax.collections) == 4
    assert len({line.get_xdata()[0] for line in lines_of(ax) if len(line.get_xdata())}) >= 4  # side by side
    (segment,) = ax.collections[0].get_segments()
    best = result.influence_scores[0].argmax()
    middle, error = result.trajectories[0, best, 0].item(), result.trajectory_errors[0, best, 0].item()
    np.testing.assert_allclose(segment[:, 1], [middle - 2 * error, middle + 2 * error], rtol=1e-5)


def test_exact_scores_have_no_bands() -> None:
    assert not plotting.plot_trajectories(make_result(errors=False)).collections
    assert not plotting.plot_trajectories(make_result().trajectories).collections


# ------------------------------------------------------------------------------------ heat maps


@pytest.mark.parametrize("scale", [1.0, 1e-7, 0.0])
@pytest.mark.parametrize("kind", ["heatmap", "heatmap-many", "step-matrix", "totals"])
def test_colours_are_symmetric_about_zero(kind: str, scale: float) -> None:
    figure = KINDS[kind](8, scale, None).figure
    (image,) = (image for ax in figure.axes for image in ax.get_images())
    low, high = image.get_clim()
    assert low == -high < 0
    red, green, blue, _ = image.cmap(image.norm(0.0))
    assert min(red, green, blue) > 0.95  # zero is white, or nearly
    assert high == pytest.approx(np.abs(image.get_array()).max() if scale else 1.0)
    said = "influence" if kind == "step-matrix" else "drop in test loss"  # a plain tensor says nothing of its unit
    bars = [ax for ax in figure.axes if said in ax.get_ylabel()]
    assert len(bars) == 1


@pytest.mark.parametrize("draw", [plotting.plot_trajectories, plotting.plot_heatmap, plotting.plot_trajectory_panels])
def test_normalized_scores_are_no_drop_in_loss(draw: Callable[..., Axes]) -> None:
    plain = make_result()
    for result in (plain, replace(plain, is_normalized=True)):
        labels = [ax.get_ylabel().replace("\n", " ") for ax in draw(result).figure.axes]
        assert any("drop in test loss" in label for label in labels) != result.is_normalized
        assert any("of unit gradients" in label for label in labels) == result.is_normalized


def test_limit_fixes_the_colours_and_says_what_is_beyond() -> None:
    ax = plotting.plot_heatmap(make_result(), limit=0.5)
    assert ax.get_images()[0].get_clim() == (-0.5, 0.5)
    assert ax.get_images()[0].colorbar.extend == "both"


def test_heatmap_rows_are_sorted() -> None:
    result = make_result(n=6)
    ax = plotting.plot_heatmap(result, 1)
    order = result.influence_scores[1].argsort(descending=True)
    np.testing.assert_allclose(ax.get_images()[0].get_array(), result.trajectories[1, order], rtol=1e-6)
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"#{i}" for i in order.tolist()]
    many = plotting.plot_heatmap(make_result(n=40, t=3), sort="step").get_images()[0]
    assert many.get_extent() == [0.5, 3.5, 39.5, -0.5]  # column 1 is step 1
    by_step = np.abs(many.get_array())
    strongest = by_step.argmax(1)
    assert (np.diff(strongest) >= 0).all()
    same = np.diff(strongest) == 0
    assert (np.diff(by_step.max(1))[same] <= 0).all()


def test_many_rows_are_counted_not_named() -> None:
    labels = [label.get_text() for label in plotting.plot_heatmap(make_result(n=300)).get_yticklabels()]
    assert labels[0] == "1"
    assert all(label.isdigit() for label in labels)
    k_of_both = plotting.plot_heatmap(make_result(n=300), k=5)
    assert k_of_both.get_images()[0].get_array().shape == (10, 8)


def test_step_matrix_of_a_pair_and_of_all() -> None:
    matrix = make_matrix()
    shown = plotting.plot_step_matrix(matrix, (1, 2))
    np.testing.assert_allclose(shown.get_images()[0].get_array(), matrix[1, 2], rtol=1e-6)
    assert shown.get_title(loc="left") == "test example 1, train position 2"
    mean = plotting.plot_step_matrix(matrix)
    np.testing.assert_allclose(mean.get_images()[0].get_array(), matrix.mean((0, 1)), atol=1e-6)
    assert mean.get_title(loc="left") == "mean of 6 pairs"
    assert mean.get_ylim() == (-0.5, 7.5)  # step 1 at the bottom
    assert mean.get_yticklabels()[0].get_text() == "1"
    uneven = plotting.plot_step_matrix(matrix[0, 0, :, :3])
    assert (uneven.get_xlabel(), uneven.get_ylabel()) == (
        "loop step of the test example",
        "loop step of the train example",
    )


def test_error_bars_say_that_they_are_of_the_sketch() -> None:
    said = "2 s.e. of the sketch"
    for draw in (plotting.plot_trajectories, plotting.plot_trajectory_panels, plotting.plot_totals):
        for is_sketched in (True, False):
            result = make_result(n=4)
            if not is_sketched:
                result.trajectory_errors.zero_()
                result.score_errors.zero_()
            words = " ".join(text.get_text().replace("\n", " ") for text in drawn_words(draw(result, k=1).figure))
            assert (said in words) == is_sketched


# ------------------------------------------------------------------------------------ distributions


def test_self_influence_shows_quantiles_of_those_that_ran() -> None:
    result = make_self_influence(n=41)
    ax = plotting.plot_self_influence(result, k=2, texts=texts_for(41))
    median, first, second = lines_of(ax)
    expected = [np.median(result.trajectories[:, 0]), *np.median(result.trajectories[1:, 1:], axis=0)]
    np.testing.assert_allclose(median.get_ydata(), expected, rtol=1e-6)  # example 0 ran one step
    best = result.influence_scores.argsort(descending=True)
    np.testing.assert_allclose(first.get_ydata(), result.trajectories[best[0]], rtol=1e-6)
    np.testing.assert_allclose(second.get_ydata(), result.trajectories[best[1]], rtol=1e-6)
    assert legend_of(ax)[:5] == ["41 examples", "median", "middle 50%", "middle 90%", "strongest: total"]
    corners = ax.collections[1].get_paths()[0].vertices
    at_two = corners[corners[:, 0] == 2, 1]
    wide = np.percentile(result.trajectories[1:, 1].double(), [5, 95])
    np.testing.assert_allclose([at_two.min(), at_two.max()], wide, rtol=1e-6)
    assert "own loss" in ax.get_ylabel()


def test_totals_stand_beside_their_trajectories() -> None:
    result = make_result()
    ax = plotting.plot_totals(result, [2, 0], k=1, test_texts=["zero", "one", "two"])
    rows = [label.get_text() for label in ax.get_yticklabels()]
    best, worst = result.influence_scores.argmax(1), result.influence_scores.argmin(1)
    assert rows == ["test 2: two", f"#{best[2]}", f"#{worst[2]}", "test 0: zero", f"#{best[0]}", f"#{worst[0]}"]
    bars = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in ax.patches}
    pairs = {1: (2, best[2]), 2: (2, worst[2]), 4: (0, best[0]), 5: (0, worst[0])}
    cells = ax.figure.axes[-2].get_images()[0].get_array()
    segments = ax.containers[-1].lines[2][0].get_segments()
    assert set(bars) == set(pairs)
    for (row, (test, train)), segment in zip(pairs.items(), segments, strict=True):
        total, error = result.influence_scores[test, train].item(), result.score_errors[test, train].item()
        assert bars[row] == pytest.approx(total)
        np.testing.assert_allclose(segment[:, 0], [total - 2 * error, total + 2 * error], rtol=1e-5)
        np.testing.assert_allclose(cells[row], result.trajectories[test, train], rtol=1e-6)
    assert ax.get_ylim() == ax.figure.axes[-2].get_ylim() == (5.5, -0.5)  # the first row on top


def test_totals_of_chosen_training_examples() -> None:
    rows = [label.get_text() for label in plotting.plot_totals(make_result(q=2), train=[7, 3]).get_yticklabels()]
    assert sorted(rows) == ["#3", "#3", "#7", "#7", "test 0", "test 1"]


def test_step_share_is_a_mean_of_shares() -> None:
    steps = torch.tensor([[[3.0, -1.0]], [[0.0, 2.0]], [[0.0, 0.0]]])
    ax = plotting.plot_step_share(steps)
    (line,) = lines_of(ax)
    np.testing.assert_allclose(line.get_ydata(), [0.375, 0.625])  # the third has no influence to share
    corners = ax.collections[0].get_paths()[0].vertices
    at_one = corners[corners[:, 0] == 1, 1]
    np.testing.assert_allclose([at_one.min(), at_one.max()], [0.075, 0.675])
    assert ax.get_title(loc="left") == "2 test examples"
    assert ax.get_ylim()[0] == 0
    assert plotting.plot_step_share(torch.zeros(2, 1, 3)).get_ylim() == (0, 1)


def test_step_share_counts_prelude_and_coda_where_there_are_any() -> None:
    result = make_result(q=2, n=5, t=4, ends=True)
    ax = plotting.plot_step_share(result, {"a": [0], "b": [1]})
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3", "4", "prelude", "coda"]
    of_group = [sum(float(line.get_ydata().sum()) for line in lines_of(ax) if line.get_color() == colour)
                for colour in ("#0072B2", "#D55E00")]  # fmt: skip
    assert of_group == pytest.approx([1.0, 1.0])
    assert legend_of(ax) == ["a (1)", "b (1)"]
    whole = [label.get_text() for label in plotting.plot_step_share(make_result()).get_xticklabels()]
    assert not {"prelude", "coda"} & set(whole)


# ------------------------------------------------------------------------------------ words and inputs


NO_FONT = pytest.mark.filterwarnings("ignore:No installed font has")


@pytest.mark.parametrize("text", [*TEXTS, pytest.param(CHINESE, marks=NO_FONT)])
def test_any_text_can_be_drawn(text: str) -> None:
    ax = plotting.plot_trajectories(torch.ones(1, 1, 3), texts=[text], title=text)
    assert_nothing_is_cut_off(ax.figure)  # type: ignore[arg-type]
    entry = legend_of(ax)[1]
    assert entry.startswith("+3.000  #0:")
    assert "\n" not in entry


def test_dollars_are_drawn_as_dollars() -> None:
    """As wide as the same text with mathtext switched off."""
    figure = Figure()
    canvas = FigureCanvasAgg(figure)
    text = r"$x$ and \$y_1$"
    escaped = figure.text(0, 0, clip(text, 1000))
    literal = figure.text(0, 0, text, parse_math=False)
    canvas.draw()
    assert escaped.get_window_extent().width == pytest.approx(literal.get_window_extent().width)


def test_clipped_text_fits_its_room() -> None:
    figure = Figure(dpi=72)
    FigureCanvasAgg(figure).draw()
    for text in (LONG, "W" * 300, "il" * 300, "a" * 5000):
        clipped = clip(text, 120, 7)
        width = figure.text(0, 0, clipped, fontsize=7).get_window_extent().width
        assert clipped.endswith("…")
        assert 100 < width < 125  # kerning, rounding
    assert clip("fits", 120) == "fits"


def test_long_numbers_carry_their_factor_in_the_label() -> None:
    small = plotting.plot_trajectories(make_result(scale=1e-6))
    small.figure.canvas.draw()
    assert r"$\times 10^{-6}$" in small.get_ylabel()
    numbers = [float(label.get_text().replace("−", "-")) for label in small.get_yticklabels()]
    np.testing.assert_allclose(numbers, small.get_yticks() * 1e6, rtol=1e-3, atol=1e-9)
    assert "10" not in plotting.plot_trajectories(make_result()).get_ylabel()


def test_tensors_arrays_and_lists_are_the_same() -> None:
    steps = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values = (steps, steps.clone().requires_grad_(), steps.numpy(), steps.tolist())
    pictures = [lines_of(plotting.plot_trajectories(value, 1)) for value in values]
    for lines in pictures[1:]:
        for line, first in zip(lines, pictures[0], strict=True):
            np.testing.assert_array_equal(line.get_ydata(), first.get_ydata())
    low = plotting.plot_heatmap(steps[0].bfloat16())
    np.testing.assert_allclose(low.get_images()[0].get_clim()[1], steps[0].abs().max(), rtol=1e-2)


def changed(**fields: Tensor) -> StepInfluence:
    result = make_result(q=2, n=4, t=3)
    return StepInfluence(**{**{name: getattr(result, name) for name in result.__dataclass_fields__}, **fields})


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "nan": (
        lambda: plotting.plot_trajectories(changed(trajectories=torch.full((2, 4, 3), torch.nan))),
        r"result\.trajectories has 24 of 24 values that are not finite, the first \(nan\) at \(0, 0, 0\)",
    ),
    "infinite error": (
        lambda: plotting.plot_trajectories(changed(score_errors=torch.full((2, 4), torch.inf))),
        r"result\.score_errors has 8 of 8 values that are not finite",
    ),
    "field of another shape": (
        lambda: plotting.plot_heatmap(changed(influence_scores=torch.zeros(4, 2))),
        r"result\.influence_scores must have shape \(2, 4\) to fit .*\(2, 4, 3\), got \(4, 2\)",
    ),
    "axes": (
        lambda: plotting.plot_trajectories(torch.zeros(2, 2, 2, 2)),
        r"result must hold .*\(q, n, t\).*\(2, 2, 2, 2\)",
    ),
    "nothing": (lambda: plotting.plot_step_share(torch.zeros(2, 0, 2)), r"no empty axis, got shape \(2, 0, 2\)"),
    "self-influence": (lambda: plotting.plot_trajectories(make_self_influence()), r"use plot_self_influence"),
    "no self-influence": (lambda: plotting.plot_self_influence(make_result()), r"\(n, t\).* use plot_trajectories"),
    "words": (lambda: plotting.plot_trajectories("scores.pt"), r"result must be numbers.*got str"),  # type: ignore[arg-type]
    "what influence returns": (
        lambda: plotting.plot_trajectories(KMostInfluentialResults(torch.zeros(3, 2), torch.ones(3, 2))),
        "result must hold trajectories, got KMostInfluentialResults. Use step_influence",
    ),
    "test": (lambda: plotting.plot_trajectories(make_result(), 3), r"test=3 is out of range: .* has 3, so pass 0 to 2"),
    "test below 0": (lambda: plotting.plot_heatmap(make_result(), -1), r"test=-1 is out of range"),
    "test no integer": (lambda: plotting.plot_heatmap(make_result(), 0.5), r"test takes integers .*0\.5"),  # type: ignore[arg-type]
    "tests": (lambda: plotting.plot_totals(make_result(), [0, 7]), r"tests=7 is out of range"),
    "tests empty": (lambda: plotting.plot_step_share(make_result(), []), r"tests must be a sequence .* got \[\]"),
    "tests no groups": (lambda: plotting.plot_step_share(make_result(), {}), r"tests is an empty mapping"),
    "train": (
        lambda: plotting.plot_trajectories(make_result(), train=[1, 99]),
        r"does not hold for test example 0: \[99\]",
    ),
    "train empty": (lambda: plotting.plot_heatmap(make_result(), train=[]), r"train must be a sequence .* got \[\]"),
    "train no integer": (lambda: plotting.plot_heatmap(make_result(), train=["a"]), r"train takes integers .*'a'"),  # type: ignore[list-item]
    "k": (lambda: plotting.plot_trajectories(make_result(), k=0), r"k must be an integer of at least 1, got 0"),
    "k self": (lambda: plotting.plot_self_influence(make_self_influence(), k=0), r"k must be an integer of at least 1"),
    "sort": (
        lambda: plotting.plot_heatmap(make_result(), sort="size"),
        r'sort must be "total" or "step", got \'size\'',
    ),
    "limit": (lambda: plotting.plot_heatmap(make_result(), limit=0), r"limit must be a positive number or None, got 0"),
    "texts": (lambda: plotting.plot_trajectories(make_result(), texts=["a"]), r"texts .* expected 12, got 1\."),
    "texts string": (lambda: plotting.plot_heatmap(make_result(), texts="a" * 12), r"texts .* got one string"),
    "texts of k": (
        lambda: plotting.plot_trajectories(make_result(k=4), texts=["a"]),
        r"texts .* expected at least \d+, got 1",
    ),
    "test_texts": (lambda: plotting.plot_totals(make_result(), test_texts=["a"]), r"test_texts .* expected 3, got 1"),
    "rows": (lambda: plotting.plot_totals(make_result(q=9, n=30), k=9), r"tests and k ask for \d+ rows"),
    "matrix": (
        lambda: plotting.plot_step_matrix(torch.zeros(3, 3, 3)),
        r"matrix must be \(s, t\) or \(q, n, s, t\).*\(3, 3, 3\)",
    ),
    "matrix nan": (lambda: plotting.plot_step_matrix([[torch.nan]]), r"matrix has 1 of 1 values that are not finite"),
    "pair": (lambda: plotting.plot_step_matrix(make_matrix(), (0, 3)), r"pair=3 is out of range"),
    "pair of one": (lambda: plotting.plot_step_matrix(make_matrix()[0, 0], (0, 0)), r"Leave pair out"),
    "shares": (lambda: plotting.plot_path({"a": [[0.5, 2.0]]}), r"shares\['a'\] must be a matrix .* from 0 to 1"),
    "no shares": (lambda: plotting.plot_path({}), r"shares names no panel"),
    "pair length": (lambda: plotting.plot_step_matrix(make_matrix(), (0,)), r"pair must be two positions.*\(0,\)"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_drawn_is_refused_before_there_is_a_figure(case: str) -> None:
    call, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        call()
    assert not plt.get_fignums()
