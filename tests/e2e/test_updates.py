"""Changes of a pool at work: running jobs finish, nothing is cut off."""

import json
from typing import Any

from deployment import Deployment
from engine import docker, is_running
from pool import Gate, wait_until


def test_a_scale_down_lets_a_running_job_finish(gate: Gate, deployment: Deployment) -> None:
    service = f"{deployment.stack.name}_claude-api"
    job = gate.pool.start(gate.prompt("job"))
    gate.wait_began("job")
    replica = job.replica()
    docker("service", "scale", "--detach", f"{service}=0")
    wait_until(
        lambda: len(deployment.stack.containers("claude-api")) == 1,
        "all but the busy replica are gone",
        seconds=30,
    )
    assert is_running(replica)
    gate.open(replica)
    assert job.wait().type == "completed"
    assert gate.signed() == ["job"]
    docker("service", "scale", "--detach", f"{service}={gate.pool.replicas}")
    gate.pool.wait_idle()


def test_a_rolling_update_completes_while_a_job_runs_and_lets_it_finish(
    gate: Gate, deployment: Deployment
) -> None:
    job = gate.pool.start(gate.prompt("job"))
    gate.wait_began("job")
    replica = job.replica()
    run = deployment.deploy(app_stack_idle_timeout=901)
    assert run.code == 0, run.output
    assert run.changed > 0, run.output
    service = deployment.stack.services()["claude-api"]
    assert service["UpdateStatus"]["State"] == "completed"
    new = [task["Status"]["ContainerStatus"]["ContainerID"] for task in _current(deployment)]
    assert len(new) == gate.pool.replicas
    assert not any(container.startswith(replica) for container in new)
    assert is_running(replica)
    gate.open(replica)
    assert job.wait().type == "completed"
    assert gate.signed() == ["job"]


def test_changed_credentials_are_a_new_version_of_the_secret_and_end_the_demo(
    gate: Gate, deployment: Deployment
) -> None:
    stack = deployment.stack
    pool = gate.pool
    before = stack.secrets()
    key = "sk-ant-e2e-not-a-real-key"
    run = deployment.deploy(
        credentials=json.dumps({"apiKey": key}),
        # Nothing listens there: no job of this test reaches Anthropic.
        app_stack_anthropic_base_url="http://127.0.0.1:9",
    )
    assert run.code == 0, run.output
    assert key not in run.output
    assert "DEMO MODE" not in run.text
    services = stack.services()
    assert set(services) == {"gateway", "claude-api", "nats"}
    (new,) = stack.secrets() - before
    assert new.startswith(f"{stack.name}_claude_credentials_")
    container = services["claude-api"]["Spec"]["TaskTemplate"]["ContainerSpec"]
    assert new in {secret["SecretName"] for secret in container["Secrets"]}
    assert key not in json.dumps(list(services.values()))
    assert services["claude-api"]["UpdateStatus"]["State"] == "completed"
    pool.wait_idle()
    assert pool.status()["demo"] is False
    # Who runs it later without them makes no demo of it.
    kept = stack.secrets()
    run = deployment.deploy(app_stack_anthropic_base_url="http://127.0.0.1:9")
    assert run.code == 0, run.output
    assert "the pool keeps those that it has" in run.text
    assert stack.secrets() == kept
    assert pool.status()["demo"] is False


def _current(deployment: Deployment) -> list[dict[str, Any]]:
    service = deployment.stack.services()["claude-api"]
    wanted = service["Spec"]["TaskTemplate"]["ContainerSpec"]["Env"]
    tasks = deployment.stack.tasks("claude-api")
    return [task for task in tasks if task["Spec"]["ContainerSpec"]["Env"] == wanted]
