"""What `site.yml` costs on several bare machines, beside the same pool made by hand.

By hand: the commands that one types for a swarm, an NFS workspace, the image, the secrets and the
stack, and nothing else: no checks, no firewall, no labels, nothing for the next machine. Nobody
types here, and what is for all nodes runs on all at once, so this is as quick as a hand can be.

The machines are those of a scenario of Molecule, as `molecule create` leaves them; they are
installed anew between the two ways and in the end belong to `molecule destroy`.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playbook import PROJECT, play

BIN = Path(sys.executable).parent
WORKSPACE = "/srv/claude-code/workspace"
PORT = 3000
# As role docker_engine has it: an engine without what Debian only recommends.
ENGINE = "docker.io docker-cli iptables ca-certificates"
INSTALL = "apt-get install -q -y --no-install-recommends"
FILES = ("swarm.yml", "swarm.demo.yml", "swarm.encrypted.yml")
SECRETS = {
    "claude_credentials": """printf '{"apiKey": "demo"}'""",
    "api_tokens": """printf '{"default": "%s"}' $(openssl rand -hex 32)""",
    "broker_gateway_password": "openssl rand -hex 16 | tr -d '\\n'",
    "broker_replica_password": "openssl rand -hex 16 | tr -d '\\n'",
}
WHOLE = f"""
running() {{
  docker service ps claude-code-stack_claude-api --filter desired-state=running \
    --format '{{{{.CurrentState}}}}' | grep -c Running
}}
until [ "$(running)" = 5 ] && curl --silent --fail http://127.0.0.1:{PORT}/ready; do sleep 1; done
"""


@dataclass(frozen=True)
class Step:
    """A command that is typed once, and the machines that it is for."""

    what: str
    command: str
    on: tuple[str, ...]


class Machines:
    """The machines of an inventory, as a hand at a terminal reaches them."""

    def __init__(self, inventory: Path) -> None:
        shown = subprocess.run(
            [BIN / "ansible-inventory", "--inventory", inventory, "--list"],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            check=True,
        )
        listed = json.loads(shown.stdout)
        self._variables: dict[str, dict[str, Any]] = listed["_meta"]["hostvars"]
        self.managers = tuple(listed["swarm_managers"]["hosts"])
        self.workers = tuple(listed["swarm_workers"]["hosts"])
        self.all = self.managers + self.workers

    def address(self, name: str) -> str:
        """Return the address of a machine between the machines."""
        return str(self._variables[name]["node_address"])

    def archive(self, name: str) -> str:
        """Return the address of the image, for one machine."""
        variables = self._variables[name]
        template = str(variables["app_image_archive"])
        return re.sub(r"{{ *machine_share *}}", str(variables["machine_share"]), template)

    def run(self, name: str, command: str) -> str:
        """Run a command as root and return what it prints."""
        variables = self._variables[name]
        login = f"{variables['ansible_user']}@{variables['ansible_host']}"
        done = subprocess.run(
            [
                "ssh",
                *shlex.split(variables["ansible_ssh_common_args"]),
                *shlex.split(variables["ansible_ssh_args"]),
                *("-o", "ControlPath=/tmp/by-hand-%C", "-p", str(variables["ansible_port"])),
                *(login, f"sudo sh -c {shlex.quote(command)}"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            sys.exit(f"{name}: {command}\n{done.stdout}")
        return done.stdout.strip()


def steps(machines: Machines) -> list[Step]:
    """Return the commands of a pool by hand. $TOKEN, $IMAGE: what the command before printed."""
    manager = machines.managers[0]
    address = machines.address(manager)
    everybody, first, workers = machines.all, (manager,), machines.workers
    clients = " ".join(f"{machines.address(name)}(rw,root_squash)" for name in workers)
    mount = f"{address}:{WORKSPACE} {WORKSPACE} nfs4 vers=4.2,hard,_netdev 0 0"
    files = [
        f"cat > /var/tmp/{file} <<'END'\n{(PROJECT / file).read_text()}\nEND" for file in FILES
    ]
    # The stack file as it comes; settings as its variables.
    settings = (
        f"IMAGE=$IMAGE WORKSPACE_PATH={WORKSPACE} "
        f"WORKSPACE_SOURCE={address}:{WORKSPACE} WORKSPACE_HOST={manager}"
    )
    deploy = "docker stack deploy --resolve-image never " + " ".join(f"-c {it}" for it in FILES)
    init = f"docker swarm init --advertise-addr {address} --default-addr-pool 10.77.0.0/16"
    return [
        Step("engine", "apt-get update -q", everybody),
        Step("engine", f"{INSTALL} {ENGINE} curl nfs-common openssl", everybody),
        Step("engine", "systemctl enable --now docker", everybody),
        Step("swarm", init, first),
        Step("swarm", "docker swarm join-token --quiet worker", first),
        Step("swarm", f"docker swarm join --token $TOKEN {address}:2377", workers),
        Step("workspace", f"{INSTALL} nfs-kernel-server", first),
        Step("workspace", f"install -d -o 10000 -g 10002 -m 2775 {WORKSPACE}", first),
        Step("workspace", f"echo '{WORKSPACE} {clients}' >> /etc/exports", first),
        Step("workspace", "systemctl enable --now nfs-server && exportfs -ra", first),
        Step("workspace", f"mkdir -p {WORKSPACE}", workers),
        Step("workspace", f"echo '{mount}' >> /etc/fstab && systemctl daemon-reload", workers),
        Step("workspace", f"mount {WORKSPACE}", workers),
        Step("image", "curl --silent --fail $ARCHIVE | docker load --quiet", everybody),
        Step("image", "docker images --no-trunc --quiet claude-code-sse-api | head -1", first),
        *(
            Step("stack", f"{make} | docker secret create {name} -", first)
            for name, make in SECRETS.items()
        ),
        *(Step("stack", file, first) for file in files),
        Step("stack", f"cd /var/tmp && {settings} {deploy} claude-code-stack", first),
        Step("until 5/5", WHOLE, first),
    ]


def by_hand(machines: Machines) -> tuple[dict[str, float], int, int]:
    """Make the pool; return seconds by step, commands typed and commands run on machines."""
    seconds: dict[str, float] = {}
    printed = {"TOKEN": "", "IMAGE": ""}
    listed = steps(machines)
    for step in listed:

        def do(name: str, step: Step = step) -> str:
            values = printed | {"ARCHIVE": machines.archive(name)}
            command = step.command
            for variable, value in values.items():
                command = command.replace(f"${variable}", value)
            return machines.run(name, command)

        started = time.monotonic()
        with ThreadPoolExecutor(len(step.on)) as pool:
            answers = list(pool.map(do, step.on))
        if "join-token" in step.command:
            printed["TOKEN"] = answers[0]
        if step.command.startswith("docker images"):
            printed["IMAGE"] = answers[0]
        seconds[step.what] = seconds.get(step.what, 0) + time.monotonic() - started
    return seconds, len(listed), sum(len(step.on) for step in listed)


def by_playbook(inventory: Path) -> tuple[float, int]:
    """Run `site.yml`; return its seconds and the tasks that ran, over all machines."""
    taken, printed = play("site.yml", "--inventory", str(inventory))
    recap = printed[printed.index("PLAY RECAP") :]
    return taken, sum(int(n) for n in re.findall(r"\bok=(\d+)", recap))


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--scenario", type=Path, default=PROJECT / "molecule/default")
    scenario = options.parse_args().scenario
    inventory = scenario / "inventory"
    machines = Machines(inventory)

    seconds, typed, run = by_hand(machines)
    for what, taken in seconds.items():
        print(f"by hand, {what:12} {taken:6.1f} s")
    total = sum(seconds.values())
    print(
        f"by hand                {total:6.1f} s, {typed} commands, {run} on all machines",
        flush=True,
    )

    for name in machines.all:
        subprocess.run(
            [
                sys.executable,
                "tools/machines",
                "reinstall",
                "--state",
                scenario / ".machines",
                name,
            ],
            cwd=PROJECT,
            check=True,
        )
    taken, tasks = by_playbook(inventory)
    print(f"site.yml               {taken:6.1f} s, 1 command, {tasks} tasks on all machines")
    print(f"site.yml / by hand     {taken / total:6.2f}")


if __name__ == "__main__":
    main()
