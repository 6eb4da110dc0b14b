"""Chooses how a process publishes into an output: on disk, or in a bucket."""

from pathlib import Path

from gradproj.coordinator.commits import Commits
from gradproj.coordinator.file_commits import FileCommits
from gradproj.coordinator.object_commits import ObjectCommits
from gradproj.coordinator.process_id import Owner
from gradproj.storage.object_path import ObjectPath


def commits_of(output: Path, owner: Owner) -> Commits:
    """Return the implementation for an output's place. Nothing is written yet."""
    return (ObjectCommits if isinstance(output, ObjectPath) else FileCommits)(output, owner)
