"""User errors: one clear message, exit code 2, no traceback."""

import io
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradproj.formatting import clean_lines


class GradprojError(Exception):
    """An error that the user can fix. The message names what is wrong, where, and the way out."""

    exit_code = 2


class ConfigError(GradprojError):
    """A flag or a key of the config file has an unusable value."""


class CorpusError(GradprojError):
    """The input data, a tar or the corpus index is missing, damaged or inconsistent."""


class ModelError(GradprojError):
    """The model or tokenizer cannot be loaded, or has no layer that was requested."""


class MixedSamplesError(ModelError):
    """A layer's positions belong to no known samples of a batch."""


class StaleBatchError(ModelError):
    """A backward pass runs through a forward pass that was not the last one."""


class StoreError(GradprojError):
    """An output directory or store cannot be written, read, or continued with these settings."""


class DamagedFile(StoreError):
    """A file of a store is not as it was written, or cannot be read by this gradproj."""

    def __init__(self, path: str | Path, problem: str, way_out: str) -> None:
        super().__init__(path, problem, way_out)
        self.path = Path(path) if isinstance(path, str) else path
        self.problem = problem
        """The message without the path and the way out: "is damaged: it is empty"."""
        self.way_out = way_out

    def __str__(self) -> str:
        return f"{self.path} {self.problem}. {self.way_out}"


class OtherSettingsError(StoreError):
    """A store was made with settings other than this run's. The store itself is sound."""


class RanksError(GradprojError):
    """Another rank of this start does not come, or does not answer."""


class ReportedError(GradprojError):
    """Rank 0 has reported the error; this rank exits silently."""

    def __init__(self, exit_code: int = 2) -> None:
        super().__init__()
        self.exit_code = exit_code


class Ended(BaseException):
    """This process has to end, through no fault of what it was doing. Without a message: reported.

    No ``Exception``, like ``KeyboardInterrupt``: code that tries what a model can do catches all of
    those, and a job that is preempted while it loads a model has not failed.
    """

    def __init__(self, message: str = "", exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(Ended):
    """A signal came before there was anything to save."""

    def __init__(self, number: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} before the first unit; run the same command "
            "to continue",
            128 + number,
        )


def damaged(path: str | Path, what: str) -> DamagedFile:
    """Return the error for a file of a store that is not as it was written."""
    way_out = "Run `python -m gradproj verify` on the output to see all damage"
    return DamagedFile(path, f"is damaged: {what}", way_out)


def settings_mismatch(
    what: str,
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    way_out: str,
    *,
    labels: tuple[str, str] = ("store", "this run"),
    show: Callable[[Any], str] = repr,
) -> str:
    """Return a message that lists every setting of ``ours`` that differs; empty if none does.

    Args:
        what: the first line: what cannot be done and why.
        theirs: recorded setting -> value; a missing setting counts as None.
        ours: setting -> value wanted now. Keys of ``theirs`` alone are not compared.
        way_out: the last line: what the user can do.
        labels: names of the two sides.
        show: formats a value.
    """
    lines = [
        f"  {name}: {labels[0]} {show(theirs.get(name))}, {labels[1]} {show(value)}"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    return "\n".join([what, *lines, way_out]) if lines else ""


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code. A user error is printed as one message; its code is
    2.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            # A screen that is not UTF-8 shows \u2026 for a character that it lacks.
            stream.reconfigure(errors="backslashreplace")
    try:
        return command() or 0
    except ReportedError as error:
        return error.exit_code
    except GradprojError as error:
        # The message may contain untrusted names of domains, layers or files.
        print(f"gradproj: {clean_lines(str(error))}", file=sys.stderr, flush=True)
        return error.exit_code
    except Ended as end:
        if str(end):
            print(f"gradproj: {end}", file=sys.stderr, flush=True)
        return end.exit_code
    except KeyboardInterrupt:
        print("gradproj: stopped", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        # The reader of the output (head, less) has gone, which is no failure.
        sys.stderr.close()
        return 0
