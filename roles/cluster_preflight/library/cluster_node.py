#!/usr/bin/python
"""Look at one machine of a cluster-to-be."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: cluster_node
short_description: Look at one machine of a cluster-to-be
description:
  - Gathers in one call what decides whether a machine can be a node of a swarm, and whether it fits the others. Changes
    nothing, needs nothing but Python and iproute2.
options:
  address:
    description: The machine's address in the cluster's network. Empty is the one that its default route uses.
    type: str
    default: ""
  tcp_ports:
    description: Ports whose holders are looked for.
    type: list
    elements: int
    default: []
  udp_ports:
    description: Ports whose holders are looked for.
    type: list
    elements: int
    default: []
  modules:
    description: Parts of the kernel to look for, each by the name of its module.
    type: list
    elements: str
    default: [ip_vs, vxlan, nfs, nfsd, esp4]
  firewall_rules:
    description: File with the rules that the role firewall made here on an earlier run.
    type: path
    default: /etc/claude-code-firewall.nft
  asked:
    description: The time (seconds since 1970) at which the question left the machine that asks.
    type: float
    default: 0
  socket:
    description: Socket of the Docker engine.
    type: path
    default: /var/run/docker.sock
author:
  - claude-code-sse-api maintainers
"""

EXAMPLES = r"""
- name: Look at this machine
  cluster_node:
    address: 192.168.1.11
    tcp_ports: [2377, 7946]
    udp_ports: [7946, 4789]
    asked: "{{ now().timestamp() }}"
  register: found
"""

RETURN = r"""
node:
  description: >-
    hostname, machine_id, boot_id, network (namespace); address with its interface, prefix and mtu; addresses, routes;
    clock (seconds ahead of who asks, with the time that the question took); cores, memory (bytes), disk (where Docker
    keeps its data); engine, swarm, kernel (part to whether it can be had), init, held (ports and who listens there),
    admits (addresses that our own firewall lets in, null without it).
  type: dict
  returned: always
"""

Json = dict[str, Any]
DAEMON_CONFIG = Path("/etc/docker/daemon.json")
DATA_ROOT = "/var/lib/docker"
# Documentation's own network: nothing is sent, the kernel is only asked which way it would go.
ELSEWHERE = ("192.0.2.1", 9)
TCP_LISTEN, UDP_UNCONNECTED = "0A", "07"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# How a part of the kernel shows that it is there already, beside /sys/module/NAME.
SIGNS = {"ip_vs": "/proc/net/ip_vs", "esp4": ""}
FILE_SYSTEMS = {"nfs": "nfs4", "nfsd": "nfsd"}


def _text(path: str | Path) -> str:
    """Return a file's content without white space around it, or nothing where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _run(*command: str) -> tuple[int, str]:
    """Run a program; code 127 where there is none."""
    found = shutil.which(command[0], path=PATH)
    if found is None:
        return 127, ""
    done = subprocess.run(  # noqa: S603 - the commands are written in this file
        [found, *command[1:]],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env={"PATH": PATH, "LC_ALL": "C"},
    )
    return done.returncode, done.stdout


# Addresses and routes


def admitted(rules: str) -> list[str] | None:
    """Return the nodes' addresses in the rules of the role firewall; None when there are no rules."""
    if not rules:
        return None
    return re.findall(r"[\d.]+", "".join(re.findall(r"set nodes4 {[^}]*elements = {([^}]*)}", rules)))


def addresses(links: Iterable[Mapping[str, Any]]) -> list[Json]:
    """Return the IPv4 addresses in what ``ip -json address`` says."""
    return [
        {"address": one["local"], "prefix": one["prefixlen"], "interface": link["ifname"], "mtu": link["mtu"]}
        for link in links
        for one in link.get("addr_info", [])
        if one.get("family") == "inet" and "local" in one
    ]


def routes(lines: Iterable[Mapping[str, Any]]) -> list[Json]:
    """Return the destinations in what ``ip -json route`` says, without the default route."""
    return [
        {"destination": line["dst"], "interface": line.get("dev", "")} for line in lines if line.get("dst") != "default"
    ]


def default_address() -> str:
    """Return the address that the kernel would send from to the outside; empty without a default route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(ELSEWHERE)
        except OSError:
            return ""
        return str(probe.getsockname()[0])


# The engine


def parse_answer(answer: bytes) -> tuple[Json, str]:
    """Return the object in an answer of the engine and the version of its interface; nothing where it is not 200."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if head.split(b" ", 2)[1:2] != [b"200"]:
        return {}, ""
    version = re.search(r"^api-version: *(\S+)", head.decode(errors="replace"), re.IGNORECASE | re.MULTILINE)
    return dict(json.loads(body)), version[1] if version else ""


def engine_info(path: str) -> tuple[Json, str]:
    """Return what the engine says about itself and the version of its interface; nothing when none answers.

    In HTTP/1.0, where the answer ends with the connection: http.client takes half as long to load as Python itself,
    and loading is most of what a module does on a slow machine.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(15)
        try:
            connection.connect(path)
            connection.sendall(b"GET /info HTTP/1.0\r\nHost: localhost\r\n\r\n")
            return parse_answer(b"".join(iter(lambda: connection.recv(65536), b"")))
        except (OSError, ValueError):
            return {}, ""


def daemon_config(text: str) -> tuple[Json, str]:
    """Return the settings in daemon.json, and what is wrong with the file."""
    try:
        config = json.loads(text) if text else {}
    except ValueError as error:
        return {}, str(error)
    return (config, "") if isinstance(config, dict) else ({}, "it holds no object")


def engine(info: Mapping[str, Any], api: str, config: Mapping[str, Any], config_error: str, version: str) -> Json:
    """Describe the engine by its own words, or by its settings while it is not running."""
    firewall = (info.get("FirewallBackend") or {}).get("Driver") or config.get("firewall-backend") or "iptables"
    return {
        "answers": bool(info),
        "version": info.get("ServerVersion") or version,
        "api": api,
        "live_restore": bool(
            info["LiveRestoreEnabled"] if "LiveRestoreEnabled" in info else config.get("live-restore")
        ),
        "firewall_backend": str(firewall).split("+")[0],
        "data_root": info.get("DockerRootDir") or config.get("data-root") or DATA_ROOT,
        "storage_driver": info.get("Driver") or "",
        "config_error": config_error,
    }


def swarm(info: Mapping[str, Any]) -> Json:
    """Describe the machine's place in a swarm."""
    own = info.get("Swarm") or {}
    cluster = own.get("Cluster") or {}
    return {
        "state": own.get("LocalNodeState") or "inactive",
        "node_id": own.get("NodeID") or "",
        "address": own.get("NodeAddr") or "",
        "manager": bool(own.get("ControlAvailable")),
        "cluster_id": cluster.get("ID") or "",
        "managers": sorted(one["NodeID"] for one in own.get("RemoteManagers") or []),
        "pools": cluster.get("DefaultAddrPool") or [],
        "error": own.get("Error") or "",
    }


def installed_version() -> str:
    """Return the version of an engine that is installed but does not answer."""
    found = re.search(r"version (\d[^\s,]*)", _run("dockerd", "--version")[1])
    return found[1] if found else ""


# Who listens


def sockets(table: str, state: str, ports: Iterable[int]) -> list[tuple[int, str]]:
    """Return port and inode of each socket in that state, out of a table such as /proc/net/tcp."""
    wanted = frozenset(ports)
    found = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        port = int(fields[1].rpartition(":")[2], 16)
        if fields[3] == state and port in wanted:
            found.append((port, fields[9]))
    return found


def _owners(inodes: frozenset[str]) -> dict[str, str]:
    """Return the names of the processes that have these sockets open."""
    names: dict[str, str] = {}
    for process in Path("/proc").iterdir() if inodes else ():
        if not process.name.isdigit():
            continue
        try:
            for handle in (process / "fd").iterdir():
                target = str(handle.readlink()) if handle.is_symlink() else ""
                if target.startswith("socket:[") and (inode := target[8:-1]) in inodes:
                    names.setdefault(inode, _text(process / "comm"))
        except OSError:  # it has ended meanwhile
            continue
    return names


def held(tcp_ports: Iterable[int], udp_ports: Iterable[int]) -> list[Json]:
    """Return who listens on which of these ports; a socket of no process is the kernel's own."""
    found = [
        (protocol, port, inode)
        for protocol, ports, state in (("tcp", tcp_ports, TCP_LISTEN), ("udp", udp_ports, UDP_UNCONNECTED))
        for family in ("", "6")
        for port, inode in sockets(_text(f"/proc/net/{protocol}{family}"), state, ports)
    ]
    owners = _owners(frozenset(inode for _, _, inode in found if inode != "0"))
    holders = dict.fromkeys((protocol, port, owners.get(inode, "the kernel")) for protocol, port, inode in found)
    return [{"protocol": protocol, "port": port, "holder": holder} for protocol, port, holder in holders]


# The rest


def kernel_has(name: str) -> bool:
    """Say whether a part of the kernel is there or can be loaded."""
    sign, file_system = SIGNS.get(name, ""), FILE_SYSTEMS.get(name, "")
    return (
        Path("/sys/module", name).exists()
        or bool(sign and Path(sign).exists())
        or bool(file_system and file_system in _text("/proc/filesystems").split())
        or _run("modprobe", "--dry-run", "--quiet", name)[0] == 0
    )


def disk(path: str) -> Json:
    """Return how much room there is at a place, or where it will be made."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    usage = os.statvfs(place)
    return {"path": str(place), "free_mb": usage.f_bavail * usage.f_frsize >> 20}


def memory(text: str) -> int:
    """Return the bytes of memory that /proc/meminfo tells of."""
    found = re.search(r"^MemTotal:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def look(wanted: Mapping[str, Any]) -> Json:
    clock = {"ahead": time.time() - wanted["asked"]} if wanted["asked"] else {}
    own = addresses(json.loads(_run("ip", "-json", "-4", "address", "show")[1] or "[]"))
    address = wanted["address"] or default_address()
    place: Json = next((one for one in own if one["address"] == address), {})
    info, api = engine_info(wanted["socket"])
    config, config_error = daemon_config(_text(DAEMON_CONFIG))
    found_engine = engine(info, api, config, config_error, "" if info else installed_version())
    return {
        "hostname": socket.gethostname(),
        "machine_id": _text("/etc/machine-id"),
        "boot_id": _text("/proc/sys/kernel/random/boot_id"),
        "network": Path("/proc/self/ns/net").stat().st_ino,
        "address": address,
        "interface": place.get("interface", ""),
        "prefix": place.get("prefix", 0),
        "mtu": place.get("mtu", 0),
        "addresses": own,
        "routes": routes(json.loads(_run("ip", "-json", "-4", "route", "show")[1] or "[]")),
        "admits": admitted(_text(wanted["firewall_rules"])),
        "clock": clock,
        "cores": info.get("NCPU") or len(os.sched_getaffinity(0)),
        "memory": info.get("MemTotal") or memory(_text("/proc/meminfo")),
        "disk": disk(found_engine["data_root"]),
        "engine": found_engine,
        "swarm": swarm(info),
        "kernel": {name: kernel_has(name) for name in wanted["modules"]},
        "init": "systemd" if Path("/run/systemd/system").is_dir() else "other",
        "held": held(wanted["tcp_ports"], wanted["udp_ports"]),
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "address": {"type": "str", "default": ""},
            "tcp_ports": {"type": "list", "elements": "int", "default": []},
            "udp_ports": {"type": "list", "elements": "int", "default": []},
            "modules": {"type": "list", "elements": "str", "default": ["ip_vs", "vxlan", "nfs", "nfsd", "esp4"]},
            "firewall_rules": {"type": "path", "default": "/etc/claude-code-firewall.nft"},
            "asked": {"type": "float", "default": 0},
            "socket": {"type": "path", "default": "/var/run/docker.sock"},
        },
        supports_check_mode=True,
    )
    if shutil.which("ip", path=PATH) is None:
        module.fail_json(msg="There is no program ip on this machine. Install it (apt install iproute2).")
    try:
        node = look(module.params)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        module.fail_json(msg=f"This machine could not be looked at: {type(error).__name__}: {error}")
    else:
        module.exit_json(changed=False, node=node)


if __name__ == "__main__":
    main()
