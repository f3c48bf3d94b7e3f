"""The log of sessions and their records, against a real nats-server."""

import asyncio
import json
import sys
from datetime import timedelta
from typing import Any, cast
from unittest.mock import ANY

import nats.errors
import pytest
from bus_ends import Ends
from claude_agent_sdk import SessionKey, SessionStore
from claude_agent_sdk.testing import run_session_store_conformance
from nats_server import NatsServer

from claude_jobs.bus import sessions
from claude_jobs.bus.sessions import (
    SessionBusyError,
    SessionLog,
    SessionLogError,
    SessionRecords,
    SessionTakenError,
    remove_session,
    sweep,
)
from claude_jobs.bus.topology import SESSIONS_STREAM, Bounds
from claude_jobs.contract.base import now
from claude_jobs.contract.session import Session

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

MAIN: SessionKey = {"project_key": "-workspace-a", "session_id": "s"}
AGENT: SessionKey = {**MAIN, "subpath": "subagents/agent-1"}


def entries(*numbers: int, **more: Any) -> Any:
    return [{"type": "x", "n": number, **more} for number in numbers]


def session(session_id: str, last_job_id: str = "first") -> Session:
    return Session(
        id=session_id,
        last_job_id=last_job_id,
        client="c",
        workspace=".",
        created_at=now(),
        updated_at=now(),
    )


async def over(_: str) -> bool:
    return True


async def running(_: str) -> bool:
    return False


async def test_the_bus_does_not_load_the_sdk() -> None:
    program = "import sys, claude_jobs.bus.sessions; sys.exit('claude_agent_sdk' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    assert await process.wait() == 0


async def test_the_log_keeps_what_the_sdk_asks_of_a_session_store(ends: Ends) -> None:
    stores = 0

    class Log(SessionLog):
        """Writes as a replica and removes as a gateway: neither may do both."""

        async def delete(self, key: SessionKey) -> None:
            await SessionLog(ends.gateway).delete(key)

    async def fresh() -> SessionStore:
        nonlocal stores
        stores += 1
        await ends.gateway.jetstream.purge_stream(SESSIONS_STREAM)
        return cast("SessionStore", Log(ends.replica))

    await run_session_store_conformance(fresh, skip_optional=frozenset({"list_session_summaries"}))
    assert stores == 14  # each contract but one, and the first look


async def test_a_replica_may_write_take_over_and_read_but_not_remove(ends: Ends) -> None:
    store = SessionLog(ends.replica)
    await store.append(MAIN, entries(1))
    await store.append(AGENT, entries(2))
    successor = SessionLog(ends.replica)
    assert await successor.take_over("s") == {
        ("-workspace-a", ""): [b'{"type":"x","n":1}'],
        ("-workspace-a", "subagents/agent-1"): [b'{"type":"x","n":2}'],
    }
    assert await successor.load(MAIN) == entries(1)
    assert await successor.list_subkeys(MAIN) == ["subagents/agent-1"]
    with pytest.raises((nats.errors.Error, TimeoutError)):
        await store.remove("s")
    assert await SessionLog(ends.gateway).load(MAIN) == entries(1)


async def test_nothing_was_saved_of_an_unknown_session(ends: Ends) -> None:
    assert await SessionLog(ends.replica).take_over("unknown") == {}


async def test_an_entry_of_any_size_comes_back_as_it_was(ends: Ends) -> None:
    noise = "".join(f"{number * 7919 % 99991:05d}é\ud83d" for number in range(1_500_000))
    large = entries(1, text=noise)
    assert len(json.dumps(large)) > 16 * 2**20  # twice what the broker takes in one message
    store = SessionLog(ends.replica)
    await store.append(MAIN, [*entries(0), *large, *entries(2)])
    assert await store.load(MAIN) == [*entries(0), *large, *entries(2)]


async def test_an_entry_that_is_sent_twice_is_kept_once(ends: Ends) -> None:
    store = SessionLog(ends.replica)
    await store.append(MAIN, [*entries(1, uuid="a"), *entries(7)])
    await store.append(MAIN, [*entries(1, uuid="a"), *entries(2, uuid="b"), *entries(7)])
    assert await store.load(MAIN) == [
        *entries(1, uuid="a"),
        *entries(7),
        *entries(2, uuid="b"),
        *entries(7),  # without a uuid nobody can tell
    ]


async def test_an_entry_that_a_lost_replica_left_unfinished_is_passed_over(ends: Ends) -> None:
    store = SessionLog(ends.replica)
    await store.append(MAIN, entries(1))
    await store._writer(sessions._subject("s", "-workspace-a", None)).write(b'\n{"type":"x","n"')
    successor = SessionLog(ends.replica)
    await successor.take_over("s")
    await successor.append(MAIN, entries(3))
    assert await successor.load(MAIN) == entries(1, 3)


async def test_who_lost_a_session_to_another_writes_nothing_more(ends: Ends) -> None:
    lost, successor = SessionLog(ends.replica), SessionLog(ends.replica)
    await lost.append(MAIN, entries(1))
    await successor.take_over("s")
    with pytest.raises(SessionTakenError):
        await lost.append(MAIN, entries(2))
    await successor.append(MAIN, entries(3))
    with pytest.raises(SessionTakenError):
        await lost.append(MAIN, entries(4))
    assert await successor.load(MAIN) == entries(1, 3)


async def test_who_writes_a_session_that_was_removed_does_not_bring_half_of_it_back(
    ends: Ends,
) -> None:
    store = SessionLog(ends.replica)
    await store.append(MAIN, entries(1))
    await SessionLog(ends.gateway).remove("s")
    with pytest.raises(SessionTakenError):
        await store.append(MAIN, entries(2))
    assert await store.load(MAIN) is None


async def test_a_piece_whose_answer_was_lost_is_stored_once(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = ends.replica.jetstream.publish
    lost = 0

    async def lose_the_answer(*arguments: Any, **options: Any) -> object:
        nonlocal lost
        answer = await publish(*arguments, **options)
        if lost < 3:
            lost += 1
            raise nats.errors.TimeoutError
        return answer

    monkeypatch.setattr(ends.replica.jetstream, "publish", lose_the_answer)
    store = SessionLog(ends.replica)
    await store.append(MAIN, entries(1))
    await store.append(MAIN, entries(2))
    assert lost == 3
    assert await store.load(MAIN) == entries(1, 2)


async def test_what_is_written_while_the_broker_is_away_is_kept_in_order(
    nats_server: NatsServer,
) -> None:
    async with nats_server.both_ends(Bounds()) as (_, replica):
        store = SessionLog(replica)
        await store.append(MAIN, entries(0))
        await nats_server.kill()
        # The SDK gives up waiting; what it handed over is delivered all the same.
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await store.append(MAIN, entries(1))
        later = [asyncio.create_task(store.append(MAIN, entries(n))) for n in (2, 3)]
        await nats_server.start()
        async with asyncio.timeout(20):
            await store.flush()
            await asyncio.gather(*later)
        assert await store.load(MAIN) == entries(0, 1, 2, 3)


async def test_after_a_loss_nothing_follows(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SessionLog(ends.replica)
    await store.append(MAIN, entries(1))

    async def away(*_: Any, **__: Any) -> None:
        raise nats.errors.TimeoutError

    with monkeypatch.context() as broken:
        broken.setattr(sessions, "_PATIENCE", 0.1)
        broken.setattr(ends.replica.jetstream, "publish", away)
        with pytest.raises(SessionLogError):
            await store.append(MAIN, entries(2))
    with pytest.raises(SessionLogError):
        await store.append(MAIN, entries(3))
    assert await store.load(MAIN) == entries(1)


# Records


async def test_a_record_is_listed_from_the_last_used_on(ends: Ends) -> None:
    records = await SessionRecords.open(ends.gateway)
    assert await records.list() == []
    assert await records.get("a") is None
    for name in ("a", "b"):
        await records.put(session(name))
    replicas = await SessionRecords.open(ends.replica)
    await replicas.put((await records.list())[1].model_copy(update={"updated_at": now()}))
    assert [each.id for each in await records.list()] == ["a", "b"]
    await records.remove("a")
    assert [each.id for each in await records.list()] == ["b"]


async def test_a_session_is_claimed_only_after_its_last_job(ends: Ends) -> None:
    records = await SessionRecords.open(ends.gateway)
    assert await records.claim("unknown", "j", over) is None
    await records.put(before := session("s"))
    with pytest.raises(SessionBusyError) as busy:
        await records.claim("s", "second", running)
    assert busy.value.job_id == "first"
    assert await records.get("s") == before
    assert await records.claim("s", "second", over) == before
    claimed = await records.get("s")
    assert claimed is not None
    assert claimed.last_job_id == "second"
    assert claimed.updated_at > before.updated_at
    assert await records.get("s") == claimed
    # A submission that is tried again finds its own claim.
    again = await records.claim("s", "second", running)
    assert again is not None
    assert again.last_job_id == "second"
    # One that is refused then leaves the session as it was, unless it is another's by now.
    await records.unclaim(before, "another")
    assert await records.get("s") == claimed.model_copy(update={"updated_at": ANY})
    await records.unclaim(before, "second")
    assert await records.get("s") == before


async def test_of_many_that_claim_a_session_at_once_one_gets_it(ends: Ends) -> None:
    records = await SessionRecords.open(ends.gateway)
    await records.put(session("s"))

    async def first_is_over(job_id: str) -> bool:
        await asyncio.sleep(0)
        return job_id == "first"

    outcomes = await asyncio.gather(
        *(records.claim("s", f"job-{number}", first_is_over) for number in range(20)),
        return_exceptions=True,
    )
    assert sum(isinstance(each, Session) for each in outcomes) == 1
    [busy] = {each.job_id for each in outcomes if isinstance(each, SessionBusyError)}
    taken = await records.get("s")
    assert taken is not None
    assert taken.last_job_id == busy


async def test_a_session_in_use_is_not_removed(ends: Ends) -> None:
    log, records = SessionLog(ends.gateway), await SessionRecords.open(ends.gateway)
    await SessionLog(ends.replica).append(MAIN, entries(1))
    await records.put(session("s"))
    with pytest.raises(SessionBusyError):
        await remove_session(log, records, "s", running)
    assert await log.load(MAIN) == entries(1)
    assert await remove_session(log, records, "s", over)
    assert await log.load(MAIN) is None
    assert await records.get("s") is None
    assert await records.claim("s", "j", over) is None
    assert not await remove_session(log, records, "s", over)


async def test_a_log_without_a_record_is_swept_when_it_is_old(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, records = SessionLog(ends.gateway), await SessionRecords.open(ends.gateway)
    for name in ("named", "nameless"):
        await SessionLog(ends.replica).append({**AGENT, "session_id": name}, entries(1))
        await SessionLog(ends.replica).append({**MAIN, "session_id": name}, entries(1))
    await records.put(session("named"))
    assert await sweep(log, records, over) == []
    monkeypatch.setattr(sessions, "_TIME_FOR_THE_RECORD", timedelta(0))
    assert await sweep(log, records, over) == ["nameless"]
    assert list(await log.last_written()) == ["named"]
    assert await sweep(log, records, over) == []


async def test_a_full_log_loses_whole_sessions_that_were_not_used_for_longest(
    nats_server: NatsServer,
) -> None:
    noise = [f"{number * 7919 % 99991:05d}" for number in range(40_000)]
    async with nats_server.both_ends(Bounds(session_bytes=2**20)) as (gateway, replica):
        log, records = SessionLog(gateway), await SessionRecords.open(gateway)
        names = ("oldest", "busy", "old", "new")
        for place, name in enumerate(names):
            text = noise[place * 9_000 : (place + 1) * 9_000]
            for _ in range(10):
                await SessionLog(replica).append(
                    {**MAIN, "session_id": name}, entries(1, text=text)
                )
                if await log.fullness() > 0.22 * (place + 1):
                    break
            await records.put(session(name, last_job_id=f"job of {name}"))
        assert 0.8 < await log.fullness() < 1

        async def over_but_one(job_id: str) -> bool:
            return job_id != "job of busy"

        [removed, again] = await asyncio.gather(
            sweep(log, records, over_but_one), sweep(log, records, over_but_one)
        )
        assert set(removed) | set(again) == {"oldest"}
        assert await log.fullness() < 0.8
        assert list(await log.last_written()) == ["busy", "old", "new"]
        assert {each.id for each in await records.list()} == {"busy", "old", "new"}
        info = await gateway.jetstream.stream_info(SESSIONS_STREAM)
        assert info.state.messages > 0
