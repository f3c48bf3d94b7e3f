"""Logging: one JSON line a fact, on standard error."""

import logging

from pythonjsonlogger.json import JsonFormatter


def configure_logging(level: str, *, process: str) -> None:
    """Send every log line of this process to standard error as JSON.

    `level` is a word of the standard library (`debug`, `info`, `warning`, `error`).
    """
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter(
            "{levelname}{name}{message}",
            style="{",
            timestamp=True,
            static_fields={"process": process},
            rename_fields={"levelname": "level", "name": "logger"},
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # One line a request says nothing at a health check every few seconds.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
