"""One run of Claude Code: its user, its environment, its lines, its outcome."""
