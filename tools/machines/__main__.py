"""Virtual machines for the cluster tests; they need no root, no bridge and no KVM.

    python3 tools/machines prepare
    python3 tools/machines start --state DIR < machines.json
    python3 tools/machines destroy --state DIR

`prepare` makes what they start from, which `start` does, too, where it is missing.

`start` reads a JSON object: {"NAME": {"release": "trixie", "address": "192.168.77.11"}, ...};
memory_mb and cpus may be given, too, and share: a directory of this host whose files the machine
finds at an address that `inventory` tells.

They run under KVM where it works. Elsewhere their kernel is a process of this host (User Mode
Linux). MACHINES_HYPERVISOR=tcg has QEMU emulate their CPUs instead, some twenty times slower.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import image
from cluster import Cluster, prepare, requests
from errors import MachineError
from machine import Machine


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="machines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("prepare", help="make the images of all releases, and a kernel if need be")
    make = commands.add_parser("image", help="make the image of a release and print where it is")
    make.add_argument("release", choices=sorted(image.RECIPES))
    state = argparse.ArgumentParser(add_help=False)
    state.add_argument("--state", type=Path, required=True, help="the directory of the machines")
    for command, text in {
        "start": "make and start the machines described on standard input",
        "status": "print what the machines are and whether they run",
        "inventory": "print how Ansible reaches them",
        "destroy": "take all machines away",
    }.items():
        commands.add_parser(command, parents=[state], help=text)
    for command, text in {
        "stop": "shut down",
        "power-off": "pull the plug",
        "power-on": "start again, on the same disk",
        "unplug": "take off the LAN",
        "plug": "put back on the LAN",
        "reinstall": "pull the plug and start again with a fresh disk",
    }.items():
        several = commands.add_parser(command, parents=[state], help=text)
        several.add_argument("names", nargs="+", metavar="NAME")
    return parser


def _each(machines: list[Machine], command: str) -> None:
    """Do one thing with several machines at once."""
    with ThreadPoolExecutor(len(machines)) as executor:
        match command:
            case "stop":
                list(executor.map(Machine.stop, machines))
            case "power-off":
                list(executor.map(Machine.power_off, machines))
            case "plug" | "unplug":
                list(executor.map(lambda one: one.set_lan(plugged=command == "plug"), machines))


def _run(arguments: argparse.Namespace) -> str:
    if arguments.command == "prepare":
        prepare()
        return ""
    if arguments.command == "image":
        return str(image.ready(arguments.release).directory)
    cluster = Cluster(arguments.state)
    match arguments.command:
        case "start":
            cluster.start(requests(sys.stdin.read()))
        case "destroy":
            cluster.destroy()
        case "power-on":
            cluster.power_on(arguments.names)
        case "reinstall":
            for name in arguments.names:
                cluster.machine(name).reinstall()
            cluster.power_on(arguments.names)
        case "status":
            return json.dumps(cluster.status(), indent=2)
        case "inventory":
            return json.dumps(cluster.inventory(), indent=2)
        case command:
            _each([cluster.machine(name) for name in arguments.names], command)
    return ""


def main() -> int:
    """Run the command line."""
    try:
        said = _run(_parser().parse_args())
    except MachineError as error:
        sys.stderr.write(f"machines: {error}\n")
        return 1
    except FileNotFoundError as error:
        sys.stderr.write(
            f"machines: {error.filename} is not there: tools/cluster-environment installs all "
            "that is needed.\n"
        )
        return 1
    if said:
        sys.stdout.write(f"{said}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
