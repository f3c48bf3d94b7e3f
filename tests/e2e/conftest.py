"""One deployment for all end-to-end tests: it is made once and always taken away again."""

import secrets
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from deployment import Deployment, Run
from engine import Stack, free_cpus, is_manager
from pool import Gate, Pool

# Deployments are dear: each file finds the stack as the one before left it.
ORDER = (
    "test_refusals",
    "test_deployment",
    "test_jobs",
    "test_operations",
    "test_losses",
    "test_updates",
    "test_teardown",
)
REPLICAS = 5
# What the default stack reserves, and one more replica while it is updated.
DEFAULT_CPUS = REPLICAS * 0.25 + 0.25 + 0.25


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.stem))


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Choose a stack of our own; nothing is deployed yet. In the end nothing of it is left."""
    stack = Stack(f"e2e-{secrets.token_hex(3)}")
    # Where no engine or no swarm is yet, the deployment brings them.
    cpus = free_cpus() if is_manager() else DEFAULT_CPUS
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    # Beside another pool, two cores are too few for the default reservations.
    # An updated replica counts when it is healthy, after 10 s: two at a time save half a minute.
    settings: dict[str, object] = {"app_stack_update_parallelism": 2}
    if cpus < DEFAULT_CPUS:
        settings["app_stack_cpu_reservation"] = "0.01"
    deployment = Deployment(stack, port, tmp_path_factory.mktemp("pool"), settings)
    yield deployment
    left = is_manager() and any(stack.everything().values())
    if left or deployment.workspace.exists():
        run = deployment.teardown(teardown_workspace=str(deployment.workspace))
        assert run.code == 0, run.output


@pytest.fixture(scope="session")
def refusals(deployment: Deployment) -> dict[str, Run]:
    """Deploy wrongly in several ways at once, before anything is there."""
    with socket.socket() as taken, ThreadPoolExecutor() as executor:
        taken.bind(("", 0))
        taken.listen()
        runs = {
            "not JSON": executor.submit(deployment.deploy, credentials="sk-ant-very-secret"),
            "unknown form": executor.submit(
                deployment.deploy, credentials='{"password": "very-secret"}'
            ),
            "empty key": executor.submit(deployment.deploy, credentials='{"apiKey": " "}'),
            "taken port": executor.submit(deployment.deploy, app_stack_port=taken.getsockname()[1]),
        }
        return {name: run.result() for name, run in runs.items()}


@pytest.fixture(scope="session")
def first_run(deployment: Deployment) -> Run:
    """Deploy without credentials, for the first time."""
    run = deployment.deploy()
    assert run.code == 0, run.output
    return run


@pytest.fixture(scope="session")
def pool(deployment: Deployment, first_run: Run) -> Pool:
    """Return the deployed pool."""
    assert first_run.code == 0
    return Pool(
        f"http://127.0.0.1:{deployment.port}",
        (deployment.secrets / "api_token").read_text().strip(),
        deployment.workspace,
        replicas=REPLICAS,
    )


@pytest.fixture
def complete_pool(pool: Pool) -> Pool:
    """Return the pool once all its replicas are idle."""
    pool.wait_idle()
    return pool


@pytest.fixture
def gate(complete_pool: Pool, deployment: Deployment) -> Iterator[Gate]:
    """Return a gate for jobs of one test; it is open in the end, so that no job stays behind."""
    gate = Gate(complete_pool, f"gate-{secrets.token_hex(3)}")
    yield gate
    if not gate.is_open:
        # Only after a failure; its jobs run, so a container of theirs is there.
        gate.open(deployment.stack.containers("claude-api")[-1])
