"""Outputs served in a thread of this process, and a browser at them."""

import socket
import threading
import time
from contextlib import contextmanager

from gradproj.cli.serve.command import ServeConfig, explorers_of
from gradproj.serve.app import Access, Server
from gradproj.serve.scans import ScanQueue


@contextmanager
def served(*outputs, access=None, **flags):
    """Serve outputs; yield the address and the queue of scans."""
    others = tuple(map(str, outputs[1:]))
    config = ServeConfig(output=str(outputs[0]), others=others, device="cpu", **flags)
    queue = ScanQueue(config.max_scans, config.max_queue, config.time_limit_s)
    app = Server(explorers_of(config), queue).app(Access(**(access or {})))
    with running(app) as port:
        yield f"http://127.0.0.1:{port}/", queue


@contextmanager
def running(app):
    """Run an ASGI application as the command does; yield its port."""
    import uvicorn

    from gradproj.cli.serve import connections

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(connections.settings(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


@contextmanager
def chromium():
    """Start a headless Chromium: playwright's own, or the system's."""
    from helpers.report_page import browser
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        flags = {"args": ["--no-sandbox"]}
        try:
            started = playwright.chromium.launch(**flags)
        except Error:
            started = playwright.chromium.launch(executable_path=browser(), **flags)
        yield started
        started.close()
