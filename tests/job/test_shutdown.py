"""Signals at a start, and while the main thread is inside a library that runs no handler."""

import os
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as torch_dist
from helpers.models import make_model, small_model
from transformers import core_model_loading

from gradproj import GradProjLoraEngine
from gradproj.engine import reach, row_check
from gradproj.engine.reach import reached_layers
from gradproj.engine.selection import find_layers
from gradproj.errors import exit_code
from gradproj.job import shutdown
from gradproj.job.shutdown import StopRequest
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.loading import load_model


def test_second_signal_ends_a_process_that_waits_inside_a_library(monkeypatch):
    store = torch_dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    peer = torch_dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    ended_at = []

    def end(code):
        ended_at.append((code, handled()))
        peer.set("the peer", "is here")

    monkeypatch.setattr(shutdown, "SECOND_AFTER_S", 0.2)
    monkeypatch.setattr(shutdown.os, "_exit", end)
    handlers = [signal.getsignal(number) for number in shutdown.SIGNALS]
    stop, handled = StopRequest(), lambda: stop()
    stop.attend(None)
    stop.begin()
    stop.drain()

    def send_until_heard():
        for _ in range(100):  # a busy machine may deliver two of them together
            if not ended_at:
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGUSR1)

    sender = threading.Thread(target=send_until_heard)
    sender.start()
    try:
        # Waits in C++: no handler runs until it returns.
        store.wait(["the peer"], timedelta(seconds=60))
    finally:
        sender.join()
        stop.release()
    assert ended_at[0] == (128 + signal.SIGUSR1, False)
    assert stop.reason == "SIGUSR1"
    assert [signal.getsignal(number) for number in shutdown.SIGNALS] == handlers


def test_other_signals_of_a_program_count_as_no_stop(monkeypatch):
    ended = []
    monkeypatch.setattr(shutdown, "SECOND_AFTER_S", 0.1)
    monkeypatch.setattr(shutdown.os, "_exit", ended.append)
    previous = signal.signal(signal.SIGUSR2, lambda *_: None)
    stop = StopRequest()
    stop.release()  # nothing to restore
    stop.attend(None)
    stop.begin()
    stop.drain()
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    finally:
        stop.release()
        signal.signal(signal.SIGUSR2, previous)
    assert stop.reason == "SIGTERM"
    assert not ended


def load(folder):
    load_model(fetch(ModelConfig(model=str(make_model(folder)))), torch.device("cpu"))


def check(folder):
    GradProjLoraEngine(small_model("llama"), freeze_weights=True).attach()


def look_for_reached(folder):
    model = small_model("llama")
    reached_layers(model, find_layers(model, ["all"]), ["all"], 8)


@pytest.mark.parametrize(
    ("action", "module", "name"),
    [
        (load, core_model_loading, "set_param_for_module"),
        (check, row_check, "short_samples"),
        (look_for_reached, reach, "one_sequence_a_row"),
    ],
)
def test_signal_while_a_model_is_loaded_or_tried_is_no_failure_of_the_model(
    tmp_path, monkeypatch, capsys, action, module, name
):
    original = getattr(module, name)

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)
    stop = StopRequest().attend(None)
    stop.begin()
    try:
        assert exit_code(lambda: action(tmp_path)) == 128 + signal.SIGTERM
    finally:
        stop.release()
    assert "stopped by SIGTERM before the first unit" in capsys.readouterr().err
