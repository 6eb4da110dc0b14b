"""Changes of transformers' global state end with the context that made them."""

import threading

import pytest
import torch
from transformers import masking_utils

from gradproj.kernels.transformers_patches import one_sequence_a_row


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


def test_function_wrapped_by_another_library_does_not_recurse(monkeypatch):
    original, position_ids = find_function(), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with one_sequence_a_row():
        ours = find_function()
        monkeypatch.setattr(masking_utils, original.__name__, lambda x: ours(x))
    for _ in range(2):
        with one_sequence_a_row():
            assert find_function()(position_ids) is None
        assert torch.equal(find_function()(position_ids), original(position_ids))
    monkeypatch.undo()  # the wrapper is removed, and leaves ours
    with one_sequence_a_row():
        assert find_function() is ours
    assert find_function() is original


def test_function_is_restored_after_an_error_and_across_threads():
    original, entered, leave = find_function(), threading.Event(), threading.Event()

    def other_thread():
        with one_sequence_a_row():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other_thread)
    thread.start()
    entered.wait(30)
    with pytest.raises(KeyError), one_sequence_a_row():
        raise KeyError
    assert find_function() is not original  # the other thread still needs it
    leave.set()
    thread.join()
    assert find_function() is original
