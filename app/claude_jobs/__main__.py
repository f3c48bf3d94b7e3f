"""Starts one process of the pool: `python -m claude_jobs PROCESS`."""

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

from claude_jobs import settings as configuration
from claude_jobs.log import configure_logging
from claude_jobs.settings import (
    BrokerBackupSettings,
    BrokerJoinSettings,
    BrokerRestoreSettings,
    BrokerSettings,
    GatewaySettings,
    ModelStubSettings,
    ProcessSettings,
    ReplicaSettings,
    ReportSettings,
    SettingsError,
)

# The exit code of a process that cannot start as it was set up (sysexits.h: EX_CONFIG).
_EX_CONFIG = 78

PROCESSES: dict[str, type[ProcessSettings]] = {
    "gateway": GatewaySettings,
    "report": ReportSettings,
    "replica": ReplicaSettings,
    "broker": BrokerSettings,
    "broker-join": BrokerJoinSettings,
    "broker-backup": BrokerBackupSettings,
    "broker-restore": BrokerRestoreSettings,
    "model-stub": ModelStubSettings,
}


def start(settings: ProcessSettings) -> int:
    """Be the process that these settings belong to, and return its exit code.

    Each loads only its own modules.
    """
    match settings:
        case ReportSettings():
            from claude_jobs.operator.report import print_report

            return asyncio.run(print_report(settings))
        case GatewaySettings():
            from aiohttp import web

            from claude_jobs.gateway.app import create_app

            # Clients of a gateway that stops come back to another with their last event's id.
            web.run_app(
                create_app(settings),
                port=settings.port,
                access_log=None,
                print=None,
                # A stream whose reader has gone ends at once.
                handler_cancellation=True,
                shutdown_timeout=1,
                # A path of the workspace may have 4096 bytes, each of which may be encoded.
                max_line_size=2**16,
            )
        case ReplicaSettings():
            from claude_jobs.replica.supervisor import Supervisor

            asyncio.run(Supervisor(settings).run())
            # The slot's next replica can only start once this process is gone, and taking a
            # Python with all its modules apart takes 60 to 140 ms.
            logging.shutdown()
            os._exit(0)
        case BrokerJoinSettings():
            from claude_jobs.broker.growth import join

            asyncio.run(join(settings))
        case BrokerBackupSettings():
            from claude_jobs.operator.broker_commands import write_archive

            return asyncio.run(write_archive(settings))
        case BrokerRestoreSettings():
            from claude_jobs.operator.broker_commands import read_archive

            return asyncio.run(read_archive(settings))
        case BrokerSettings():
            from claude_jobs.broker.server import run as run_broker

            run_broker(settings)
        case ModelStubSettings():
            from claude_jobs.model_stub.server import run

            run(settings.port)
    return 0


def main() -> int:
    """Read the settings of the process that was asked for, then be that process."""
    parser = argparse.ArgumentParser(prog="claude_jobs", description=__doc__)
    parser.add_argument("process", choices=PROCESSES)
    process = parser.parse_args().process
    # What agents and gateway write in the workspace, both may change.
    os.umask(0o002)
    try:
        settings = configuration.load(
            PROCESSES[process],
            secrets_dir=Path(os.environ.get("SECRETS_DIR", configuration.DEFAULT_SECRETS_DIR)),
        )
        configure_logging(settings.log_level, process=process)
        return start(settings)
    except SettingsError as error:
        sys.stderr.write(f"{process} cannot start: {error}\n")
        return _EX_CONFIG


if __name__ == "__main__":
    sys.exit(main())
