"""Runs the project's playbooks for one stack of the tests' own."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from engine import Stack

PROJECT = Path(__file__).resolve().parents[2]
CREDENTIALS = "CLAUDE_CODE_CREDENTIALS_JSON"
_RECAP = re.compile(r"^(\S+)\s+:\s+ok=\d+\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.M)


@dataclass(frozen=True)
class Run:
    """A finished run of a playbook."""

    code: int
    output: str

    @property
    def text(self) -> str:
        """The output with all white space made one blank, as a sentence may be wrapped."""
        return " ".join(self.output.split())

    def _recap(self, column: int) -> int:
        hosts = _RECAP.findall(self.output)
        assert hosts, f"the run has no recap:\n{self.output}"
        return sum(int(host[column]) for host in hosts)

    @property
    def changed(self) -> int:
        """How many tasks changed something."""
        return self._recap(1)

    @property
    def failed(self) -> int:
        """How many tasks failed."""
        return self._recap(3) + self._recap(2)


@dataclass(frozen=True)
class Deployment:
    """A stack with a name, a port and directories that nothing else uses."""

    stack: Stack
    port: int
    directory: Path
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def workspace(self) -> Path:
        """The directory that the stack's agents share."""
        return self.directory / "workspace"

    @property
    def secrets(self) -> Path:
        """Where the playbook puts what it generates."""
        return self.directory / "secrets"

    def deploy(self, *options: str, credentials: str = "", **settings: object) -> Run:
        """Run site.yml; `settings` are variables on top of this deployment's own."""
        return self._play("site.yml", *options, credentials=credentials, **settings)

    def teardown(self, **settings: object) -> Run:
        """Run the teardown playbook."""
        return self.verb("teardown", **settings)

    def verb(self, name: str, **settings: object) -> Run:
        """Run one of the operator's playbooks."""
        return self._play(f"playbooks/{name}.yml", credentials="", **settings)

    def _play(self, playbook: str, *options: str, credentials: str, **settings: object) -> Run:
        variables = {
            "app_stack_name": self.stack.name,
            "app_stack_port": self.port,
            "app_stack_workspace": str(self.workspace),
            "docker_secrets_dir": str(self.secrets),
            **self.settings,
            **settings,
        }
        # What the caller's shell holds must not turn a demo into the real thing.
        environment = {key: value for key, value in os.environ.items() if key != CREDENTIALS}
        environment["ANSIBLE_NOCOLOR"] = "1"
        if credentials:
            environment[CREDENTIALS] = credentials
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("ansible-playbook")),
                playbook,
                "--extra-vars",
                json.dumps(variables),
                *options,
            ],
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return Run(done.returncode, done.stdout)
