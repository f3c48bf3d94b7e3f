"""The one published address: takes jobs in, streams their events, shows the pool's state."""
