"""``Explorer``: what the server needs to know of an output."""

from typing import Any, Protocol

from gradproj.serve.scans import Event, ScanControl


class Explorer(Protocol):
    """One output that is served. Its methods run in threads, several at once.

    Each returns JSON or raises a ``GradprojError`` whose message is shown.
    """

    title: str
    """A short name of the output, for people."""

    def facts(self) -> dict[str, Any]:
        """Return the choices that a question has: scores, layers, domains, and numbers of rows."""

    def answer(self, question: dict[str, Any], control: ScanControl) -> Event:
        """Answer a question, and post what is known meanwhile."""

    def jsonl(self, question: dict[str, Any], control: ScanControl) -> Event:
        """Answer with the lines of ``query --format jsonl``, in ``lines``."""

    def document(self, sample_id: int, start: int) -> dict[str, Any]:
        """Return a document's columns and a part of its text."""

    def overview(self, control: ScanControl) -> Event:
        """Return domains, distributions and outliers."""

    def document_map(self, control: ScanControl) -> Event:
        """Return places of sampled documents in a plane."""

    def status(self) -> dict[str, Any]:
        """Return the progress of the output's job."""
