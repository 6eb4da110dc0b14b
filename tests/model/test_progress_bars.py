"""The bars of transformers and huggingface_hub are hidden for a while."""

import pytest
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging as transformers_logging

from gradproj.model.checkpoint import no_progress_bars


@pytest.mark.parametrize("hub_shows", [True, False])
@pytest.mark.parametrize("transformers_shows", [True, False])
def test_progress_bars_are_hidden_and_restored(hub_shows, transformers_shows):
    def states():
        return transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()

    before = states()
    try:
        set_transformers = (
            transformers_logging.enable_progress_bar
            if transformers_shows
            else transformers_logging.disable_progress_bar
        )
        set_transformers()  # first, since it sets the hub's bars too
        (enable_progress_bars if hub_shows else disable_progress_bars)()
        wanted = states()
        with no_progress_bars():
            assert states() == (False, False)
        assert states() == wanted
    finally:
        (
            transformers_logging.enable_progress_bar
            if before[0]
            else transformers_logging.disable_progress_bar
        )()
        (enable_progress_bars if before[1] else disable_progress_bars)()
