"""What crosses the boundaries: jobs, events, errors and status. Imports nothing of ours."""
