"""The queue of scans: order, bounds, cancel and time."""

import asyncio
import threading
from contextlib import aclosing

import pytest

from gradproj.errors import StoreError
from gradproj.serve.scans import QueueFull, ScanQueue


async def collect(queue, work):
    async with aclosing(queue.events(work)) as events:
        return [event async for event in events]


def answer(control):
    control.post({"event": "progress", "done": 1})
    return {"event": "answer"}


def test_events_come_in_order_and_the_answer_last():
    events = asyncio.run(collect(ScanQueue(1, 1, 60), answer))
    assert [event["event"] for event in events] == ["progress", "answer"]


def test_user_errors_are_events():
    def fail(control):
        raise StoreError("the store is gone")

    events = asyncio.run(collect(ScanQueue(1, 1, 60), fail))
    assert events == [{"event": "error", "message": "the store is gone"}]


def test_a_scan_over_the_time_limit_ends():
    def forever(control):
        while True:
            control.check()

    (event,) = asyncio.run(collect(ScanQueue(1, 1, 0.05), forever))
    assert "longer than --time_limit_s" in event["message"]


def test_scans_wait_for_a_place_and_more_than_may_wait_are_refused():
    async def run():
        queue, gate, started = ScanQueue(1, 1, 60), threading.Event(), threading.Event()

        def wait(control):
            started.set()
            gate.wait(60)
            return {"event": "answer", "who": "first"}

        first = asyncio.create_task(collect(queue, wait))
        while not started.is_set():
            await asyncio.sleep(0.01)
        second = asyncio.create_task(collect(queue, answer))
        await asyncio.sleep(0.05)
        assert queue.counts == {"running": 1, "waiting": 1}
        with pytest.raises(QueueFull):
            await collect(queue, answer)
        gate.set()
        events = await second
        assert (await first)[-1]["who"] == "first"
        assert events[0] == {"event": "queued", "ahead": 0, "running": 1, "waiting": 1}
        assert events[-1] == {"event": "answer"}
        assert queue.counts == {"running": 0, "waiting": 0}

    asyncio.run(run())


def test_one_that_leaves_its_place_lets_the_next_start_and_still_counts():
    async def run():
        queue, gate = ScanQueue(1, 1, 60), threading.Event()

        def leave(control):
            control.leave_place()
            control.leave_place()
            gate.wait(60)
            return {"event": "answer"}

        async def until(running):
            while queue.counts != {"running": running, "waiting": 0}:
                await asyncio.sleep(0.01)

        aside = asyncio.create_task(collect(queue, leave))
        await until(1)
        assert (await collect(queue, answer))[-1] == {"event": "answer"}
        await until(1)
        second = asyncio.create_task(collect(queue, leave))
        await until(2)
        with pytest.raises(QueueFull):
            await collect(queue, answer)
        gate.set()
        await asyncio.gather(aside, second)
        await until(0)
        assert (await collect(ScanQueue(1, 0, 60), answer))[-1] == {"event": "answer"}

    asyncio.run(run())


@pytest.mark.parametrize("waits", [False, True])
def test_a_closed_stream_ends_its_scan_and_frees_its_place(waits):
    async def run():
        queue, ended = ScanQueue(1, 4, 60), threading.Event()

        def until_cancelled(control):
            control.post({"event": "progress"})
            try:
                while True:
                    control.check()
            finally:
                ended.set()

        events = queue.events(until_cancelled)
        assert (await anext(events))["event"] == "progress"
        if waits:  # one that waits leaves the queue
            other = queue.events(answer)
            assert (await anext(other))["event"] == "queued"
            await other.aclose()
            assert queue.counts["waiting"] == 0
        await events.aclose()
        assert await asyncio.to_thread(ended.wait, 30)
        assert (await collect(queue, answer))[-1] == {"event": "answer"}

    asyncio.run(run())
