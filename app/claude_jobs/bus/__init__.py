"""The broker as this application uses it: a job queue, an event log, job records and presence."""
