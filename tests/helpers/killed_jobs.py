"""Jobs in this process that end at once after their first partial rows, and then continue."""

from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import flags, run_job

import gradproj.run
from gradproj.coordinator.partial_rows import PartialLog


class Killed(BaseException):
    """Ends a job at once."""


def run_killed_and_resumed(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Run a job on the CPU, end it after its first partial rows, and run it again to its end."""
    settings |= {"device": "cpu"}
    append = PartialLog.append

    def append_and_die(self: PartialLog, *args: Any) -> None:
        append(self, *args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(PartialLog, "append", append_and_die)
        with pytest.raises(Killed):
            gradproj.run.main(flags(**settings))
    assert list((Path(settings["output_dir"]) / "partial").rglob("*.safetensors"))
    run_job(**settings)
