"""Pictures of maps and of words: what they say, in any script, on any background, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from test_plotting import LONG, assert_nothing_is_cut_off, lines_of, make_result, overlapping

from captum_sdi import InfluenceMap, plotting
from captum_sdi.plotting import _flow, _fonts
from captum_sdi.plotting._colours import robust_bound
from captum_sdi.plotting._text import FIRST_STRONG, POP, clip, signed_numbers

ENGLISH = ["The", " quick", " brown", " fox", "\n", ""]
HEBREW = ["שלום", "עולם", "12", "פעמים"]


@pytest.fixture(autouse=True)
def _no_test_leaves_a_figure() -> Iterator[None]:
    plt.close("all")
    yield
    plt.close("all")


def make_map(t: int = 3, words: list[str] = ENGLISH, other: list[str] = HEBREW, scale: float = 1.0) -> InfluenceMap:
    draw = torch.Generator().manual_seed(0)
    values = scale * torch.randn(1, 2, len(words), len(other), t + 2, generator=draw)
    values[..., 0] = values[..., -1] = 0
    labels = {
        "token": tuple(range(len(words))),
        "train_position": tuple(range(len(other))),
        "step": ("prelude", *range(t), "coda"),
    }
    tokens = {7: tuple(other), 3: tuple(other[:2])}
    return InfluenceMap(
        values, tuple(labels), labels, torch.tensor([[7, 3]]), test_tokens=(tuple(words),), train_tokens=tokens
    )


# --- two axes ---


@pytest.mark.parametrize(("t", "scale"), [(6, 1.0), (1, 1e-6), (64, 0.0)])
@pytest.mark.parametrize("axes", [("step", "token"), ("token", "train_position"), ("train_position", "step")])
def test_any_two_axes_are_labelled_and_nothing_is_cut_off(axes: tuple[str, str], t: int, scale: float) -> None:
    ax = plotting.plot_map(make_map(t, scale=scale), *axes, train=0)
    words = assert_nothing_is_cut_off(ax.figure)  # type: ignore[arg-type]
    assert not overlapping(words)
    assert ax.get_xlabel()
    assert ax.get_ylabel()


def test_a_map_is_summed_over_its_other_axes() -> None:
    split = make_map()
    image = plotting.plot_map(split, x="step", y="token", train=1).get_images()[0].get_array()
    np.testing.assert_allclose(image, split.values[0, 1].sum(1)[:, 1:-1].numpy(), rtol=1e-5)
    image = plotting.plot_map(split, x="token", y="step").get_images()[0].get_array()
    np.testing.assert_allclose(image, split.values[0].sum((0, 2))[:, 1:-1].T.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"x": "layer", "y": "step"}, "x='layer' is no axis of this map"),
        ({"x": "step", "y": "step"}, "name two axes"),
        ({"x": "step", "y": "token", "train": 2}, "train=2 is out of range"),
        ({"x": "step", "y": "token", "test": 1}, "test=1 is out of range"),
        ({"x": "step", "y": "token", "limit": 0}, "limit must be"),
        ({"x": "step", "y": "token", "width": 0.1}, "width must be from 1 to 100 inches"),
    ],
)
def test_maps_that_cannot_be_drawn(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        plotting.plot_map(make_map(), **arguments)
    assert not plt.get_fignums()


# --- words ---


def boxes(ax: Axes) -> list[Rectangle]:
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


def written(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_words_are_tinted_by_their_influence() -> None:
    split = make_map()
    ax = plotting.plot_tokens(split)
    assert [word for word in written(ax) if word in ("The", "quick", "↵", "עולם")] == ["The", "quick", "↵", "עולם"]
    by_token = split.values[0, 0].sum((1, 2)).numpy()
    colours = mpl.colormaps["RdBu"](0.5 + 0.5 * by_token[:5] / np.abs(by_token).max())
    for box, colour in zip(boxes(ax), colours, strict=False):
        np.testing.assert_allclose(box.get_facecolor(), colour, atol=1e-2)
    assert len(boxes(ax)) == 5 + 4, "the empty token behind the end is no word"
    assert_nothing_is_cut_off(ax.figure)  # type: ignore[arg-type]


def test_one_target_is_outlined_and_asked_about() -> None:
    split = make_map()
    ax = plotting.plot_tokens(split, token=2)
    of_token = split.values[0, 0, 2].sum(1).numpy()
    colours = mpl.colormaps["RdBu"](0.5 + 0.5 * of_token / np.abs(of_token).max())
    np.testing.assert_allclose(boxes(ax)[5].get_facecolor(), colours[0], atol=1e-2)
    assert boxes(ax)[2].get_edgecolor() == to_rgba(mpl.rcParams["text.color"])
    with pytest.raises(ValueError, match="token=9 is out of range"):
        plotting.plot_tokens(split, token=9)
    with pytest.raises(ValueError, match="asks of one target"):
        plotting.plot_tokens(split.sum("token"), token=1)


def test_long_texts_are_wrapped_and_words_do_not_overlap() -> None:
    ax = plotting.plot_tokens(make_map(words=LONG.split()[:45], other=["W" * 200, *LONG.split()]))
    figure = ax.figure
    words = assert_nothing_is_cut_off(figure)  # type: ignore[arg-type]
    assert not overlapping(words)
    heights = {round(box.get_y()) for box in boxes(ax)}
    assert len(heights) > 3


def test_right_to_left_texts_begin_at_the_right() -> None:
    rightwards, leftwards = _flow.flow(["one", "two"], 200, 8), _flow.flow(HEBREW, 200, 8)
    assert rightwards[0].left < rightwards[1].left
    assert leftwards[0].left > leftwards[1].left > leftwards[2].left
    assert leftwards[0].left + leftwards[0].width == pytest.approx(200)


def test_characters_that_no_font_has_are_numbered_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fonts, "family_with", lambda character: None)
    with pytest.warns(UserWarning, match="No installed font has the characters '循环模'") as caught:
        words = _flow.flow(["循", "a", "环", "模"], 200, 8)
    assert [word.text for word in words] == ["[0]", "a", "[2]", "[3]"]
    assert len(caught) == 1
    monkeypatch.setattr(_fonts, "family_with", lambda character: "DejaVu Serif")
    assert _flow.flow(["循"], 200, 8)[0].text == "循"
    tokens = plotting.plot_tokens(make_map(words=["循", "a"])).texts
    assert [text.get_fontfamily()[-1] for text in tokens if text.get_text() in ("循", "a")] == [
        "DejaVu Serif",
        mpl.rcParams["font.family"][-1],
    ]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_labels_in_any_script_have_no_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fonts, "family_with", lambda character: None)
    with pytest.warns(UserWarning, match="their number and script is shown in brackets"):
        ax = plotting.plot_heatmap(make_result(n=2), texts=["循环 and हिन्दी", "plain"])
    labels = {label.get_text() for label in ax.get_yticklabels()}
    assert {"#1: plain"} < labels
    (other,) = labels - {"#1: plain"}
    assert other.startswith("#0: [2 CJK] and [")
    assert "Devanagari]" in other
    monkeypatch.setattr(_fonts, "family_with", lambda character: "DejaVu Serif")
    ax = plotting.plot_heatmap(make_result(n=2), texts=["循环", "plain"])
    families = {label.get_text(): label.get_fontfamily() for label in ax.get_yticklabels()}
    assert families["#0: 循环"] == [*families["#1: plain"], "DejaVu Serif"]


@pytest.mark.parametrize("t", [1, 3, 64])
def test_a_row_of_words_for_each_step(t: int) -> None:
    split = make_map(t)
    ax = plotting.plot_token_steps(split, train=1, axis="train_position")
    headings = [word.partition(":")[0] for word in written(ax) if word.startswith("step")]
    assert len(headings) == min(t, 16)
    assert headings[0] == "step 1"
    assert headings[-1] == f"step {t}"
    assert len(boxes(ax)) == 2 * len(headings), "the second train example has two words"
    assert_nothing_is_cut_off(ax.figure)  # type: ignore[arg-type]


def test_texts_that_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="needs an axis along a text"):
        plotting.plot_tokens(make_map().sum("token", "train_position"))
    with pytest.raises(ValueError, match="one along steps"):
        plotting.plot_token_steps(make_map().sum("step"))
    with pytest.raises(ValueError, match="map must be what"):
        plotting.plot_tokens(torch.ones(3))
    with pytest.raises(ValueError, match="Pass a taller one"):
        plotting.plot_token_steps(make_map(16), ax=Figure(figsize=(3, 1)).subplots())


# --- faults of older pictures ---


def test_outliers_do_not_set_the_colours_of_all_others_and_are_marked() -> None:
    result = make_result()
    assert robust_bound(result.trajectories[0].numpy()) == result.trajectories[0].abs().max()
    result.trajectories[0, 3, 2] = 500.0
    ax = plotting.plot_heatmap(result, 0)
    others = result.trajectories[0].flatten().abs().sort().values
    assert ax.get_images()[0].get_clim()[1] == pytest.approx(float(others[-2]))
    assert ax.get_images()[0].colorbar.extend == "both"
    (marks,) = ax.collections
    assert len(marks.get_offsets()) == 1
    assert "dots: beyond the colours" in ax.figure.axes[-1].get_ylabel()
    assert "beyond" not in plotting.plot_heatmap(make_result(), 0).figure.axes[-1].get_ylabel()


def all_words(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.figure.findobj(Text)]


@pytest.mark.parametrize("k", [2, 3])
def test_a_point_that_would_flatten_all_lines_is_marked_at_the_edge(k: int) -> None:
    result = make_result(n=30)
    best = int(result.influence_scores[0].argmax())
    plain = plotting.plot_trajectories(result, 0, k=k)
    usual = plain.get_ylim()[1]
    assert not any("triangles" in text for text in all_words(plain))
    result.trajectories[0, best, 2] = 500.0
    result.influence_scores[0, best] += 500.0
    ax = plotting.plot_trajectories(result, 0, k=k)
    assert ax.get_ylim()[1] < 2 * usual
    (triangle,) = [marks for marks in ax.collections if isinstance(marks, PathCollection) and len(marks.get_offsets())]
    step, height = triangle.get_offsets()[0]
    assert step == 3
    assert 0.9 < height / ax.get_ylim()[1] < 1
    assert any("triangles: off axis" in text for text in all_words(ax))
    assert_nothing_is_cut_off(ax.figure)


def test_more_than_five_lines_are_panels_also_in_a_given_axes() -> None:
    figure = Figure(figsize=(8, 6))
    left, right = figure.subplots(1, 2)
    assert plotting.plot_trajectories(make_result(n=30), k=3, ax=left) is left
    assert len(figure.axes) == 7
    assert all(len(lines_of(panel)) == 1 for panel in figure.axes if panel is not right)
    four = plotting.plot_trajectories(make_result(n=30))
    assert len(four.figure.axes) == 1
    assert len(lines_of(four)) == 4


def test_plain_subplots_do_not_reach_into_each_other() -> None:
    figure, grid = plt.subplots(2, 2, figsize=(8, 6))
    texts = [LONG] * 12
    plotting.plot_trajectories(make_result(), texts=texts, ax=grid[0, 0])
    plotting.plot_heatmap(make_result(), texts=texts, ax=grid[0, 1])
    plotting.plot_totals(make_result(q=1), texts=texts, ax=grid[1, 0])
    plotting.plot_step_share(make_result(), {"a": [0], LONG: [1]}, ax=grid[1, 1])
    assert not overlapping(assert_nothing_is_cut_off(figure))
    spaced, ax = plt.subplots()
    spaced.subplots_adjust(left=0.4)
    plotting.plot_heatmap(make_result(), ax=ax)
    assert spaced.get_layout_engine() is None, "spacing that somebody has set is left alone"


def test_long_names_of_few_rows_have_two_lines() -> None:
    few = plotting.plot_heatmap(make_result(n=3), texts=[LONG, HEBREW[0] * 12, "short"])
    names = {label.get_text().split(":")[0]: label.get_text() for label in few.get_yticklabels()}
    assert names["#0"].count("\n") == 1
    assert names["#2"] == "#2: short"
    if hasattr(mpl.ft2font, "__libraqm_version__"):
        two = clip(f"#0: {FIRST_STRONG}{' '.join(HEBREW * 3)}{POP}", 80, lines=2)
        assert all(line.count(FIRST_STRONG) == line.count(POP) == 1 for line in two.split("\n"))
    many = plotting.plot_heatmap(make_result(n=30), texts=[LONG] * 30)
    assert not any("\n" in label.get_text() for label in many.get_yticklabels())


def test_numbers_stay_where_they_are_beside_right_to_left_text() -> None:
    isolates = plotting.plot_trajectories(make_result(n=2), texts=HEBREW[:2])
    entries = [text.get_text() for text in isolates.get_legend().get_texts()]
    if hasattr(mpl.ft2font, "__libraqm_version__"):
        assert f"#0: {FIRST_STRONG}שלום{POP}" in "".join(entries)
        assert clip(f"{FIRST_STRONG}{'שלום ' * 50}{POP}", 60).endswith("…" + POP)
    assert_nothing_is_cut_off(isolates.figure)  # type: ignore[arg-type]


def test_error_bars_are_seen_on_dark_backgrounds() -> None:
    with plt.style.context("dark_background"):
        bars = plotting.plot_totals(make_result(), k=1)
    colours = [tuple(colour) for lines in bars.collections for colour in lines.get_colors()]
    assert to_rgba("white") in colours


def test_nothing_is_no_proponent() -> None:
    entries = plotting.plot_trajectories(torch.zeros(1, 2, 3)).get_legend().get_texts()
    assert [text.get_text() for text in entries] == ["no influence: total", "0  #0", "0  #1"]
    assert signed_numbers(np.array([0.0, 1.0])) == ["+0.000", "+1.000"]


def test_a_wider_picture_shows_more_of_a_text() -> None:
    shown = {}
    for width in (3.4, 6.8):
        ax = plotting.plot_heatmap(make_result(n=2), texts=[LONG, LONG], width=width)
        assert ax.figure.get_figwidth() == width
        shown[width] = len(ax.get_yticklabels()[0].get_text())
    assert shown[6.8] > 2 * shown[3.4]


@pytest.mark.parametrize("t", [1, 8, 64])
def test_panels_show_each_example_alone(t: int) -> None:
    result = make_result(n=30, t=t)
    ax = plotting.plot_trajectory_panels(result, 1, k=4, texts=[LONG, *HEBREW] * 6)
    panels = ax.figure.axes
    assert len(panels) == 8
    order = result.influence_scores[1].argsort(descending=True).tolist()
    for panel, index in zip(panels, [*order[:4], *order[:-5:-1]], strict=True):
        (line,) = lines_of(panel)
        np.testing.assert_allclose(line.get_ydata(), result.trajectories[1, index].numpy(), rtol=1e-6)
        assert f"#{index}\n" in panel.get_title(loc="left")
        assert panel.get_ylim() == ax.get_ylim()
    assert not overlapping(assert_nothing_is_cut_off(ax.figure))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="80 panels, more than can be read"):
        plotting.plot_trajectory_panels(torch.ones(80, 3), k=80)
