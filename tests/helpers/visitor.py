"""A visitor of the page of `gradproj serve`, in a browser."""

import re

QUESTION = "the of and"


class Visitor:
    """A page that notes what it should not do."""

    def __init__(self, browser, address, width=1280, scheme="light", **options):
        size = {"width": width, "height": 900}
        self.context = browser.new_context(viewport=size, color_scheme=scheme, **options)
        self.page, self.address, self.problems = self.context.new_page(), address, []
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("console", self._note)
        self.page.on("dialog", lambda dialog: self.problems.append("a dialog was opened"))
        self.page.on("request", self._check)
        self.go("")

    def _note(self, message):
        if message.type in ("error", "warning"):
            self.problems.append(f"console: {message.text}")

    def _check(self, request):
        if not request.url.startswith((self.address, "blob:", "data:")):
            self.problems.append(f"request to {request.url}")

    def go(self, hash):
        self.page.goto(self.address + hash)
        self.page.wait_for_selector("body[data-ready]")

    def ask(self, text=QUESTION, panel=0):
        place = self.page.locator("form").nth(panel)
        place.get_by_label("Text", exact=True).fill(text)
        place.get_by_role("button", name="Ask", exact=True).click()

    def wait_for_answer(self, panel=0):
        news = self.page.locator(".news").nth(panel)
        news.filter(has_text=re.compile(r"\d documents?\.")).wait_for(timeout=120_000)

    def scores(self, panel=0):
        found = self.page.locator("section[aria-label='Question and answer']").nth(panel)
        return found.locator(".score").all_inner_texts()

    def close(self):
        self.context.close()
        assert self.problems == []
