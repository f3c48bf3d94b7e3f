"""Lets Ansible find mitogen's strategy, wherever Python keeps mitogen."""

from ansible_mitogen.plugins.strategy.mitogen_linear import StrategyModule  # type: ignore[import-untyped]

__all__ = ["StrategyModule"]
