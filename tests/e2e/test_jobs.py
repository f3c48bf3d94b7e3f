"""Jobs from outside: each runs once, in a container of its own, in the shared workspace."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from engine import is_running
from pool import TERMINAL, Event, Pool, wait_until

CLIENTS = 20
JOBS = 40


def test_a_job_creates_a_file_in_the_workspace_and_its_container_makes_room_for_a_new_one(
    complete_pool: Pool,
) -> None:
    pool = complete_pool
    before = pool.idle()
    events = pool.run("Create a file called test.txt")
    assert [events[0].type, events[1].type, events[-1].type] == ["queued", "connected", "completed"]
    assert (pool.workspace / "test.txt").is_file()
    used = events[1].data["replica"]
    assert used in before
    wait_until(lambda: not is_running(used), "the used container is gone", seconds=20)
    after = pool.wait_idle(seconds=30)
    assert after & before == before - {used}


def test_forty_jobs_from_twenty_clients_run_exactly_once_each_and_none_is_refused(
    complete_pool: Pool,
) -> None:
    pool = complete_pool

    def client(jobs: list[str]) -> list[list[Event]]:
        return [pool.run(f"run echo {job} >> forty") for job in jobs]

    jobs = [f"job-{number}" for number in range(JOBS)]
    with ThreadPoolExecutor(CLIENTS) as executor:
        shares = [jobs[number::CLIENTS] for number in range(CLIENTS)]
        streams = [events for share in executor.map(client, shares) for events in share]

    assert Counter(pool.ledger("forty")) == Counter(jobs)
    assert len(streams) == JOBS
    for events in streams:
        assert events[0].type == "queued"
        assert [event.type for event in events if event.type in TERMINAL] == ["completed"]
        assert events[-1].type == "completed"
        ids = [event.id for event in events]
        assert ids == sorted(set(ids))
        assert all(event.data["type"] == event.type for event in events)
    replicas = [events[1].data["replica"] for events in streams]
    assert len(set(replicas)) == JOBS, "a container ran two jobs"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        pytest.param(b"{}", "prompt", id="no prompt"),
        pytest.param(b'{"prompt": 7}', "prompt", id="wrong type"),
        pytest.param(b'{"prompt": "hello", "colour": "red"}', "colour", id="unknown field"),
        pytest.param(b"hello", "JSON", id="not JSON"),
        pytest.param(b'{"prompt": "hello", "workspace": "../etc"}', "workspace", id="leaves"),
    ],
)
def test_a_bad_request_is_answered_with_a_sentence_that_names_the_fault(
    pool: Pool, body: bytes, named: str
) -> None:
    with pool.client() as client:
        answer = client.post("/api/execute", content=body)
    assert answer.status_code == 400
    assert answer.json()["code"] == "invalid_request"
    assert named in answer.json()["error"]


def test_ten_megabytes_of_json_are_refused(pool: Pool) -> None:
    with pool.client() as client:
        answer = client.post("/api/execute", json={"prompt": "x" * 10_000_000})
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


def test_a_workspace_that_leaves_by_a_symlink_is_refused_and_no_agent_sees_what_is_there(
    complete_pool: Pool,
) -> None:
    pool = complete_pool
    assert pool.run("run ln -s /etc way-out")[-1].type == "completed"
    with pool.client() as client:
        body = {"prompt": "run touch seen", "workspace": "way-out"}
        answer = client.post("/api/execute", json=body)
    assert answer.status_code == 400
    assert "workspace" in answer.json()["error"]


@pytest.mark.parametrize("token", [None, "wrong-token-0123456789"], ids=["none", "wrong"])
def test_without_the_token_only_health_and_ready_answer(pool: Pool, token: str | None) -> None:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(base_url=pool.url, headers=headers) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 200
        for answer in (
            client.get("/status"),
            client.post("/api/execute", json={"prompt": "run touch intruder"}),
        ):
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert not Path(pool.workspace / "intruder").exists()
