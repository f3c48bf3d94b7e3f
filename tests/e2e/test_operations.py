"""The operator's verbs on one machine. What several machines show is in tests/cluster."""

import json
from pathlib import Path

from deployment import Deployment
from pool import Pool


def test_the_status_of_one_machine(pool: Pool, deployment: Deployment, tmp_path: Path) -> None:
    pool.wait_idle()
    shown = tmp_path / "status.json"
    run = deployment.verb("status", format="json", status_file=str(shown))
    assert (run.code, run.changed) == (0, 0), run.output
    state = json.loads(shown.read_text())
    assert state["well"]
    (node,) = state["nodes"]
    assert (node["role"], node["workspace"]) == ("leader", "directory")


def test_a_pool_shrinks_and_grows(pool: Pool, deployment: Deployment) -> None:
    for wanted in (pool.replicas - 1, pool.replicas):
        run = deployment.verb("scale", replicas=wanted)
        assert run.code == 0, run.output
        assert deployment.stack.services()["claude-api"]["Spec"]["Mode"]["Replicated"] == {
            "Replicas": wanted
        }
    run = deployment.verb("scale", replicas=pool.replicas)
    assert (run.code, run.changed) == (0, 0), run.output


def test_the_only_node_is_kept(pool: Pool, deployment: Deployment) -> None:
    run = deployment.verb("drain_node", node="localhost")
    assert run.code != 0
    assert "it is the last node with a gateway" in run.text


def test_a_pool_is_backed_up(pool: Pool, deployment: Deployment, tmp_path: Path) -> None:
    password = tmp_path / "password"
    backups = tmp_path / "backups"
    where = {"backup_dir": str(backups), "backup_password_file": str(password)}
    password.write_text("short")
    password.chmod(0o644)
    run = deployment.verb("backup", **where)
    assert "can be read by others, or has fewer than 16 characters" in run.text
    assert not backups.exists()
    password.write_text("a password of some length")
    password.chmod(0o600)
    run = deployment.verb("backup", **where)
    assert run.code == 0, run.output
    (made,) = backups.iterdir()
    kept = {path.name for path in made.iterdir()}
    assert {"manifest.json", "SHA256SUMS", "broker.tar", "swarm.tar.vault"} <= kept
    assert (made / "secrets.tar.vault").read_text().startswith("$ANSIBLE_VAULT;1.1;AES256")
    run = deployment.verb("restore", backup=str(made), **where)
    assert run.code != 0
    assert "has a swarm" in run.text
