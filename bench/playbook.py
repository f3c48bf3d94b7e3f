"""Runs a playbook of the project and says how long it took."""

import os
import subprocess
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def play(playbook: str, *options: str) -> tuple[float, str]:
    """Run a playbook; return its seconds and what it printed. One that fails ends the program."""
    started = time.monotonic()
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), *options, playbook],
        cwd=PROJECT,
        env=os.environ | {"ANSIBLE_NOCOLOR": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(done.stdout)
    return time.monotonic() - started, done.stdout
