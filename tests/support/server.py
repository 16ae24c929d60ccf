"""A server on a socket of this machine, for the time of a test."""

import contextlib
import socket
import threading
import time

import uvicorn

from rookery.serve.wire import Wire


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(app, patience=30.0):
    """Address of the running application; `patience` is the time that a request may take to come in."""
    port = free_port()
    wire = type("Wire", (Wire,), {"patience": patience})
    config = uvicorn.Config(app, port=port, log_level="critical", access_log=False, http=wire, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
