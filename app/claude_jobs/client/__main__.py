"""`python -m claude_jobs.client`: the same as `claude-jobs`."""

import sys

from claude_jobs.client.command_line import main

if __name__ == "__main__":
    sys.exit(main())
