"""A demo model: speaks Anthropic's Messages API and answers by simple rules.

It lets the real Claude Code do real work with no key and no internet: in demo mode and in the
tests. What it understands is in ``docs/model-stub.md``.
"""

from claude_jobs.model_stub.server import create_app, run

__all__ = ["create_app", "run"]
