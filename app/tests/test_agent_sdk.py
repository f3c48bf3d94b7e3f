"""The Agent SDK is loaded without what no replica needs of it."""

import subprocess
import sys


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def test_a_replica_loads_the_sdk_without_mcp() -> None:
    said = run(
        "from claude_jobs.agent.sdk import load_sdk; load_sdk(); import claude_jobs.agent.run, sys;"
        "print(*[name for name in sys.modules if name.partition('.')[0] in {'mcp', 'mcp_types'}])"
    )
    assert said.split() == []


def test_mcp_is_there_for_whoever_wants_it_after_all() -> None:
    run(
        "from claude_jobs.agent.sdk import load_sdk; load_sdk();"
        "from mcp.types import Tool; assert Tool.model_fields"
    )


def test_the_sdk_is_left_alone_where_mcp_was_loaded_before() -> None:
    said = run(
        "import mcp.types; from claude_jobs.agent.sdk import load_sdk; load_sdk();"
        "import claude_agent_sdk; from mcp.types import Tool; print(claude_agent_sdk.Tool is Tool)"
    )
    assert said.strip() == "True"
