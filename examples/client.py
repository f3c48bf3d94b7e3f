"""A job with the client of this project: `python examples/client.py "your prompt"`.

Reads CLAUDE_JOBS_URL and CLAUDE_JOBS_TOKEN (or CLAUDE_JOBS_TOKEN_FILE).
"""

import asyncio
import sys

from claude_jobs.client import Client, JobFailedError


async def main(prompt: str) -> int:
    async with Client() as client:
        job = await client.submit(prompt, workspace="examples", timeout_seconds=600)
        # Comes back by itself when the connection breaks; no event is missing or comes twice.
        async for event in job.events():
            print(event.id, event.type, event.text)
        try:
            result = await job.result()
        except JobFailedError as failed:
            print(f"{failed.code}: {failed.sentence}")
            return 1
        print(f"{result.result}\n${result.cost_usd} in {result.num_turns} turns")

        # The conversation goes on in another job, on whichever machine is free.
        again = await client.submit("What did I say?", resume_session_id=result.session_id)
        print((await again.result()).result)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(" ".join(sys.argv[1:]) or "Create a file called test.txt")))
