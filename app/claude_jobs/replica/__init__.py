"""One replica: it takes one job, runs its agent, and goes."""
