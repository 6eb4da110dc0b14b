"""Errors that a user can act on: one clear message, exit code 2, no traceback."""


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
