"""Parts of the page in a browser, on answers that tests make: bash launch/test_browser.sh."""

import json

import pytest

pytest.importorskip("starlette")
pytest.importorskip("playwright")

from helpers.report_page import shared_job
from helpers.served import chromium, served
from helpers.visitor import Visitor

pytestmark = pytest.mark.browser

FAR_INSIDE = r"""async () => {
  const { DocumentText } = await import("/page/text.js");
  const whole = [...("\u{1f600}<b>".repeat(2) + "-".repeat(992)).repeat(120)];
  const part = (start) => whole.slice(start, start + 20000).join("");
  const tokens = [60000, 60004].map((start) =>
    ({ text: "\u{1f600}<", start, end: start + 2, part: start - 60001 }));
  const hit = { tokens, text_matches: [{ text: "\u{1f600}<b>\u{1f600}", tokens: 4 }] };
  const found = { text: part(0), n_characters: whole.length };
  const shown = new DocumentText(found, hit, async (start) => part(start));
  const texts = (wanted) => [...shown.text.querySelectorAll(wanted)].map((x) => x.textContent);
  const state = () => ({
    range: [shown.from, shown.to],
    is_the_text: shown.text.textContent === whole.slice(shown.from, shown.to).join(""),
    tokens: texts("[title]").join(""), marks: [...new Set(texts("mark"))],
    parsed: texts("b").length });
  await shown.begin();
  const states = [state()];
  for (const direction of [-1, 1, -1, -1, -1]) {
    await shown.extend(direction);
    states.push(state());
  }
  return [states, shown.earlier.hidden, shown.later.hidden];
}"""

OPENED = """async () => {
  const { Panel } = await import("/page/ask.js");
  const panel = new Panel([{ title: "x" }], {}, {});
  document.body.append(panel.element);
  const made = { end: "top", rank: 1, score: 1, recomputed_score: 1, layers: { h: 1 } };
  const hits = [0, 1].map((id) => ({ ...made, id, tokens: [{ text: "a", part: 1 }] }));
  panel.show(hits, false);
  panel.list.querySelectorAll("details")[1].open = true;
  panel.list.querySelectorAll("button")[3].focus();
  panel.show([...hits].reverse(), true);
  const focused = document.activeElement.getAttribute("aria-label");
  panel.element.remove();
  return [[...panel.list.querySelectorAll("details")].map((x) => x.open), focused];
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with served(shared_job(tmp_path_factory.getbasetemp() / "report").output) as (found, _):
        yield found


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def visit(browser, address):
    visitors = []

    def made(**options):
        visitors.append(Visitor(browser, address, **options))
        return visitors[-1]

    yield made
    for visitor in visitors:
        visitor.close()


def changed(page, path, change):
    """Let the page see what ``change`` makes of the server's JSON."""

    def answer(route):
        response = route.fetch()
        route.fulfill(response=response, json=change(response.json()))

    page.route(path, answer)


def test_a_document_in_other_words_than_its_tokens_shows_them_apart(visit):
    page = (visitor := visit()).page
    changed(page, "**/documents/*", lambda found: {**found, "text": "\U0001f600" + found["text"]})
    visitor.ask()
    visitor.wait_for_answer()
    page.locator(".hit").first.get_by_role("button", name="Open").click()
    page.get_by_role("heading", name="as the model reads them").wait_for()
    text, row = page.get_by_role("dialog").locator(".excerpt").all()
    assert text.locator("span[title]").count() == 0 < row.locator("span[title]").count()


def test_the_text_around_tokens_far_inside_a_document_grows_both_ways(visit):
    states, has_no_earlier, has_no_later = visit().page.evaluate(FAR_INSIDE)
    ranges = [state.pop("range") for state in states]
    assert ranges[0] == [59_700, 60_306]
    assert ranges[-1] == [0, 79_700]
    assert (has_no_earlier, has_no_later) == (True, False)
    smile = "\U0001f600"
    for state in states:
        assert state == {
            "is_the_text": True, "tokens": f"{smile}<{smile}<",
            "marks": [f"{smile}<b>{smile}"], "parsed": 0,
        }  # fmt: skip


def test_what_the_reader_opened_stays_open_and_keeps_the_focus(visit):
    assert visit().page.evaluate(OPENED) == [[True, False], "Ask with document 1"]


def test_an_error_in_the_fields_words_leaves_the_documents_so_far(visit):
    page = (visitor := visit()).page
    hit = {"id": 3, "end": "top", "rank": 1, "score": 1.0, "domain": None, "loss": 1, "key": "k"}
    events = [
        {"event": "partial", "hits": [hit]},
        {"event": "error", "message": "the --layers are gone, and --top_k"},
    ]
    body = "".join(json.dumps(event) + "\n" for event in events)
    page.route("**/api/query", lambda route: route.fulfill(body=body))
    visitor.ask()
    page.get_by_text("did not come to its end: these are the documents so far").wait_for()
    assert page.locator(".problem:visible").inner_text() == "the Layers are gone, and Highest"
    assert page.locator(".hit").count() == 1


def test_the_form_offers_what_can_be_answered(visit):
    page = (visitor := visit()).page
    kinds = page.get_by_label("Ask with").locator("option")
    assert "Chat turns" in kinds.all_text_contents()
    changed(
        page, "**/api/outputs",
        lambda found: {"outputs": [{**x, "takes_chat": False} for x in found["outputs"]]},
    )  # fmt: skip
    visitor.go("?2")
    assert kinds.all_text_contents() == ["Text", "Prompt and completion"]
    page.get_by_label("Highest").fill("0")
    page.get_by_label("Lowest").fill("0")
    visitor.ask()
    page.get_by_text("Highest and Lowest are both 0").wait_for()


def test_one_finger_scrolls_past_the_map_and_two_zoom_it(visit):
    visitor = visit(width=390, has_touch=True)
    page = visitor.page
    visitor.go("#map")
    canvas = page.locator("canvas")
    canvas.scroll_into_view_if_needed()
    box, pixels = canvas.bounding_box(), "e => e.toDataURL()"
    session = visitor.context.new_cdp_session(page)

    def touch(*steps):
        """Put fingers at places of the map, move them, and lift them."""
        for kind, step in zip(["touchStart", *["touchMove"] * 9, "touchEnd"], steps, strict=False):
            points = [
                {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"], "id": n}
                for n, (x, y) in enumerate(step)
            ]
            event = {"type": kind, "touchPoints": points}
            session.send("Input.dispatchTouchEvent", event)
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        page.wait_for_timeout(200)

    before, top = canvas.evaluate(pixels), page.evaluate("scrollY")
    touch(*[[(0.5, 0.8 - 0.06 * n)] for n in range(9)])
    assert page.evaluate("scrollY") != top
    assert canvas.evaluate(pixels) == before
    box = canvas.bounding_box()
    touch(*[[(0.5 - 0.03 * n, 0.5), (0.5 + 0.03 * n, 0.5)] for n in range(1, 9)])
    assert canvas.evaluate(pixels) != before
