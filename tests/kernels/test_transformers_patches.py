"""Changes of transformers' global state end with the context that made them."""

import threading

import pytest
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers import masking_utils
from transformers.utils import logging as transformers_logging

from gradproj.kernels.transformers_patches import no_progress_bars, one_sequence_a_row


def find_function():
    return masking_utils.find_packed_sequence_indices


def test_function_is_restored_when_the_last_context_ends():
    original = find_function()
    with one_sequence_a_row():
        replaced = find_function()
        assert replaced is not original
        with one_sequence_a_row():
            assert find_function() is replaced
        assert find_function() is replaced
    assert find_function() is original


def test_function_is_restored_after_an_error_and_across_threads():
    original, entered, leave = find_function(), threading.Event(), threading.Event()

    def other_thread():
        with one_sequence_a_row():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other_thread)
    with pytest.raises(KeyError), one_sequence_a_row():
        thread.start()
        entered.wait(30)
        raise KeyError
    assert find_function() is not original  # the other thread still needs it
    leave.set()
    thread.join()
    assert find_function() is original


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
