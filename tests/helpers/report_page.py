"""A job over hostile documents, a strict parser of its report, and a browser to open it."""

import functools
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

from helpers.corpora import mixed_documents, write_tar
from helpers.jobs import run_job
from helpers.models import make_model

from gradproj.__main__ import main

SCRIPT = "<script>document.title='owned'</script>"
HOSTILE_TEXTS = [
    f"{SCRIPT} and then some",
    "</style></title></svg></td><img src=x onerror=\"document.title='owned'\"> text",
    "\" onmouseover=\"document.title='owned'\" ' & &lt;b&gt; {{ 7 * 7 }} {% raw %}",
    "controls \x00\x07\x1b[31m and \u202eoverride\u2066 and \ud800 alone \x85 here",
    "one long line " + "x" * 1_000_000,
    "مرحبا بالعالم هذا نص طويل من اليمين",
    "z\u0300\u0301\u0302\u0303\u0304\u0305\u0306\u0307\u0308" * 40,
]
HOSTILE_DOMAIN = f"</text>{SCRIPT}\u202e\"'"
HOSTILE_KEY = "<script>alert(1)</script>\"'&"
N_DOCUMENTS = 60


def documents() -> list[dict]:
    made = mixed_documents(N_DOCUMENTS)
    for number, text in enumerate(HOSTILE_TEXTS):
        made[number]["text"] = text
    made[0]["meta"]["pile_set_name"] = made[9]["meta"]["pile_set_name"] = HOSTILE_DOMAIN
    made[20]["text"] = ""
    return made


def make_job(root: Path) -> SimpleNamespace:
    """Run a job over hostile documents: ``output``, ``tars``, ``model``."""
    root.mkdir()
    tars, model = root / "tars", make_model(root / "model", "gpt2")
    tars.mkdir()
    members = [
        (f"{HOSTILE_KEY if i == 1 else f'{i:06d}'}.json", json.dumps(document).encode())
        for i, document in enumerate(documents())
    ]
    write_tar(tars / "a.tar", members)
    settings = {"proj_rank_total": 16, "proj_rank_min": 4, "max_length": 48, "rows_per_shard": 16}
    run_job(1, shards=tars, model=model, output_dir=root / "out", **settings)
    return SimpleNamespace(output=root / "out", tars=tars, model=model)


QUERIES = [
    {"id": f"first {SCRIPT}\u202e", "text": f"the of {SCRIPT}"},
    {"id": "second", "prompt": "it was for", "completion": "on are </style>"},
]


@functools.cache
def shared_job(root: Path) -> SimpleNamespace:
    """Return the job with its ``queries`` and ``page``, shared by all tests. Read only."""
    job = make_job(root)
    job.queries, job.page = root / "q.jsonl", root / "report.html"
    job.queries.write_text("".join(json.dumps(query) + "\n" for query in QUERIES))
    flags = [
        "--queries",
        str(job.queries),
        "--page",
        str(job.page),
        "--top_k",
        "60",
        "--device",
        "cpu",
    ]
    assert main(["report", str(job.output), *flags]) == 0
    return job


VOID = {"meta", "br", "hr", "img", "link", "input", "base", "col", "wbr"}


class StrictPage(HTMLParser):
    """Collects tags, attributes and text; checks that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.css = ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice: {attrs}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.css += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def browser() -> str | None:
    """Return the name of a Chromium, if one is installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


def browse(page: Path, folder: Path, *flags: str, width: int = 1366, height: int = 2000) -> str:
    """Open the page in a headless browser. Returns its standard output."""
    command = [
        str(browser()),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},{height}",
        *flags,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode("utf-8")
