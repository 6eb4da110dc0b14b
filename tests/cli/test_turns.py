"""Turns: short work before long, long work in the order in which it came, waits that end."""

import threading
import time

import pytest

from gradproj.cli.query.turns import Turns


def started(turns, names, place, done):
    """Start a thread that notes its name in its turn; return it once it waits."""
    n_waiting = len(turns._waiting)

    def run():
        with turns.turn(place):
            done.append(names)

    thread = threading.Thread(target=run)
    thread.start()
    while len(turns._waiting) == n_waiting:
        time.sleep(0.001)
    return thread


def test_short_work_comes_before_the_next_part_of_long_work_and_of_that_the_first():
    turns, done = Turns(), []
    first, second = turns.place(), turns.place()
    with turns.turn(first):
        threads = [
            started(turns, "second's part", second, done),
            started(turns, "first's next part", first, done),
            started(turns, "short", None, done),
            started(turns, "shorter", None, done),
        ]
    for thread in threads:
        thread.join(60)
    assert done == ["short", "shorter", "first's next part", "second's part"]


def test_long_work_that_has_waited_comes_before_short_work_that_came_later(monkeypatch):
    monkeypatch.setattr("gradproj.cli.query.turns.PATIENCE_S", 0.05)
    turns, done = Turns(), []
    long = turns.place()
    with turns.turn():
        threads = [started(turns, "long", long, done)]
        while turns._waiting != [(0, long[1])]:
            time.sleep(0.001)
        threads.append(started(turns, "short", None, done))
    for thread in threads:
        thread.join(60)
    assert done == ["long", "short"]


def test_a_wait_that_ends_leaves_the_queue():
    turns = Turns()

    def stop():
        raise KeyboardInterrupt

    def wait():
        with pytest.raises(KeyboardInterrupt), turns.turn(waits=stop):
            pass

    with turns.turn():
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(60)
    with turns.turn():
        assert not thread.is_alive()


def test_a_wait_ends_while_others_take_turn_after_turn():
    turns, ended = Turns(), threading.Event()

    def stop():
        raise KeyboardInterrupt

    def wait():
        with pytest.raises(KeyboardInterrupt), turns.turn(turns.place(), waits=stop):
            pass
        ended.set()

    thread = threading.Thread(target=wait)
    with turns.turn():
        thread.start()
        end = time.monotonic() + 20
        while not ended.is_set() and time.monotonic() < end:
            with turns._changed:  # what each end of a turn does
                turns._changed.notify_all()
            time.sleep(0.01)
        assert ended.is_set()
    thread.join(60)
