"""The control connection of a running QEMU (QMP)."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from errors import MachineError

TIMEOUT = 10.0


def execute(path: Path, command: str, **arguments: object) -> Any:
    """Run one command of the monitor at a socket and return its answer."""
    # The path of a socket holds 107 bytes at most; a directory may lie deeper than that.
    directory = os.open(path.parent, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT)
            connection.connect(f"/proc/self/fd/{directory}/{path.name}")
            stream = connection.makefile("rw")
            stream.readline()  # the greeting
            for name, given in (("qmp_capabilities", {}), (command, arguments)):
                stream.write(json.dumps({"execute": name, "arguments": given}) + "\n")
                stream.flush()
                answer = _answer(stream.readline)
    except OSError as error:
        raise MachineError(f"The monitor at {path} does not answer: {error}.") from error
    finally:
        os.close(directory)
    return answer


def _answer(readline: Any) -> Any:
    """Read up to the answer of the last command; events come in between."""
    while line := readline():
        message = json.loads(line)
        if "error" in message:
            raise MachineError(f"QEMU refuses: {message['error']['desc']}.")
        if "return" in message:
            return message["return"]
    raise OSError("the connection was closed")
