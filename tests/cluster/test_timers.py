"""The timers of a machine that runs Ansible: here one of the nodes, with Ansible of its system."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from testinfra.host import Host

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = "/opt/pool"
STATUS = "/var/lib/claude-code/status.json"
VERBS = ("backup", "status")
UNITS = [f"claude-code-{verb}.{kind}" for verb in VERBS for kind in ("service", "timer")]

pytestmark = [pytest.mark.long, pytest.mark.machines, pytest.mark.spread]


@pytest.fixture
def controller(whole: Cluster, tmp_path: Path) -> Iterator[Host]:
    """Return a node that has the project, an inventory, and a key that lets it in everywhere."""
    name = whole.workers[-1]
    host = whole.host(name)
    packed = tmp_path / "project.tar"
    with tarfile.open(packed, "w") as archive:
        for part in ("ansible.cfg", "playbooks", "roles", "site.yml"):
            archive.add(ROOT / part, arcname=part)
        inventory = json.dumps(reached_by_lan(whole)).encode()
        info = tarfile.TarInfo("inventory.json")
        info.size = len(inventory)
        archive.addfile(info, io.BytesIO(inventory))
    host.check_output(
        f"mkdir -p {PROJECT} && apt-get update -q && "
        "DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends ansible-core"
    )
    unpacked = host.ansible("unarchive", f"src={packed} dest={PROJECT}", become=True, check=False)
    assert "msg" not in unpacked, unpacked
    key = host.check_output(
        "mkdir -pm 700 ~/.ssh && ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519"
        " && cat ~/.ssh/id_ed25519.pub"
    )
    for node in whole.nodes:
        user = whole.variables(node)["ansible_user"]
        whole.host(node).check_output("echo %s >> ~%s/.ssh/authorized_keys", key, user)
    yield host


def reached_by_lan(cluster: Cluster) -> dict[str, object]:
    """Return the inventory with the addresses by which the nodes reach each other."""

    def hosts(names: list[str]) -> dict[str, object]:
        return {
            "hosts": {
                name: {
                    "ansible_host": cluster.variables(name)["node_address"],
                    "ansible_user": cluster.variables(name)["ansible_user"],
                    "ansible_ssh_common_args": "-o StrictHostKeyChecking=accept-new",
                }
                for name in names
            }
        }

    return {"swarm_managers": hosts(cluster.managers), "swarm_workers": hosts(cluster.workers)}


def test_a_pool_that_is_not_well_is_a_failed_unit(whole: Cluster, controller: Host) -> None:
    timers = f"cd {PROJECT} && ansible-playbook -i inventory.json playbooks/timers.yml"
    refused = controller.run(timers)
    assert refused.rc != 0
    assert "a backup needs a place and a password" in " ".join(refused.stdout.split())

    where = "-e backup_dir=/srv/backups -e backup_password_file=/root/password"
    controller.check_output(f"{timers} {where}")
    controller.check_output("systemd-analyze verify " + " ".join(UNITS))
    again = controller.check_output(f"{timers} {where}")
    assert "changed=0" in again
    waiting = controller.check_output("systemctl list-timers --output=json")
    assert {"claude-code-backup.timer", "claude-code-status.timer"} <= {
        timer["unit"] for timer in json.loads(waiting)
    }

    controller.check_output("systemctl start claude-code-status.service")
    assert json.loads(controller.file(STATUS).content_string)["well"]
    # The password is to be made first.
    assert controller.run("systemctl start claude-code-backup.service").rc != 0
    assert controller.check_output("systemctl is-failed claude-code-backup.service") == "failed"

    whole.docker("service", "scale", "--detach", "claude-code-stack_gateway=0")
    try:
        assert controller.run("systemctl start claude-code-status.service").rc != 0
    finally:
        whole.docker("service", "scale", "--detach", "claude-code-stack_gateway=1")
    assert controller.check_output("systemctl is-failed claude-code-status.service") == "failed"
    assert not json.loads(controller.file(STATUS).content_string)["well"]

    controller.check_output(f"{timers} {where} -e pool_timers_backup=")
    for kind in ("service", "timer"):
        assert not controller.file(f"/etc/systemd/system/claude-code-backup.{kind}").exists
