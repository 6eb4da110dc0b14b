"""The chat template of a store's rows, kept in its output directory.

A resumed job is refused another one, and queries need neither ``--chat_template``'s file nor the
tokenizer's template of that day.
"""

from dataclasses import replace
from pathlib import Path

from gradproj.errors import OtherSettingsError
from gradproj.job.config import RunConfig
from gradproj.storage.publish import Publisher
from gradproj.store.layout import CHAT_TEMPLATE_NAME


def check_chat_template(output: Path, source: str | None) -> None:
    """Raise ``OtherSettingsError`` if a store's job had another template than ``source``."""
    kept = output / CHAT_TEMPLATE_NAME
    if source is not None and not kept.is_file():
        raise OtherSettingsError(
            f"cannot add to {output}: it was begun without a chat template, and its conversations "
            "are bad input. Give the tokenizer without one, or --output_dir a new path"
        )
    if kept.is_file() and kept.read_text("utf-8") != (source or ""):
        raise OtherSettingsError(
            f"cannot add to {output}: the tokenizer's chat template is not the one that it was "
            f"begun with. Give --chat_template {kept}, or --output_dir a new path"
        )


def keep_chat_template(output: Path, source: str | None, publisher: Publisher) -> None:
    """Write a job's template into its output directory."""
    kept = output / CHAT_TEMPLATE_NAME
    if source is None:
        kept.unlink(missing_ok=True)
    elif not kept.is_file() or kept.read_text("utf-8") != source:
        publisher.replace(kept, [source.encode()])


def with_kept_template(output: Path, run: RunConfig) -> RunConfig:
    """Return a job's settings with the template that its output directory keeps, if any."""
    kept = output / CHAT_TEMPLATE_NAME
    if not kept.is_file():
        return run
    return replace(run, rules=replace(run.rules, chat_template=str(kept)))
