"""Teardown leaves nothing but what somebody may still want."""

from deployment import Deployment
from pool import Pool


def test_teardown_leaves_nothing_of_the_stack_but_its_workspace(
    pool: Pool, deployment: Deployment
) -> None:
    work = pool.workspace / "test.txt"
    pool.start("run sleep 300")
    run = deployment.teardown()
    assert run.code == 0, run.output
    assert run.changed > 0
    left = {kind: found for kind, found in deployment.stack.everything().items() if found}
    assert left == {}
    assert work.is_file()


def test_a_second_teardown_changes_nothing(pool: Pool, deployment: Deployment) -> None:
    run = deployment.teardown()
    assert (run.code, run.changed) == (0, 0), run.output


def test_teardown_refuses_a_workspace_that_is_not_the_pools(
    pool: Pool, deployment: Deployment
) -> None:
    other = deployment.directory / "other"
    other.mkdir()
    run = deployment.teardown(teardown_workspace=str(other))
    assert run.code != 0
    assert "Nothing was removed" in run.text
    assert other.is_dir()
    assert pool.workspace.is_dir()


def test_teardown_deletes_the_workspace_that_is_named(pool: Pool, deployment: Deployment) -> None:
    run = deployment.teardown(teardown_workspace=str(pool.workspace))
    assert run.code == 0, run.output
    assert not pool.workspace.exists()
    assert deployment.secrets.is_dir()
