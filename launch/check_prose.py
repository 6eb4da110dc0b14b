"""Rejects wording that a reader has to read twice: ``python launch/check_prose.py [PATH ...]``.

Without paths it checks all Python files, shell scripts and READMEs of the checkout. It prints a
line for each finding and exits with 1 if there is one.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_COLUMNS = 100
SUFFIXES = {".py", ".sh", ".sbatch", ".md", ".html", ".toml"}
# The log quotes what earlier versions said.
EXEMPT = {"launch/check_prose.py", "tests/bench/LOG.md"}

RIDDLES = re.compile(r"(What|Who|Whoever|Where|As|The same|Whether a|How|Laws of)\b")
"""Openings of a docstring that announce a subject and do not name it."""

IDIOMS = {
    r"\b(is|are|was|be|been) (said|told)\b": "print, report or name it",
    r"\bheld against\b": "compared with",
    r"\btaken for\b": "treated as, mistaken for",
    r"\b[Ww]hoever\b": "the process, the caller",
    r"\bmend(s|ed|ing)?\b": "fix, repair",
    r"\banew\b": "again, from scratch",
    r"\basked for by\b": "requested by",
    r"\b[Ll]aws of\b": "name what is tested",
}
"""Pattern -> the plain word."""


def checked_files() -> list[Path]:
    """Return the tracked files whose wording is checked."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = [name for name in listed.stdout.splitlines() if name not in EXEMPT]
    return [ROOT / name for name in names if Path(name).suffix in SUFFIXES]


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of each docstring, those of attributes included."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", [])
        for statement in body if isinstance(body, list) else []:
            value = getattr(statement, "value", None)
            if not (isinstance(statement, ast.Expr) and isinstance(value, ast.Constant)):
                continue
            if isinstance(value.value, str):
                yield statement.lineno, value.value.lstrip()


def findings(path: Path) -> Iterator[str]:
    """Yield one line for each finding in a file."""
    name, text = path.relative_to(ROOT), path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, better in IDIOMS.items():
            if match := re.search(pattern, line):
                yield f"{name}:{number}: {match[0]!r}: {better}"
        is_table = path.suffix == ".md" and line.startswith("|")
        # Ruff checks the length of Python lines.
        if len(line) > MAX_COLUMNS and path.suffix in {".md", ".sh", ".sbatch"} and not is_table:
            yield f"{name}:{number}: {len(line)} columns, at most {MAX_COLUMNS}"
    if path.suffix == ".py":
        for number, docstring in docstrings(text):
            if match := RIDDLES.match(docstring):
                yield f"{name}:{number}: docstring begins with {match[0]!r}; use a verb or a noun"


def main(arguments: list[str]) -> int:
    """Check the given files, or all; return the exit code."""
    paths = [Path(argument).resolve() for argument in arguments] or checked_files()
    lines = [line for path in paths for line in findings(path)]
    print("\n".join(lines) if lines else f"{len(paths)} files: wording is plain")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
