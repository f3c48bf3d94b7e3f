"""Loads the Agent SDK, which every replica does for its one job, without most of its cost.

Four fifths of that are `mcp`, the protocol of tool servers. The SDK needs it only for servers that
run in its own process, and there are none here: Claude Code speaks to its servers by itself.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from pydantic import BaseModel

_LEFT_OUT = (
    "mcp",
    "mcp.server",
    "mcp.shared",
    "mcp.shared.memory",
    "mcp.shared.message",
    "mcp.types",
)


def load_sdk() -> None:
    """Import the SDK, for whoever imports it later, too. Takes a tenth of a second."""
    with _mcp_left_out():
        import claude_agent_sdk  # noqa: F401, PLC0415 - not before it is wanted


class _Anything(ModuleType):
    """A module that has a class of every name, to be named in annotations and derived from."""

    def __getattr__(self, name: str) -> type[BaseModel]:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (BaseModel,), {})


@contextmanager
def _mcp_left_out() -> Iterator[None]:
    """Let whoever imports `mcp` meanwhile have its names; what it really is comes back after."""
    if "mcp" in sys.modules:
        yield
        return
    modules = {name: _Anything(name) for name in _LEFT_OUT}
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, module)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)
