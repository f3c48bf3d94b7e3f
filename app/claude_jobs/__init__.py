"""A pool of ephemeral Claude Code agents behind one HTTP address."""

__version__ = "0.1.0"
