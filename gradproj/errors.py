"""Errors that a user can act on: one clear message, exit code 2, no traceback."""

import sys
from collections.abc import Callable

from gradproj.formatting import clean_lines


class GradprojError(Exception):
    """A mistake that the user can mend; the message names what is wrong, where, and the way out."""

    exit_code = 2


class ConfigError(GradprojError):
    """A flag or a key of the config file has a value that cannot be used."""


class CorpusError(GradprojError):
    """The input data, a tar or the corpus index is not what it has to be."""


class ModelError(GradprojError):
    """The model or the tokenizer cannot be loaded, or has no layer of the kind asked for."""


class StoreError(GradprojError):
    """An output folder or a store cannot be written, read, or continued with these settings."""


class OtherSettingsError(StoreError):
    """A store was made with other settings than this run's; nothing is wrong with the store."""


class ReportedError(GradprojError):
    """Rank 0 has said what is wrong; this rank ends without a word."""


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command; a user's mistake becomes one message on standard error and exit code 2."""
    try:
        return command() or 0
    except ReportedError as error:
        return error.exit_code
    except GradprojError as error:
        # It may name what a stranger called a domain, a layer or a file.
        print(f"gradproj: {clean_lines(str(error))}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("gradproj: stopped", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; that is no failure.
        sys.stderr.close()
        return 0
