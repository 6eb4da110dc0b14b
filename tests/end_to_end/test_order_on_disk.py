"""A real process flushes each file before publishing it, and its folder before the next one."""

import json
import re
import shutil
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.corpora import make_corpus, mixed_documents
from helpers.forked_ranks import Ranks
from helpers.jobs import ENVIRONMENT, PATIENCE_S, SMALL_JOB, flags, job_command

N_UNITS = 3
SETTINGS = SMALL_JOB | {"rows_per_shard": 16, "proj_save_interval": 1}


@dataclass
class Event:
    """A flush or a publication."""

    thread: int
    what: str
    """``flush`` or ``publish``."""
    old: str
    path: str
    """The flushed path, or the new name."""
    content: dict[str, object]
    """Old name of each file concerned -> a value that changes with its content."""

    def renamed(self, file):
        return self.path + file.removeprefix(self.old)


def events_of_a_rank_with_its_os_interposed(tmp_path, settings):
    log = tmp_path / "changes"
    with Ranks(tmp_path) as ranks:
        ranks.start(["gradproj.run", *flags(device="cpu", **settings)], changes=str(log))
        (ended,) = ranks.wait_for_all()
    assert ended.status == 0, ended.output
    return [Event(*json.loads(line)) for line in log.read_text().splitlines()]


STRACE = ["strace", "-f", "-y", "--seccomp-bpf"]
CALLS = "write,pwrite64,writev,ftruncate,fsync,fdatasync,link,linkat,rename,renameat,renameat2"


def events_by_strace(tmp_path, settings):
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    tried = subprocess.run([*STRACE, "-o", "/dev/null", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"strace does not work here: {tried.stderr.strip()}")
    log = tmp_path / "strace"
    command = [
        *STRACE,
        "-e",
        f"trace={CALLS}",
        "-s",
        "0",
        "-o",
        str(log),
        *job_command(1, **settings),
    ]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=PATIENCE_S)
    return list(events_in(whole_lines(log.read_text().splitlines())))


def whole_lines(lines):
    """Join calls that strace prints in two parts because another thread's came in between."""
    begun = {}
    for line in lines:
        thread, call = line.split(maxsplit=1)
        if call.endswith("<unfinished ...>"):
            begun[thread] = call.removesuffix("<unfinished ...>")
            continue
        call = re.sub(r"^<\.\.\. \w+ resumed>", lambda _, thread=thread: begun.pop(thread), call)
        yield int(thread), call


def events_in(calls):
    writes = defaultdict(int)
    for thread, call in calls:
        match = re.match(r"(\w+)\((.*)\)\s*= (-?\d+)", call)
        if match is None or int(match[3]) < 0:
            continue
        name, arguments = match[1], match[2]
        if name in ("fsync", "fdatasync"):
            path = re.match(r"\d+<(.*?)>", arguments)[1]
            yield Event(thread, "flush", path, path, {path: writes[path]} if path in writes else {})
        elif "link" in name or "rename" in name:
            old, new = re.findall(r'"(.*?)"', arguments)
            inside = {
                path: n for path, n in writes.items() if path == old or path.startswith(f"{old}/")
            }
            event = Event(thread, "publish", old, new, inside)
            writes.update({event.renamed(path): n for path, n in inside.items()})
            yield event
        elif found := re.match(r"\d+<(/.*?)>", arguments):
            writes[found[1]] += 1


EVENTS = {"interposed": events_of_a_rank_with_its_os_interposed, "strace": events_by_strace}


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("small") / "tars", mixed_documents(48))


@pytest.mark.parametrize("seen", EVENTS)
def test_every_publication_is_flushed_before_the_next(tmp_path, small_corpus, model_dir, seen):
    output = tmp_path / "out"
    settings = {"shards": small_corpus, "model": model_dir, "output_dir": output, **SETTINGS}
    events = EVENTS[seen](tmp_path, settings)
    published = publications(events, output)
    assert_all_is_there(published)
    assert_contents_are_flushed_before(events, output)
    for thread in {event.thread for event in events}:
        assert_folders_are_flushed_between([e for e in events if e.thread == thread], output)
    for unit in range(N_UNITS):
        shard, record = f"projections.zarr/projections/c.{unit}.0", f"units/{unit:08d}.safetensors"
        assert published.index(shard) < published.index(record)


def is_final(event, output):
    """Return whether a publication is outside scratch directories and no heartbeat."""
    inside = Path(event.path).is_relative_to(output)
    return (
        event.what == "publish"
        and inside
        and Path(event.path).relative_to(output).parts[0] not in NOT_FINAL
    )


NOT_FINAL = ("tmp", "heartbeats")


def publications(events, output):
    return [
        str(Path(event.path).relative_to(output)) for event in events if is_final(event, output)
    ]


def assert_all_is_there(published):
    for pattern in (
        "corpus.json",
        "projections.zarr",
        "metadata.json",
        "run_config.json",
        "projection_stats.json",
        r"claims/\d+\.0",
        r"claims/merge\.\d",
        r"partial/\d+/.*\.safetensors",
        r"projections.zarr/(loss|status|key)/c\.0.*",
        "projections.zarr/token_covariance_a",
        "projections.zarr/zarr.json",
    ):
        assert [name for name in published if re.fullmatch(pattern, name)], (
            f"no {pattern} in {published}"
        )


def assert_contents_are_flushed_before(events, output):
    flushed = {}
    for event in events:
        if event.what == "flush":
            flushed |= event.content
            continue
        flushed |= {event.renamed(path): flushed.get(path) for path in event.content}
        if is_final(event, output):
            assert event.content, f"nothing was written that became {event.path}"
            late = [path for path, content in event.content.items() if flushed.get(path) != content]
            assert late == [], f"{event.path} was published with data that was not flushed"


def assert_folders_are_flushed_between(events, output):
    waiting = None
    for event in events:
        if event.what == "flush" and waiting == event.path:
            waiting = None
        elif is_final(event, output):
            assert waiting is None, f"{event.path} was published before {waiting} was flushed"
            waiting = str(Path(event.path).parent)
    assert waiting is None
