"""Shows a directory to the machines by HTTP.

QEMU runs this for each connection, which is its standard input, output and error. Beside a machine
that is a process it runs as a server of its own.
"""

import os
import shlex
import socket
import sys
import threading
import time
from contextlib import redirect_stderr
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# Seconds that the server of a machine that lost its power a moment ago may still hold the port.
PREDECESSOR = 10


def command(directory: str) -> str:
    """Return the command for QEMU, as part of an option's value."""
    # In such a value a comma stands for itself when it is doubled.
    return shlex.join([sys.executable, __file__, directory]).replace(",", ",,")


def serve(directory: str, port: int, alive: int) -> None:
    """Serve at a port of the loopback until the pipe `alive` has nobody left who writes."""
    handler = partial(SimpleHTTPRequestHandler, directory=directory)
    give_up = time.monotonic() + PREDECESSOR
    while True:
        try:
            server = ThreadingHTTPServer(("127.0.0.1", port), handler)
            break
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.read(alive, 1)


def answer(directory: str) -> None:
    """Answer what one connection asks for."""
    handler = partial(SimpleHTTPRequestHandler, directory=directory)
    server = HTTPServer(("", 0), handler, bind_and_activate=False)
    # The log of requests would be part of the answer.
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        server.process_request(socket.socket(fileno=0), ("machine", 0))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        answer(sys.argv[1])
