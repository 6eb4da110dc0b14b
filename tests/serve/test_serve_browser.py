"""The page in a real browser: bash launch/test_browser.sh."""

import json
import re
import time
import urllib.request

import pytest

pytest.importorskip("starlette")
pytest.importorskip("playwright")

from helpers.outputs import copy_of, uncommit
from helpers.report_page import HOSTILE_TEXTS, N_DOCUMENTS, shared_job
from helpers.served import chromium, served
from helpers.visitor import QUESTION, Visitor

from gradproj.cli.serve.explorer import ControlWatch

pytestmark = pytest.mark.browser

OVERRIDES = re.compile("[\u202a-\u202e\u2066-\u2069\u200e\u200f]")
NEEDS_NAMES = """() => [...document.querySelectorAll("input, select, textarea, button, canvas")]
  .filter(e => e.checkVisibility() && !e.labels?.length && !e.getAttribute("aria-label")
    && !e.textContent.trim()).map(e => e.outerHTML)"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    job = shared_job(tmp_path_factory.getbasetemp() / "report")
    return copy_of(job.output, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(made, tmp_path_factory):
    unfinished = copy_of(made, tmp_path_factory.mktemp("unfinished"))
    uncommit(unfinished, 1)
    with served(made, unfinished) as (address, queue):
        yield address, queue


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def visit(browser, server):
    visitors = []

    def made(**options):
        visitors.append(Visitor(browser, server[0], **options))
        return visitors[-1]

    yield made
    for visitor in visitors:
        visitor.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_ask_read_open_and_return_by_the_link(visit, width, scheme, tmp_path):
    visitor = visit(width=width, scheme=scheme)
    page = visitor.page
    visitor.ask()
    visitor.wait_for_answer()
    assert page.locator(".hit").count() == 15
    shades = page.locator(".excerpt span").evaluate_all("all => all.map(e => e.style.background)")
    assert any("rgb" in shade for shade in shades)
    assert page.locator(".strip span").count() > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.evaluate(NEEDS_NAMES) == []
    page.locator(".hit").first.get_by_text("Tokens and layers in numbers").click()
    page.get_by_text("less that of the stored row").wait_for()
    page.screenshot(path=tmp_path / "ask.png")
    page.locator(".hit").first.get_by_role("button", name="Open").click()
    dialog = page.get_by_role("dialog")
    dialog.locator(".excerpt").wait_for()
    assert len(dialog.locator(".excerpt").inner_text()) > 20
    tokens = dialog.locator(".excerpt span[title]")
    shades = tokens.evaluate_all("all => all.map(e => e.style.background)")
    assert any("rgb" in shade for shade in shades)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / "document.png")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    other = visit(width=width)
    other.go(page.url.removeprefix(visitor.address))
    other.wait_for_answer()
    assert other.scores() == visitor.scores()
    assert other.page.get_by_label("Text", exact=True).input_value() == QUESTION


def test_keyboard_alone(visit):
    visitor = visit()
    page = visitor.page

    def tab_to(matches):
        for _ in range(200):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement.matches({json.dumps(matches)})"):
                return
        raise AssertionError(f"no tab reaches {matches}")

    tab_to("textarea[aria-label=Text]")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Control+Enter")
    visitor.wait_for_answer()
    tab_to(".hit button")
    page.keyboard.press("Enter")
    page.get_by_role("dialog").locator(".excerpt").wait_for()
    page.keyboard.press("Escape")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    tab_to(".hit button")
    assert page.evaluate(outline) == "solid"


def test_results_stream_and_cancel_stops_the_scan(visit, server, monkeypatch):
    advanced = ControlWatch.advanced

    def slow(self, n_done, n_total, what):
        time.sleep(0.4)
        advanced(self, n_done, n_total, what)

    monkeypatch.setattr(ControlWatch, "advanced", slow)
    visitor, (_, queue) = visit(), server
    visitor.ask()
    news = visitor.page.locator(".news")
    news.filter(has_text=re.compile(r"of \d+ documents")).wait_for()
    assert queue.counts["running"] == 1
    visitor.page.get_by_role("button", name="Cancel").click()
    news.filter(has_text="Cancelled").wait_for()
    monkeypatch.undo()
    while queue.counts["running"]:
        time.sleep(0.05)
    visitor.ask()
    visitor.wait_for_answer()


def test_hostile_documents_change_nothing(visit):
    visitor = visit()
    page = visitor.page
    page.get_by_label("Highest").fill(str(N_DOCUMENTS - 2))
    visitor.ask("<script>\u202e the of and")
    visitor.wait_for_answer()
    n_scripts = page.locator("script").count()
    for number in range(len(HOSTILE_TEXTS)):
        button = page.get_by_role("button", name=f"Open document {number}", exact=True)
        if button.count():
            button.first.click()
            page.get_by_role("dialog").locator(".excerpt").wait_for()
            assert not OVERRIDES.search(page.get_by_role("dialog").inner_text())
            page.keyboard.press("Escape")
    for view, shown in (("#store", "#view-store h3"), ("#map", "#map-canvas")):
        visitor.go(view)
        page.locator(shown).first.wait_for()
        page.wait_for_timeout(300)
    assert page.title() == "gradproj"
    assert n_scripts == page.locator("script").count() == 1
    assert page.locator("img").count() == 0
    shown = page.evaluate("document.documentElement.innerText")
    assert not OVERRIDES.search(shown)
    assert "\0" not in shown
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def whole_text(server, sample_id):
    with urllib.request.urlopen(f"{server[0]}api/outputs/0/documents/{sample_id}") as answer:
        return json.load(answer)["text"]


def test_ask_with_a_document_and_compare_two_outputs(visit, server):
    visitor = visit()
    page = visitor.page
    visitor.ask()
    visitor.wait_for_answer()
    chosen = page.locator(".hit").nth(1).get_attribute("data-id")
    page.locator(".hit").nth(1).get_by_role("button", name="Ask with").click()
    page.locator(".hit").first.and_(page.locator(f'[data-id="{chosen}"]')).wait_for()
    visitor.wait_for_answer()
    page.locator(".hit").first.get_by_role("button", name="Open").click()
    dialog = page.get_by_role("dialog")
    dialog.locator("mark.shared span[title]").first.wait_for()
    asked = page.get_by_label("Text", exact=True).input_value()
    assert all(text.strip() in asked for text in dialog.locator("mark.shared").all_text_contents())
    assert dialog.locator(".excerpt").text_content() in whole_text(server, chosen)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Compare with a second question").click()
    visitor.ask(panel=0)
    visitor.wait_for_answer(0)
    page.locator("form").nth(1).get_by_label("Score").select_option("cosine")
    visitor.ask(panel=1)
    visitor.wait_for_answer(1)
    page.get_by_text(re.compile(r"\d+ of 10 highest documents are in both")).wait_for()
    assert "%22output%22%3A1" in page.url
    boxes = [page.locator("form").nth(n).bounding_box() for n in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"output": 7}, "there is no output 7"),
        ({"score": "hidden"}, "hidden"),
        ({"domains": ["nowhere"]}, "'nowhere'"),
        ({"messages": [None]}, "no question that can be read"),
        ({"top_k": "abc"}, "no question that can be read"),
    ],
)
def test_a_link_to_what_is_not_there_is_not_answered_otherwise(browser, server, question, message):
    visitor = Visitor(browser, server[0])
    visitor.page.goto(f"{server[0]}?x#ask={json.dumps([{'text': QUESTION, **question}])}")
    visitor.page.locator(".problem:visible").filter(has_text=message).wait_for()
    assert visitor.page.locator("form").count() == 1
    assert visitor.scores() == []
    visitor.context.close()


def test_the_link_is_there_again_after_another_view(visit):
    visitor = visit()
    visitor.ask()
    visitor.wait_for_answer()
    link = visitor.page.url
    for view in ("Job", "Ask"):
        visitor.page.get_by_role("link", name=view, exact=True).click()
    visitor.page.wait_for_url(link)


def test_back_returns_to_the_question_before(visit):
    visitor = visit()
    links = []
    for text in (QUESTION, "was it that"):
        visitor.ask(text)
        visitor.wait_for_answer()
        links.append(visitor.page.url)
    visitor.page.go_back()
    visitor.page.wait_for_url(links[0])
    visitor.wait_for_answer()
    assert visitor.page.get_by_label("Text", exact=True).input_value() == QUESTION
    visitor.page.go_forward()
    visitor.page.wait_for_url(links[1])


def test_a_page_without_its_token_asks_for_it_and_keeps_the_question(browser, made):
    token = "a.secret=16-or-more"
    with served(made, access={"token": token}) as (address, _):
        page = browser.new_page(viewport={"width": 390, "height": 700})
        page.goto(f"{address}#ask={json.dumps([{'text': QUESTION, 'tokens': False}])}")
        page.get_by_label("Token").fill(token)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.keyboard.press("Enter")
        page.locator(".hit").first.wait_for()
        other = browser.new_page()
        other.goto(address)
        other.get_by_label("Token").wait_for()
        other.goto(f"{address}#token={token}")
        other.locator("form textarea").first.wait_for()
        assert token not in other.url


def test_exports(visit, tmp_path):
    visitor = visit()
    page = visitor.page
    visitor.ask()
    visitor.wait_for_answer()
    saved = {}
    for name in ("Save JSON lines", "Save picture"):
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        saved[name] = tmp_path / download.value.suggested_filename
        download.value.save_as(saved[name])
    hits = [json.loads(line) for line in saved["Save JSON lines"].read_text().splitlines()]
    assert len(hits) == len(visitor.scores())
    assert {"score", "id", "key", "tokens", "layers", "damping"} <= hits[0].keys()
    assert saved["Save picture"].read_bytes().startswith(b"\x89PNG")


def test_the_map_zooms_names_and_opens_documents(visit):
    visitor = visit()
    page = visitor.page
    visitor.go("#map")
    canvas = page.locator("canvas")
    canvas.wait_for()
    pixels = "e => e.toDataURL()"
    whole = canvas.evaluate(pixels)
    assert len(whole) > 5000
    canvas.focus()
    page.keyboard.press("+")
    assert canvas.evaluate(pixels) != whole
    page.keyboard.press("0")
    assert canvas.evaluate(pixels) == whole
    domain = page.locator(".legend button").nth(1)
    for notice, leave in ((domain.focus, domain.blur), (domain.hover, canvas.hover)):
        notice()
        assert canvas.evaluate(pixels) != whole
        leave()
        page.mouse.move(1, 1)
        assert canvas.evaluate(pixels) == whole
    canvas.hover()
    for control in (False, True):
        if control:
            page.keyboard.down("Control")
        page.mouse.wheel(0, -100)
        page.wait_for_timeout(100)
        page.keyboard.up("Control")
        page.mouse.move(1, 1)
        assert (canvas.evaluate(pixels) == whole) != control
        canvas.hover()
    canvas.press("0")
    box = canvas.bounding_box()
    news = page.locator("#view-map p[role=status]")
    for y in range(4, int(box["height"]), 8):  # until the pointer is near a document
        for x in range(4, int(box["width"]), 8):
            page.mouse.move(box["x"] + x, box["y"] + y)
            if news.inner_text():
                break
        if news.inner_text():
            break
    assert re.match(r"id \d+, .*, loss ", news.inner_text())
    page.mouse.down()
    page.mouse.up()
    page.get_by_role("dialog").locator(".excerpt").wait_for()


def test_the_page_of_an_unfinished_store_shows_its_progress(visit):
    visitor = visit(width=390)
    page = visitor.page
    visitor.go("#job")
    page.get_by_text("The job is complete").wait_for()
    page.locator("#output").select_option("1")
    page.get_by_text("The job's progress").wait_for()
    assert page.get_by_text(re.compile(r"44 of 60 documents")).is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_question_that_cannot_be_answered_and_a_server_that_ended_are_said(browser, made):
    with served(made) as (address, _):
        visitor = Visitor(browser, address)
        visitor.ask("the of " * 200)
        alert = visitor.page.locator(".problem:visible")
        alert.filter(has_text="shorten it").wait_for()
    visitor.ask()
    alert.filter(has_text="the server does not answer").wait_for()
    visitor.context.close()
