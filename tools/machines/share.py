"""Shows a directory to the machines: QEMU runs this for each connection, which is its standard input."""

import shlex
import socket
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler


def command(directory: str) -> str:
    """Return the command for QEMU, as part of an option's value."""
    # In such a value a comma stands for itself when it is doubled.
    return shlex.join([sys.executable, __file__, directory]).replace(",", ",,")


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: standard error is the connection, too."""


if __name__ == "__main__":
    connection = socket.socket(fileno=0)
    partial(_Handler, directory=sys.argv[1])(connection, ("", 0), None)
    connection.shutdown(socket.SHUT_RDWR)
