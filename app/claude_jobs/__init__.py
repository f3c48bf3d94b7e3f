"""A pool of ephemeral Claude Code agents behind one HTTP address."""
