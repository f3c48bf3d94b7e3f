#!/usr/bin/python
"""Archive what a manager has on disk of its swarm, while its engine holds still."""

from __future__ import annotations

import os
import signal
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: swarm_state
short_description: Archive what a manager has on disk of its swarm, while its engine holds still
description:
  - The engine's files must not change while they are read. The way in Docker's manual is to stop the engine, which
    ends every container of the machine. Here its process is stopped by a signal for as long as the reading takes,
    usually well under a second; containers run on meanwhile, and the swarm waits for a manager three heartbeats
    (15 seconds). What was read is what a machine finds after a power cut, which Raft's log is made for.
  - Whatever happens to this module, the engine goes on after O(patience).
  - "The archive holds every secret of the swarm: it can be read by its owner alone."
options:
  dest:
    description: The archive (tar) to write.
    type: path
    required: true
  source:
    description: Where the engine keeps the swarm's state.
    type: path
    default: /var/lib/docker/swarm
  pid_file:
    description: Where the engine writes its process ID.
    type: path
    default: /var/run/docker.pid
  patience:
    description: Seconds for which the engine may hold still; then it goes on, and there is no archive.
    type: int
    default: 8
author:
  - claude-code-sse-api maintainers
"""

EXAMPLES = r"""
- name: Archive the swarm's state
  swarm_state:
    dest: /var/lib/claude-code-backup/swarm.tar
"""

RETURN = r"""
seconds:
  description: How long the engine held still.
  type: float
  returned: success
bytes:
  description: Size of the archive.
  type: int
  returned: success
"""


class TooSlowError(Exception):
    """The engine could not hold still for as long as it would have taken."""


@contextmanager
def held(pid: int, patience: int) -> Iterator[None]:
    """Stop a process for the block; it goes on after ``patience`` seconds even if this process is killed."""
    waker = os.fork()
    if waker == 0:
        os.setsid()
        time.sleep(patience)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        os._exit(0)
    try:
        os.kill(pid, signal.SIGSTOP)
        yield
        if os.waitpid(waker, os.WNOHANG)[0]:
            raise TooSlowError
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(waker, signal.SIGKILL)
            os.waitpid(waker, 0)


def archive(source: Path, dest: Path) -> None:
    """Write the files below ``source`` to ``dest``, readable for root alone."""
    descriptor = os.open(dest, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    os.fchmod(descriptor, 0o600)
    with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w") as made:
        made.add(source, arcname="swarm", filter=lambda entry: entry if entry.isfile() or entry.isdir() else None)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "dest": {"type": "path", "required": True},
            "source": {"type": "path", "default": "/var/lib/docker/swarm"},
            "pid_file": {"type": "path", "default": "/var/run/docker.pid"},
            "patience": {"type": "int", "default": 8},
        },
        supports_check_mode=True,
    )
    source, dest = Path(module.params["source"]), Path(module.params["dest"])
    if not (source / "raft").is_dir():
        module.fail_json(msg=f"There is no state of a swarm's manager in {source}: this machine manages none.")
    if module.check_mode:
        module.exit_json(changed=True, seconds=0, bytes=0)
    try:
        pid = int(Path(module.params["pid_file"]).read_text())
        started = time.monotonic()
        with held(pid, module.params["patience"]):
            archive(source, dest)
        seconds = time.monotonic() - started
    except TooSlowError:
        dest.unlink(missing_ok=True)
        module.fail_json(
            msg=f"Reading {source} took longer than the {module.params['patience']} seconds that the engine may hold "
            "still. Nothing was changed. See whether the disk is slow, and run this again."
        )
    except (OSError, ValueError) as error:
        dest.unlink(missing_ok=True)
        module.fail_json(msg=f"The swarm's state could not be archived: {error}")
    else:
        module.exit_json(changed=True, seconds=round(seconds, 3), bytes=dest.stat().st_size)


if __name__ == "__main__":
    main()
