"""Runs playbooks as an operator does."""

import json
import os
import subprocess
from pathlib import Path

from cluster import Cluster

ROOT = Path(__file__).resolve().parent.parent.parent


def playbook(
    cluster: Cluster, path: str, *options: str, **given: object
) -> subprocess.CompletedProcess[str]:
    """Run a playbook with variables, and return how it ended and what it printed."""
    inventory = f"--inventory={cluster.inventory}"
    return subprocess.run(
        ["ansible-playbook", inventory, path, *options, "--extra-vars", json.dumps(given)],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_FORCE_COLOR": "false"},
        capture_output=True,
        text=True,
        check=False,
    )


def done(cluster: Cluster, verb: str, **given: object) -> str:
    """Run a verb that must work; returns what it prints, in one line."""
    run = playbook(cluster, f"playbooks/{verb}.yml", **given)
    assert run.returncode == 0, run.stdout + run.stderr
    return " ".join(run.stdout.split())


def checked(cluster: Cluster, verb: str, **given: object) -> None:
    """Let a verb say what it would do; it must do nothing."""
    before = _state(cluster)
    run = playbook(cluster, f"playbooks/{verb}.yml", "--check", **given)
    assert run.returncode == 0, run.stdout + run.stderr
    assert _state(cluster) == before


def said(cluster: Cluster, verb: str, **given: object) -> str:
    """Run a verb that does not end well; returns what it prints, in one line."""
    run = playbook(cluster, f"playbooks/{verb}.yml", **given)
    assert run.returncode != 0, run.stdout
    return " ".join(run.stdout.split())


def refused(cluster: Cluster, verb: str, **given: object) -> str:
    """Run a verb that must end with a refusal; returns what it prints, in one line."""
    before = _state(cluster)
    shown = said(cluster, verb, **given)
    assert _state(cluster) == before
    return shown


def changes(shown: str) -> int:
    """Return how many tasks of a run changed something."""
    recap = shown[shown.index("PLAY RECAP") :]
    return sum(int(word.removeprefix("changed=")) for word in recap.split() if "changed=" in word)


def _state(cluster: Cluster) -> list[object]:
    """Return what the swarm is to be: what runs at a moment, and who leads, is another matter."""
    nodes = [
        (node["ID"], node["Availability"], node["ManagerStatus"] != "")
        for node in cluster.lines("node", "ls")
    ]
    services = [
        (service["ID"], service["Image"], service["Replicas"].partition("/")[2])
        for service in cluster.lines("service", "ls")
    ]
    return [nodes, services]
