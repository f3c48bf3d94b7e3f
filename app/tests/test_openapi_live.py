"""A running gateway is asked all that its description allows, and what it does not."""

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from pathlib import Path

import pytest
from pool_client import program_for_everybody, running_pool

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]

TESTS = Path(__file__).parent


async def test_the_gateway_keeps_to_its_description() -> None:
    """Every check of schemathesis, see schemathesis.toml: about 1000 requests in half a minute."""
    with program_for_everybody(TESTS / "fake_claude") as program:
        settings = {
            "CLAUDE_PATH": str(program),
            "LOG_LEVEL": "error",
            # A full queue is something to see, too, and bounds how long a job waits.
            "QUEUE_LIMIT": "10",
        }
        async with running_pool(replicas=2, settings=settings) as pool:
            run = await asyncio.create_subprocess_exec(
                *(Path(sys.executable).with_name("st"), "--config-file", "schemathesis.toml"),
                *("run", f"{pool.pool.url}/openapi.json", "--no-color"),
                *("--header", f"Authorization: Bearer {pool.pool.token}"),
                cwd=TESTS,
                env=os.environ | {"NO_PROXY": "127.0.0.1"},
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
            )
            try:
                said, _ = await run.communicate()
            finally:
                if run.returncode is None:
                    run.kill()
            shown = "\n".join(line[:1000] for line in said.decode(errors="replace").splitlines())
            assert run.returncode == 0, shown
            assert "Tested: " in shown, "nothing was asked"
