"""What `site.yml` makes of a machine: a complete pool, confined as promised."""

import json

from deployment import Deployment, Run
from engine import docker, inspect
from pool import Gate, Pool

SECOND = 10**9
MIB = 2**20


def test_a_deployment_without_credentials_says_that_it_is_a_demo(
    first_run: Run, pool: Pool
) -> None:
    assert "DEMO MODE" in first_run.text
    status = pool.status()
    assert status["demo"] is True
    assert "DEMO MODE" in status["notice"]


def test_a_deployment_ends_with_a_line_to_try_it_and_the_place_of_the_token(
    first_run: Run, deployment: Deployment
) -> None:
    assert f"http://127.0.0.1:{deployment.port}/api/execute" in first_run.text
    assert str(deployment.secrets / "api_token") in first_run.text
    assert (deployment.secrets / "api_token").read_text().strip() not in first_run.output


def test_five_replicas_run_and_are_idle(pool: Pool, deployment: Deployment) -> None:
    pool.wait_idle()
    tasks = deployment.stack.tasks("claude-api")
    assert [task["Status"]["State"] for task in tasks] == ["running"] * 5
    status = pool.status()
    assert status["status"] == "idle"
    counts = {key: status["replicas"][key] for key in ("total", "idle", "busy")}
    assert counts == {"total": 5, "idle": 5, "busy": 0}


def test_no_secret_is_in_the_description_of_a_service_task_or_container(
    pool: Pool, deployment: Deployment
) -> None:
    stack = deployment.stack
    services = stack.services()
    shown = json.dumps(
        [
            list(services.values()),
            [stack.tasks(service) for service in services],
            inspect("container", stack.containers()),
        ]
    )
    generated = [file.read_text().strip() for file in deployment.secrets.iterdir()]
    assert len(generated) == 3
    assert [secret for secret in generated if secret in shown] == []
    assert '"apiKey' not in shown


def test_generated_secrets_are_for_their_owner_only(pool: Pool, deployment: Deployment) -> None:
    assert deployment.secrets.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in deployment.secrets.iterdir()} == {0o600}


def test_every_container_is_read_only_and_has_no_capability_but_the_supervisors_three(
    pool: Pool, deployment: Deployment
) -> None:
    stack = deployment.stack
    for service in stack.services():
        for container in inspect("container", stack.containers(service)):
            host = container["HostConfig"]
            assert host["ReadonlyRootfs"] is True
            assert host["CapDrop"] == ["ALL"]
            assert host["Privileged"] is False
            added = {name.removeprefix("CAP_") for name in host["CapAdd"] or []}
            assert added == ({"SETUID", "SETGID", "KILL"} if service == "claude-api" else set())


def test_what_faces_the_network_is_not_root(pool: Pool, deployment: Deployment) -> None:
    stack = deployment.stack
    for service in stack.services():
        for container in stack.containers(service):
            processes = docker("top", container, "-eo", "pid,uid,comm").splitlines()[1:]
            assert processes
            assert [line for line in processes if line.split()[1] == "0"] == []


def test_services_restart_are_checked_and_limited_as_documented(
    pool: Pool, deployment: Deployment
) -> None:
    services = deployment.stack.services()
    for name in ("gateway", "claude-api", "nats"):
        policy = services[name]["Spec"]["TaskTemplate"]["RestartPolicy"]
        assert (policy["Condition"], policy["Delay"], policy["MaxAttempts"]) == ("any", 0, 0)
    for name in ("gateway", "claude-api"):
        template = services[name]["Spec"]["TaskTemplate"]
        assert template["ContainerSpec"]["Healthcheck"]["Interval"] == 10 * SECOND
    resources = services["claude-api"]["Spec"]["TaskTemplate"]["Resources"]
    assert resources["Limits"]["NanoCPUs"] == SECOND
    assert resources["Limits"]["MemoryBytes"] == 2048 * MIB
    assert resources["Limits"]["Pids"] == 2048
    wanted = float(str(deployment.settings.get("app_stack_cpu_reservation", "0.25")))
    assert resources["Reservations"].get("NanoCPUs", 0) == round(wanted * SECOND)
    assert resources["Reservations"]["MemoryBytes"] == 512 * MIB


def test_a_second_run_changes_nothing_and_leaves_a_running_job_alone(
    gate: Gate, deployment: Deployment
) -> None:
    job = gate.pool.start(gate.prompt("job"))
    gate.wait_began("job")
    run = deployment.deploy()
    assert run.code == 0, run.output
    assert run.changed == 0, run.output
    gate.open(job.replica())
    assert job.wait().type == "completed"
    assert gate.signed() == ["job"]


def test_check_mode_runs_through_and_would_change_nothing(
    pool: Pool, deployment: Deployment
) -> None:
    run = deployment.deploy("--check")
    assert (run.code, run.failed, run.changed) == (0, 0, 0), run.output
