"""The page in a real browser: opened from disk, without a network, clicked, typed into, and looked at."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import HOSTILE, STEPS, TEST_TEXTS, TESTS, TEXTS, random_map, random_result, self_influence_of

from captum_sdi.report import Page, write_page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: make test-page")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine: make test-page installs Debian's", allow_module_level=True)

playwright.expect.set_options(timeout=20_000)  # milliseconds: other tests may keep the processors busy

SWITCHES = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
RESULT = random_result()
MATRIX_TRAINS = [3, 9]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return write_page(
        RESULT,
        tmp_path_factory.mktemp("page") / "page.html",
        texts=[{"text": text, "id": f"<i>t{index}</i>"} for index, text in enumerate(TEXTS)],
        test_texts=TEST_TEXTS,
        map=random_map(),
        step_matrix=torch.randn(TESTS, 2, STEPS, STEPS),
        step_matrix_indices=MATRIX_TRAINS,
        self_influence=self_influence_of(RESULT),
        title="<i>Which</i> texts?",
    )


class Visit:
    """An open page, and what went wrong in it."""

    def __init__(self, browser: Any, address: str, **settings: Any) -> None:
        self.context = browser.new_context(offline=True, viewport={"width": 1400, "height": 900}, **settings)
        self.tab = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("requestfinished", lambda request: self.requests.append(request.url))
        self.tab.goto(address)

    def cards(self, side: str) -> list[int]:
        """The training examples of a column, from top to bottom."""
        cards = self.tab.locator(f".{side} .card").all()
        return [int(card.get_attribute("data-train")) for card in cards]

    def expect(self, selector: str) -> Any:
        return playwright.expect(self.tab.locator(selector))


@pytest.fixture
def visit(browser: Any, page_file: Page) -> Iterator[Any]:
    """Opens the page at a fragment; at the end, it has neither complained nor asked for another file."""
    visits = []

    def open_at(fragment: str = "", **settings: Any) -> Visit:
        visits.append(Visit(browser, page_file.path.as_uri() + fragment, **settings))
        visits[-1].tab.wait_for_selector(".card, .shares, dl")
        return visits[-1]

    yield open_at
    for opened in visits:
        assert opened.complaints == []
        assert [url.split("#")[0] for url in opened.requests] == [page_file.path.as_uri()]
        opened.context.close()


def strongest(values: torch.Tensor, *, largest: bool) -> list[int]:
    """Positions of the values of one sign, the strongest first."""
    order = values.argsort(descending=largest).tolist()
    return [index for index in order if (values[index] >= 0) == largest][:20]


def test_it_shows_every_pair_in_order_and_texts_as_they_are(visit: Any) -> None:
    page = visit()
    totals = RESULT.influence_scores[0]
    assert page.cards("proponents") == strongest(totals, largest=True)
    assert page.cards("opponents") == strongest(totals, largest=False)
    page.expect("h1").to_have_text("<i>Which</i> texts?")
    page.expect(".list button:first-child .excerpt").to_have_text(TEST_TEXTS[0])
    for index, text in enumerate(HOSTILE):
        shown = page.tab.locator(f'.card[data-train="{index}"]')
        assert shown.locator(".text").text_content() == text
        assert shown.locator(".field").text_content() == f"id <i>t{index}</i>"
    assert "hacked" not in page.tab.title()
    best = page.tab.locator(".proponents .card").first
    assert best.locator(".value").text_content() == f"+{1e3 * totals.max():.2f}"
    faint = (totals.abs() < RESULT.score_errors[0]).nonzero().flatten().tolist()
    found = page.tab.locator(".card.faint").all()
    assert sorted(int(card.get_attribute("data-train")) for card in found) == faint


def test_nothing_from_outside_is_let_in(browser: Any, page_file: Page) -> None:
    page = Visit(browser, page_file.path.as_uri())
    page.tab.wait_for_selector(".card")
    page.tab.evaluate(
        """() => {
        const script = Object.assign(document.createElement("script"), {textContent: "document.title = 'hacked'"});
        document.body.append(script);
        document.body.append(Object.assign(document.createElement("img"), {src: "https://example.invalid/a.png"}));
        fetch("https://example.invalid/").catch(() => {});
    }"""
    )
    assert page.tab.title() != "hacked"
    assert len([text for text in page.complaints if "Content Security Policy" in text]) >= 3
    assert page.requests == [page_file.path.as_uri()]
    page.context.close()


def test_the_slider_a_bar_and_a_curve_rank_by_a_step(visit: Any) -> None:
    page = visit()
    page.tab.locator("input[type=range]").fill("3")
    third = RESULT.trajectories[0, :, 2]
    page.expect("output").to_have_text("loop step 3")
    assert page.cards("proponents") == strongest(third, largest=True)
    assert page.cards("opponents") == strongest(third, largest=False)
    page.tab.locator(".bin[data-rank='step:2']").click()
    assert page.cards("proponents") == strongest(RESULT.trajectories[0, :, 1], largest=True)
    page.tab.locator(".bin[data-rank='coda']").click()
    assert page.cards("proponents") == strongest(RESULT.coda[0], largest=True)
    page.tab.locator(".proponents .card .column").first.click()
    page.expect("output").to_have_text("loop step 1")
    page.tab.get_by_text("Back to the total").click()
    assert page.cards("opponents") == strongest(RESULT.influence_scores[0], largest=False)


def test_the_loop_plays(visit: Any) -> None:
    page = visit()
    page.tab.get_by_text("Play the loop").click()
    page.expect("output").to_have_text("loop step 1")
    page.expect("output").to_have_text("loop step 2")
    page.tab.keyboard.press("p")
    page.expect(".play").to_contain_text("Play")


def test_a_card_opens_and_a_curve_says_its_numbers(visit: Any) -> None:
    page = visit()
    page.tab.locator('.card[data-train="3"] .name').click()
    page.expect(".card.open .large .axes").to_contain_text("influence ×10⁻³")
    page.expect(".card.open .colour-table").to_have_count(2)  # step by step, and by layer and step
    page.tab.locator(".card.open .large .column").nth(1).hover()
    bubble = page.tab.locator(".card.open .large .bubble").text_content()
    number = re.search(r"step 2: ([+−][\d.]+)×10⁻(.)", bubble)
    assert number is not None, bubble
    value = float(number[1].replace("−", "-")) * 10.0 ** -"⁰¹²³⁴⁵⁶⁷⁸⁹".index(number[2])
    assert value == pytest.approx(float(RESULT.trajectories[0, 3, 1]), rel=1e-3)
    assert page.tab.evaluate("location.hash") == "#test=0&train=3"
    page.tab.keyboard.press("Escape")
    page.expect(".card.open").to_have_count(0)


def test_a_link_leads_to_a_selection(visit: Any) -> None:
    page = visit("#test=1&rank=step:2&train=9")
    page.expect(".question .text").to_have_text(TEST_TEXTS[1])
    page.expect(".card.open footer .name").to_have_text("#9")
    assert page.cards("proponents") == strongest(RESULT.trajectories[1, :, 1], largest=True)
    page.tab.evaluate("location.hash = '#test=2&rank=nonsense&train=x'")
    page.expect(".question .text").to_have_text(TEST_TEXTS[2])
    assert page.cards("proponents") == strongest(RESULT.influence_scores[2], largest=True)


def test_search_and_order(visit: Any) -> None:
    page = visit()
    page.tab.keyboard.press("/")
    page.tab.keyboard.type("SECOND")
    page.expect("[role=status]").to_have_text("1 of 3")
    page.tab.keyboard.press("Enter")
    page.expect(".question mark").to_have_text("second")
    page.tab.locator("#search").fill("number 29")
    page.expect("[role=status]").to_have_text("0 of 3")
    page.tab.get_by_text("in training texts, too").click()
    page.expect("[role=status]").to_have_text("3 of 3")
    page.tab.locator("#search").fill("")
    page.tab.get_by_label("Order").select_option("strongest")
    numbers = page.tab.locator(".list .facts > span").all_text_contents()
    assert list(map(int, numbers)) == RESULT.influence_scores.abs().amax(1).argsort(descending=True).tolist()


def test_keys(visit: Any) -> None:
    page = visit()
    page.tab.keyboard.press("j")
    page.expect(".question .text").to_have_text(TEST_TEXTS[1])
    page.tab.keyboard.press("ArrowRight")
    page.tab.keyboard.press("ArrowRight")
    page.expect("output").to_have_text("loop step 2")
    page.tab.keyboard.press("n")
    page.expect(".proponents .card:first-child.open").to_have_count(1)
    page.tab.keyboard.press("0")
    page.expect("output").to_have_text("all steps")
    page.tab.keyboard.press("k")
    page.expect(".label").to_contain_text("Test example 0")
    page.tab.keyboard.press("?")
    page.expect("main").to_contain_text("How to read this page")


def test_copies_of_a_text_are_one_card(browser: Any, tmp_path: Path) -> None:
    order = RESULT.influence_scores[0].argsort(descending=True).tolist()
    texts = list(TEXTS)
    for index in (*order[1:3], order[5]):  # two behind the first, and one that is not
        texts[index] = texts[order[0]]
    page_file = write_page(RESULT, tmp_path / "page.html", texts=texts, test_texts=TEST_TEXTS)
    page = Visit(browser, page_file.path.as_uri())
    page.expect(".proponents .card:first-child .copies").to_have_text(f"the same text: #{order[1]}, #{order[2]}")
    expected = strongest(RESULT.influence_scores[0], largest=True)
    assert page.cards("proponents") == [index for index in expected if index not in order[1:3]]
    page.expect(".copies").to_have_count(1)
    page.tab.evaluate(f"location.hash = '#train={order[2]}'")
    page.expect(".proponents .card:first-child.open").to_have_count(1)
    assert page.complaints == []
    page.context.close()


def test_tokens_and_layers_of_a_map(visit: Any) -> None:
    page, values = visit("#test=0&train=7"), random_map().values[0]
    tokens = page.tab.locator(".question .token")
    assert tokens.all_text_contents() == ["[BOS]", "<b>which</b>", "answer", "is", "it"]
    tints = tokens.evaluate_all("tokens => tokens.map((token) => parseFloat(token.style.getPropertyValue('--tint')))")
    expected = values[1].sum((0, 1)).abs()  # of training example 7
    assert tints == pytest.approx((100 * expected / expected.max()).tolist(), abs=0.51)
    page.tab.locator("input[type=range]").fill("2")
    tints = tokens.evaluate_all("tokens => tokens.map((token) => parseFloat(token.style.getPropertyValue('--tint')))")
    expected = values[1, :, 1].sum(0).abs()
    assert tints == pytest.approx((100 * expected / expected.max()).tolist(), abs=0.51)
    tokens.nth(2).click()
    by_token = values[:, :, :, 2].sum((1, 2))
    assert page.cards("proponents") == [[3, 7, 9][place] for place in strongest(by_token, largest=True)]
    page.tab.get_by_role("button", name="core.mlp").click()
    by_layer = values[:, 1].sum((1, 2))
    assert page.cards("proponents") == [[3, 7, 9][place] for place in strongest(by_layer, largest=True)]


def number_after(sign: str, text: str) -> float:
    """The number that a page writes behind a sign, in its unit."""
    found = re.search(rf"{sign} ([\d.]+(?:e−\d+)?)(?:×10⁻(.))?", text)
    assert found is not None, text
    power = 10.0 ** -"⁰¹²³⁴⁵⁶⁷⁸⁹".index(found[2]) if found[2] else 1.0
    return float(found[1].replace("−", "-")) * power


def test_what_a_map_says_has_its_errors(visit: Any) -> None:
    page, errors = visit("#test=0&train=7&rank=layer:core.mlp"), random_map().errors[0].double()
    of_card = page.tab.locator('.card[data-train="7"] .error').get_attribute("title")
    assert number_after("±", of_card) == pytest.approx(float(errors[1, 1].sum()), rel=0.06)  # steps, tokens: a bound
    of_token = page.tab.locator(".question .token").nth(2).get_attribute("title")
    expected = errors[1, :, :, 2].sum(1).square().sum().sqrt()  # layers are independent
    assert 1e-3 * number_after("±", of_token) == pytest.approx(float(expected), rel=0.2)
    cell = page.tab.locator(".card.open .colour-table").last.locator("tbody td").nth(1).get_attribute("title")
    assert number_after("±", cell) == pytest.approx(float(errors[1, 0, 1].sum()), rel=0.06)


PLACED = [
    ("a bb  a", ["a", " bb", " a", ""], True, ["a", "bb", "a"]),
    ("a bb", ["\u2581a", "\u0120bb"], True, ["a", "bb"]),
    ("a bb", ["<s>", "a", "bb", "</s>"], True, ["<s>", "a", "bb", "</s>"]),
    ("0 = 0", [" 0"], True, ["0"]),
    ("say 0 0 = 0 1", ["0", " 1"], True, ["0", "1"]),  # a completion stands last
    ("10010=0", ["1", "1", "1", "0", "0", "0", "0"], False, ["1", "1", "1", "0", "0", "0", "0"]),
]


def test_tokens_stand_where_they_are_in_the_text(visit: Any) -> None:
    page = visit()
    for text, tokens, in_place, pieces in PLACED:
        placed = page.tab.evaluate("([text, tokens]) => placedTokens(text, tokens)", [text, tokens])
        assert placed["isInPlace"] == in_place, text
        assert [piece["piece"] for piece in placed["pieces"] if piece["token"] is not None] == pieces
        shown = [piece["piece"] for piece in placed["pieces"] if not piece.get("isLoose")]
        assert not in_place or "".join(shown) == text  # nothing of it is lost


def test_the_whole_set(visit: Any) -> None:
    page = visit("#view=set")
    page.expect(".shares .bar").to_have_count(STEPS + 2)
    order = RESULT.influence_scores[0].argsort(descending=True).tolist()
    assert page.tab.locator(".self .name").all_text_contents() == [f"#{index}" for index in order]


def test_light_dark_narrow_and_paper(visit: Any) -> None:
    page = visit(color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.tab.evaluate(background) == "rgb(21, 24, 28)"
    page.tab.get_by_label("Light or dark").click()
    assert page.tab.evaluate(background) == "rgb(251, 250, 248)"
    page.tab.set_viewport_size({"width": 400, "height": 800})
    page.expect("nav").to_be_hidden()
    page.tab.get_by_label("List of test examples").click()
    page.tab.locator(".list button").nth(2).click()
    page.expect(".question .text").to_have_text(TEST_TEXTS[2])
    assert page.tab.evaluate("document.documentElement.scrollWidth") == 400
    page.tab.emulate_media(media="print")
    page.expect("nav").to_be_hidden()
    page.expect(".controls").to_be_hidden()


def test_a_notebook_shows_it_in_a_frame(browser: Any, page_file: Page, tmp_path: Path) -> None:
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><p>cell</p>{page_file._repr_html_()}", encoding="utf-8")
    page = Visit(browser, notebook.as_uri())
    frame = page.tab.frame_locator("iframe")
    frame.get_by_text("Play the loop").click()
    playwright.expect(frame.locator("output")).to_have_text("loop step 1")
    assert page.complaints == []
    page.context.close()


def test_thousands_are_paged_in(browser: Any, tmp_path: Path) -> None:
    n_tests, n_trains = 1200, 60
    result = random_result(n_tests, n_trains, steps=2)
    test_texts = [f"question {test}" for test in range(n_tests)]
    page_file = write_page(result, tmp_path / "page.html", test_texts=test_texts)
    page = Visit(browser, f"{page_file.path.as_uri()}#test=1199")
    page.expect(".question .text").to_have_text("question 1199")
    assert page.tab.locator(".list button").count() < 40
    page.expect(".list [aria-selected=true] .excerpt").to_have_text("question 1199")
    n_proponents = int((result.influence_scores[1199] >= 0).sum())
    page.tab.locator(".proponents .more").click()
    page.expect(".proponents .card").to_have_count(n_proponents)
    assert page.complaints == []
    page.context.close()


def test_a_step_that_hardly_acts_has_numbers_all_the_same(browser: Any, tmp_path: Path) -> None:
    """Of a chain of facts, the last step can be a million times the first: all share one unit."""
    faint = torch.tensor([1e-6, 1.0, 1.0, 1.0]) * RESULT.trajectories
    page = write_page(replace(RESULT, trajectories=faint), tmp_path / "page.html", texts=TEXTS)
    visit = Visit(browser, page.path.as_uri())
    value = visit.expect(".proponents .card:first-child .value")
    value.to_be_visible()  # a key that is pressed before leads nowhere
    visit.tab.keyboard.press("ArrowRight")
    value.to_have_text(re.compile(r"^\+\d\.\de−\d$"))
    visit.context.close()
    assert not visit.complaints


SPOKEN = [
    {"text": "Who is it? 🙂 It is Ana.", "learned_characters": [[13, 23]]},
    {"text": "مرحبا كيف الحال؟ بخير", "learned_characters": [[17, 21]]},
    {"text": "user: 你好 assistant: 你好吗 user: 再见 assistant: 好", "learned_characters": [[20, 24], [44, 45]]},
]
LONG = {"text": f"{'context of it ' * 200}the answer", "learned_characters": [[2800, 2810]]}


def test_what_carries_a_loss_is_told_from_its_context(browser: Any, tmp_path: Path) -> None:
    trains = [*SPOKEN, LONG, *TEXTS[4:]]
    page = write_page(RESULT, tmp_path / "spoken.html", texts=trains, test_texts=[SPOKEN[0], LONG, "plain"])
    seen = Visit(browser, page.path.as_uri(), color_scheme="dark")
    tab = seen.tab
    tab.wait_for_selector("article")

    def said(box: Any, kind: str) -> list[str]:
        return box.locator(f".text .{kind}").all_inner_texts()

    question = tab.locator(".question")
    assert (said(question, "context"), said(question, "learned")) == (["Who is it? 🙂 "], ["It is Ana."])
    arabic, chinese = tab.locator('.card[data-train="1"]'), tab.locator('.card[data-train="2"]')
    assert (said(arabic, "context"), said(arabic, "learned")) == (["مرحبا كيف الحال؟ "], ["بخير"])
    assert said(chinese, "context") == ["user: 你好 assistant: ", "user: 再见 assistant: "]
    assert said(chinese, "learned") == ["你好吗 ", "好"]
    folded = tab.locator('.card[data-train="3"]')
    assert folded.locator(".text").inner_text().startswith("… ")
    playwright.expect(folded.locator(".learned")).to_have_text("the answer")
    assert folded.locator(".learned").is_visible()
    tab.emulate_media(media="print")
    assert folded.locator(".text").inner_text() == LONG["text"]
    tab.emulate_media(media="screen")
    folded.get_by_text("Show all").click()
    assert folded.locator(".text").inner_text() == LONG["text"]
    colours = "element => [...element.querySelectorAll('.context, .learned')].map(part => getComputedStyle(part).color)"
    for scheme in ("dark", "light"):
        tab.emulate_media(color_scheme=scheme)
        assert len(set(question.evaluate(colours))) == 2, scheme
    tab.emulate_media(media="print")
    assert tab.locator(".learned").first.evaluate("part => getComputedStyle(part).borderInlineStartStyle") == "solid"
    playwright.expect(tab.locator(".legend")).to_contain_text("carry no loss")
    tab.emulate_media(media="screen")
    tab.locator("#search").fill("it? 🙂 it is")  # over the border of both
    playwright.expect(question.locator("mark").first).to_be_visible()
    assert "".join(question.locator("mark").all_inner_texts()).lower() == "it? 🙂 it is"
    assert seen.complaints == []
    seen.context.close()


def test_a_long_prompt_is_scrolled_to_its_answer(browser: Any, tmp_path: Path) -> None:
    page = write_page(RESULT, tmp_path / "long.html", texts=TEXTS, test_texts=[LONG, "plain", "plain"])
    seen = Visit(browser, page.path.as_uri())
    tab = seen.tab
    box = tab.locator(".question .text")
    corners = "[box, box.querySelector('.learned')].map((element) => element.getBoundingClientRect())"
    inside = f"box => {{ const [outer, inner] = {corners}; "
    inside += "return inner.top >= outer.top && inner.bottom <= outer.bottom + 1; }"
    playwright.expect(box.locator(".learned")).to_be_in_viewport()
    assert box.evaluate(inside)
    tab.goto(f"{page.path.as_uri()}#test=1")
    playwright.expect(tab.locator(".legend")).to_have_count(0)
    assert seen.complaints == []
    seen.context.close()
