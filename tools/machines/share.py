"""Shows a directory to the machines by HTTP.

QEMU runs this for each connection, which is its standard input, output and error.
"""

import os
import shlex
import socket
import sys
from contextlib import redirect_stderr
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path


def command(directory: str) -> str:
    """Return the command for QEMU, as part of an option's value."""
    # In such a value a comma stands for itself when it is doubled.
    return shlex.join([sys.executable, __file__, directory]).replace(",", ",,")


def main(directory: str) -> None:
    """Answer what one connection asks for."""
    handler = partial(SimpleHTTPRequestHandler, directory=directory)
    server = HTTPServer(("", 0), handler, bind_and_activate=False)
    # The log of requests would be part of the answer.
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        server.process_request(socket.socket(fileno=0), ("machine", 0))


if __name__ == "__main__":
    main(sys.argv[1])
