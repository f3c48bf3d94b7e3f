"""A stand-in for a supervisor under a watchdog; it obeys the lines of its standard input.

`start DIRECTORY PROGRAM…` runs a program there, `allow SECONDS` tells the watchdog, `end` ends
what runs, `close` lets go of the watchdog. Each is answered with a line, the first line is the
watchdog's process id.
"""

import asyncio
import json
import sys

from claude_jobs.agent.guard import Watchdog, WatchdogLostError, watchdog
from claude_jobs.agent.process_tree import adopt_orphans, end_descendants, orphans_reaped


async def obey(word: str, rest: list[str], guard: Watchdog) -> str:
    match word:
        case "start":
            directory, *program = rest
            process = await asyncio.create_subprocess_exec(
                *program, cwd=directory, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
            )
            return str(process.pid)
        case "allow":
            try:
                guard.allow(float(rest[0]), since=guard.clock() - float(rest[1]))
            except WatchdogLostError as error:
                return str(error)
        case "end":
            await end_descendants(grace=float(rest[0]))
    return "done"


def answer(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def main() -> None:
    adopt_orphans()
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with orphans_reaped(every=0.1), watchdog() as guard:
        answer(str(guard.pid))
        async for line in lines:
            word, *rest = json.loads(line)
            if word == "close":
                break
            answer(await obey(word, rest, guard))
    answer("closed")
    await lines.read()


asyncio.run(main())
