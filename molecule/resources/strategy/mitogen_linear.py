"""Lets Ansible find mitogen's strategy, wherever Python keeps mitogen."""

from ansible_mitogen.plugins.strategy.mitogen_linear import StrategyModule

__all__ = ["StrategyModule"]
