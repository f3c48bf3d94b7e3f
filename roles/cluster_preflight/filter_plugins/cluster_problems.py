"""Judge a set of machines: what keeps them from being one swarm, and what they had better not have."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Json = Mapping[str, Any]

OLDEST_ENGINE = (20, 10)
# What the engine takes where nothing is said. Swarm cuts /24 networks off its beginning, one after the other, so only
# there it gets in somebody's way.
DEFAULT_POOL, FIRST_NETWORKS = "10.0.0.0/8", 16
# Interfaces that Docker makes; what lies behind them is Docker's own to share out.
DOCKERS = re.compile(r"(lo|docker0|docker_gwbridge|br-[0-9a-f]{12}|veth.*|vx-.*|ov-.*)")
# Offered in place of a pool that overlaps, the first that does not.
OTHER_POOLS = [f"10.{second}.0.0/16" for second in (201, 77, 143)] + ["172.28.0.0/16", "192.168.224.0/20"]
# An overlay's packets: 1450 bytes and the 50 of VXLAN.
OVERLAY_PACKET = 1500
MOST_MANAGERS = 7
# Seconds that a question may take on its way through Ansible: so much less exact than one machine's to another.
SLACK = 10
SWARM_PORTS = {("tcp", 2377), ("tcp", 7946), ("udp", 7946), ("udp", 4789)}
ENGINE_PROCESSES = frozenset({"dockerd", "docker-proxy"})
# Listens for a preflight that was broken off, and is ended by the next one.
OUR_LISTENER = "cluster-reach"
KERNEL_PURPOSES = {
    "ip_vs": "balance ports and names (IPVS)",
    "vxlan": "carry networks over several machines (VXLAN)",
    "nfs": "mount NFS",
    "nfsd": "serve NFS",
}
UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
OUTCOMES = {
    "silent": "nothing comes back, as when a firewall drops it",
    "refused": "it is refused, as by a firewall that rejects it",
    "unreachable": "there is no way to it",
    "forbidden": "its own firewall lets nothing out",
    "stranger": "something else answers there",
}


@dataclasses.dataclass
class Findings:
    """Sentences, each with a machine's name, what is wrong, and what to do."""

    problems: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


def _names(names: Iterable[str]) -> str:
    """Write a list of names as in a sentence."""
    every = sorted(dict.fromkeys(names))
    return " and ".join(filter(None, [", ".join(every[:-1]), every[-1]])) if every else "none"


def _groups(values: Mapping[str, Any]) -> dict[Any, list[str]]:
    """Return each value with the names that have it."""
    found: dict[Any, list[str]] = defaultdict(list)
    for name, value in values.items():
        found[value].append(name)
    return found


def _shared(values: Mapping[str, Any]) -> dict[Any, list[str]]:
    return {value: names for value, names in _groups(values).items() if value and len(names) > 1}


def size(text: object) -> int:
    """Read an amount of memory as Docker does: 512M are 512 times 1024 times 1024 bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([bkmgt]?)(?:i?b)?", str(text).strip().lower())
    if found is None:
        raise ValueError(f"{text} is no amount of memory")
    return int(float(found[1]) * UNITS[found[2]])


# One machine beside the others


def _same(nodes: Mapping[str, Json]) -> list[list[str]]:
    """Return the names that mean one machine: the same run of the same kernel, seen from the same network."""
    return list(_shared({name: (node["boot_id"], node["network"]) for name, node in nodes.items()}).values())


def _machines(nodes: Mapping[str, Json], found: Findings) -> None:
    twice: set[str] = set()
    for names in _same(nodes):
        found.problems.append(f"{_names(names)} are one and the same machine. List it once.")
        twice.update(sorted(names)[1:])
    several = {name: node for name, node in nodes.items() if name not in twice}
    for hostname, names in _shared({name: node["hostname"].lower() for name, node in several.items()}).items():
        found.problems.append(
            f"{_names(names)} have the same host name, {hostname}. Give each its own (hostnamectl set-hostname NAME)."
        )
    for address, names in _shared({name: node["address"] for name, node in several.items()}).items():
        found.problems.append(
            f"{_names(names)} have the same address, {address}. Give each its own, the one in the network that they "
            "share (node_address)."
        )
    for names in _shared({name: node["machine_id"] for name, node in several.items()}).values():
        found.warnings.append(
            f"{_names(names)} have the same /etc/machine-id, as copies of one disk have, and may be given the same "
            "address by DHCP. Give each its own (rm /etc/machine-id; systemd-machine-id-setup; reboot)."
        )


def _addresses(nodes: Mapping[str, Json], found: Findings) -> None:
    for name, node in nodes.items():
        address, own = node["address"], [one["address"] for one in node["addresses"]]
        others = _names(one for one in own if not one.startswith("127."))
        if not address:
            found.problems.append(
                f"{name} has no default route to tell its address in the cluster by. Set node_address; it has {others}."
            )
        elif address not in own:
            found.problems.append(
                f"{name} does not have the address {address}. Set node_address to one that it has: {others}."
            )
        elif ipaddress.ip_address(address).is_loopback:
            found.problems.append(
                f"{name} has {address} as its address, which no other machine reaches. Set node_address to another: "
                f"{others}."
            )
        elif (known := node["swarm"]["address"]) and node["swarm"]["state"] == "active" and known != address:
            found.problems.append(
                f"{name} is in its swarm as {known}, but its address is {address}, and Swarm cannot change that. Set "
                f"node_address to {known} if the others reach it there, else take {name} out of its swarm first "
                "(docker swarm leave)."
            )


def _managers(managers: list[str], found: Findings) -> None:
    count = len(managers)
    if count == 2:
        found.warnings.append(
            f"There are two managers, {_names(managers)}: when one is lost, so is the swarm's majority, which makes "
            "two worse than one. Make it one or three."
        )
    elif count % 2 == 0:
        found.warnings.append(
            f"There are {count} managers, which bear no more losses than {count - 1}. Make it {count - 1} or "
            f"{count + 1}."
        )
    elif count > MOST_MANAGERS:
        found.warnings.append(
            f"There are {count} managers, and each one slows the swarm's decisions down. Make it {MOST_MANAGERS} at "
            "the most, the others workers."
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _engines(nodes: Mapping[str, Json], found: Findings) -> None:
    for name, node in nodes.items():
        engine = node["engine"]
        if engine["version"] and _version(engine["version"]) < OLDEST_ENGINE:
            found.problems.append(f"{name} runs Docker {engine['version']}. Upgrade it to 20.10 or newer.")
        if engine["live_restore"]:
            found.problems.append(
                f'{name} has "live-restore" on, with which the engine refuses a swarm. Take it out of '
                "/etc/docker/daemon.json "
                "and restart docker."
            )
        if engine["firewall_backend"] == "nftables":
            found.problems.append(
                f'{name} has "firewall-backend": "nftables", with which the engine refuses a swarm. Take it out of '
                "/etc/docker/daemon.json and restart docker."
            )
        if engine["config_error"]:
            found.problems.append(
                f"{name} has a /etc/docker/daemon.json with which the engine cannot start: "
                f"{engine['config_error']}. Correct it."
            )
    versions = {name: node["engine"]["version"] for name, node in nodes.items() if node["engine"]["version"]}
    if len({_version(version)[:1] for version in versions.values()}) > 1:
        said = ", ".join(f"{version} on {_names(names)}" for version, names in sorted(_groups(versions).items()))
        found.warnings.append(f"The machines run different versions of Docker: {said}. Bring them to the same one.")


def _swarms(nodes: Mapping[str, Json], found: Findings) -> None:
    """Find machines of different swarms. Workers do not know their swarm's name, but its managers."""
    swarms: list[tuple[set[str], set[str]]] = []  # what a swarm is known by, and who is in it
    for name, node in sorted(nodes.items()):
        own = node["swarm"]
        signs = set(own["managers"]) | ({own["node_id"], own["cluster_id"]} if own["manager"] else set())
        if own["state"] != "active" or not signs:
            continue
        members = {name}
        for other in [one for one in swarms if one[0] & signs]:
            swarms.remove(other)
            signs |= other[0]
            members |= other[1]
        swarms.append((signs, members))
    if len(swarms) > 1:
        said = "; ".join(
            f"{_names(members)} in one" if number == 0 else f"{_names(members)} in another"
            for number, (_, members) in enumerate(sorted(swarms, key=lambda one: (-len(one[1]), min(one[1]))))
        )
        found.problems.append(
            f"The machines are in {len(swarms)} different swarms: {said}. Take those out that are to join (docker "
            "swarm leave)."
        )


# Networks


def _networks(nodes: Mapping[str, Json]) -> Iterator[tuple[ipaddress.IPv4Network, str, str]]:
    """Return every network that a machine reaches but through Docker, with the machine and the interface."""
    for name, node in nodes.items():
        own = [(f"{one['address']}/{one['prefix']}", one["interface"]) for one in node["addresses"]]
        routes = [(one["destination"], one["interface"]) for one in node["routes"]]
        for network, interface in dict.fromkeys(own + routes):
            if not DOCKERS.fullmatch(interface):
                yield ipaddress.IPv4Network(network, strict=False), name, interface


def _pools(nodes: Mapping[str, Json], pools: list[str], found: Findings) -> None:
    existing: list[str] = next((node["swarm"]["pools"] for node in nodes.values() if node["swarm"]["pools"]), [])
    taken = list(_networks(nodes))
    for text in existing or pools or [DEFAULT_POOL]:
        pool = ipaddress.IPv4Network(text, strict=False)
        used = [pool]
        if text == DEFAULT_POOL:
            used = list(ipaddress.summarize_address_range(pool[0], pool[256 * FIRST_NETWORKS - 1]))
        overlaps = {
            (str(network), interface, name)
            for network, name, interface in taken
            if any(network.overlaps(part) for part in used)
        }
        if not overlaps:
            continue
        said = ", ".join(f"{network} ({interface}) on {name}" for network, interface, name in sorted(overlaps))
        overlap = f"Swarm takes its networks from {text}, which overlaps with {said}: containers would not reach those."
        free = next(
            (
                one
                for one in OTHER_POOLS
                if not any(ipaddress.IPv4Network(one).overlaps(network) for network, _, _ in taken)
            ),
            "a network that none of the machines reaches",
        )
        if existing:
            found.warnings.append(f"{overlap} It is fixed for this swarm; only one that is made anew can have another.")
        elif len(nodes) == 1 and not pools:
            # Usual for a virtual machine behind NAT (10.0.2.0/24), and beyond the two networks that one machine needs.
            found.warnings.append(f"{overlap} That can be avoided: set swarm_manager_default_addr_pool to [{free}].")
        else:
            found.problems.append(f"{overlap} Set swarm_manager_default_addr_pool to another, such as [{free}].")


# What a machine has to give


def _disks(nodes: Mapping[str, Json], least: int, found: Findings) -> None:
    for name, node in nodes.items():
        disk = node["disk"]
        if disk["free_mb"] < least:
            found.problems.append(
                f"{name} has {disk['free_mb']} MB of disk free at {disk['path']}, where Docker keeps its data; "
                f"{least} MB are "
                'needed. Free some space (docker image prune), or move the data to a larger disk ("data-root" in '
                "/etc/docker/daemon.json)."
            )


def _held(nodes: Mapping[str, Json], port: int, found: Findings) -> None:
    for name, node in nodes.items():
        for one in node["held"]:
            key, holder = (one["protocol"], one["port"]), one["holder"]
            if holder == OUR_LISTENER or holder in ENGINE_PROCESSES or (holder == "the kernel" and key[0] == "udp"):
                continue
            if key in SWARM_PORTS:
                found.problems.append(f"{name} has {holder} on port {key[1]}/{key[0]}, which Swarm needs. Stop it.")
            elif key == ("tcp", port):
                found.problems.append(
                    f"{name} has {holder} on port {port}, which the API is to have on every machine. Stop it, or set "
                    "app_stack_port to another port."
                )


def _kernels(nodes: Mapping[str, Json], nfs_server: str, found: Findings) -> None:
    lacking: dict[str, tuple[str, ...]] = {}
    for name, node in nodes.items():
        needed = ["ip_vs", "vxlan"] + ([] if not nfs_server else ["nfsd"] if name == nfs_server else ["nfs"])
        lacking[name] = tuple(part for part in needed if not node["kernel"].get(part, True))
    for parts, names in _groups(lacking).items():
        if not parts:
            continue
        found.problems.append(
            f"The kernel of {_names(names)} cannot {_names(KERNEL_PURPOSES[part] for part in parts)}: it has no "
            f"{_names(parts)}. Boot one that has (apt install linux-image-amd64), or leave the machine out."
        )


def _replicas(nodes: Mapping[str, Json], wanted: Json, found: Findings) -> None:
    cpu, memory = float(wanted["cpu"] or 0), size(wanted["memory"] or 0)

    def room(node: Json) -> int:
        fit = [int(node["cores"] / cpu + 1e-9)] if cpu else []
        fit += [node["memory"] // memory] if memory else []
        return int(min(fit, default=wanted["replicas"]))

    fit = {name: room(node) for name, node in nodes.items() if name in wanted["agents"]}
    total = sum(fit.values())
    if total < wanted["replicas"]:
        text = (
            f"{wanted['replicas']} replicas do not fit, but {total}: "
            + ", ".join(f"{count} on {name}" for name, count in sorted(fit.items()))
            + f". Each is given {cpu:g} cores and {memory >> 20} MB (app_stack_cpu_reservation, "
            f"app_stack_memory_reservation). Give them less, add machines, or set app_stack_replicas to {total} or "
            "less."
        )
        (found.warnings if wanted["unknown"] else found.problems).append(text)


# Between the machines


def _apart(nodes: Mapping[str, Json]) -> Callable[[str, str], bool]:
    """Return whether two names mean machines that can be told apart on the network; else nothing follows from a try."""
    mixed = [set(names) for names in _same(nodes)]
    mixed += [set(names) for names in _shared({name: node["address"] for name, node in nodes.items()}).values()]
    return lambda one, other: not any(one in names or other in names for names in mixed)


def _reach(nodes: Mapping[str, Json], reach: Mapping[str, Json], found: Findings) -> None:
    apart = _apart(nodes)
    tried: dict[tuple[str, str], dict[tuple[str, int], str]] = defaultdict(dict)
    for asker, result in reach.items():
        for one in result["tried"]:
            if apart(asker, one["peer"]):
                tried[asker, one["peer"]][one["protocol"], one["port"]] = one["outcome"]
    failed = {
        pair: frozenset(port for port, outcome in ports.items() if outcome != "open") for pair, ports in tried.items()
    }

    def how(pairs: list[tuple[str, str]]) -> str:
        ports = _names(f"{protocol} {port}" for pair in pairs for protocol, port in failed[pair])
        whole = all(failed[pair] == tried[pair].keys() for pair in pairs) and len(tried[pairs[0]]) > 1
        outcomes = sorted({tried[pair][port] for pair in pairs for port in failed[pair]})
        return f"on {'any of ' * whole}{ports}: {'; '.join(OUTCOMES[outcome] for outcome in outcomes)}"

    def place(peer: str) -> str:
        return f"{peer} ({nodes[peer]['address']})" if peer in nodes else f"the NFS server {peer}"

    left = {pair for pair, ports in failed.items() if ports}
    for name in sorted({peer for _, peer in left}):
        pairs = [pair for pair in failed if pair[1] == name]
        if len(pairs) > 1 and left.issuperset(pairs):
            left -= set(pairs)
            found.problems.append(
                f"No other machine reaches {place(name)} {how(pairs)}. Open that in the firewall of {name} for "
                f"{_names(asker for asker, _ in pairs)}, and look at its network."
            )
    for name in sorted({asker for asker, _ in left}):
        pairs = [pair for pair in failed if pair[0] == name]
        if len(pairs) > 1 and all(failed[pair] for pair in pairs):
            left -= set(pairs)
            found.problems.append(
                f"{name} reaches no other machine {how(pairs)}. Look at what the firewall of {name} lets out, and "
                "at its network."
            )
    for asker, peer in sorted(left, key=lambda pair: (pair[1], pair[0])):
        found.problems.append(
            f"{asker} does not reach {place(peer)} {how([(asker, peer)])}. Open that in the firewall of {peer} for "
            f"{asker} ({nodes[asker]['address']})."
        )


def _strangers(nodes: Mapping[str, Json], reach: Mapping[str, Json], found: Findings) -> None:
    """A machine that is left out (--limit) cannot be told of one that is new."""
    for peer in sorted(nodes.keys() - reach.keys()):
        if new := [asker for asker in sorted(reach) if asker in nodes and _shut_out(asker, peer, nodes)]:
            found.problems.append(
                f"The firewall of {peer} does not know {_names(new)} yet, and {peer} is left out of this run. Run "
                "it once without --limit."
            )


def _paths(nodes: Mapping[str, Json], reach: Mapping[str, Json], found: Findings) -> None:
    apart = _apart(nodes)
    stuck: dict[tuple[int, int], list[tuple[str, str]]] = defaultdict(list)  # by MTU and what passes: from whom to whom
    for name, result in sorted(reach.items()):
        paths = {peer: path for peer, path in result["paths"].items() if apart(name, peer) and path["source"]}
        address = nodes[name]["address"]
        sources = _groups(
            {peer: path["source"] for peer, path in paths.items() if path["source"] != address and peer in nodes}
        )
        for source, peers in sorted(sources.items()):
            found.problems.append(
                f"{name} sends to {_names(peers)} from {source}, not from its address {address}, and what Swarm "
                f"sends from there is dropped. Set node_address of {name} to {source}, or correct its routes."
            )
        for peer, path in paths.items():
            # A smaller MTU on the way does no harm where routers say so and the kernel learns it.
            if 0 < path["passes"] < path["mtu"] and path["learned"] > path["passes"]:
                stuck[path["mtu"], path["passes"]].append((name, peer))
        small = {peer: path for peer, path in paths.items() if 0 < path["learned"] < OVERLAY_PACKET}
        if small:
            found.warnings.append(
                f"{name} sends packets of only {min(path['learned'] for path in small.values())} bytes to "
                f"{_names(small)}; Swarm's have {OVERLAY_PACKET} and will be sent in pieces, which is slow. Raise "
                "the MTU if the network allows it."
            )
    for (mtu, most), pairs in sorted(stuck.items()):
        senders, receivers = zip(*pairs, strict=True)
        found.problems.append(
            f"Of the packets of up to {mtu} bytes (the MTU) that {_names(senders)} may send, only those of up to "
            f"{most} arrive at {_names(receivers)}, and nothing says so: connections would hang. Set the MTU of all "
            "machines to what the network between them carries."
        )


def _clocks(nodes: Mapping[str, Json], reach: Mapping[str, Json], most: float, found: Findings) -> None:
    apart = _apart(nodes)
    ahead: dict[str, dict[str, float]] = defaultdict(dict)  # by how much a machine is ahead of another
    for asker, result in reach.items():
        for peer, path in result["paths"].items():
            if path.get("ahead") is not None and peer in nodes and apart(asker, peer):
                ahead[peer][asker] = path["ahead"]
                ahead[asker].setdefault(peer, -path["ahead"])
    # Where none of a machine's ports could be asked, what Ansible saw must do.
    seen = {name: node["clock"]["ahead"] for name, node in nodes.items() if node["clock"]}
    slack = dict.fromkeys(ahead, 0.0)
    if len(seen) > 1:
        for name in seen.keys() - ahead.keys():
            slack[name] = SLACK
            ahead[name] = {other: seen[name] - seen[other] for other in seen if other != name}
    # Each beside most of the others: the one that is wrong is far from all, the rest are near each other.
    typical = {name: sorted(offsets.values(), key=abs)[(len(offsets) - 1) // 2] for name, offsets in ahead.items()}
    wrong = {name: offset for name, offset in typical.items() if abs(offset) > most + slack[name]}
    if not wrong:
        return
    if len(wrong) == len(typical):
        widest = max(abs(offset) for offset in wrong.values())
        found.problems.append(
            f"The clocks of {_names(wrong)} are {widest:.0f} seconds apart; {most:g} are allowed. Let all keep the "
            "time by NTP (apt install systemd-timesyncd)."
        )
        return
    for name, offset in sorted(wrong.items()):
        found.problems.append(
            f"The clock of {name} is {abs(offset):.0f} seconds {'ahead of' if offset > 0 else 'behind'} the other "
            f"machines'; {most:g} are allowed. Let it keep the time by NTP (apt install systemd-timesyncd)."
        )


def cluster_problems(nodes: Mapping[str, Json], reach: Mapping[str, Json], wanted: Json) -> dict[str, list[str]]:
    """Return ``problems``, with which the machines cannot be one swarm, and ``warnings``.

    ``nodes`` has what cluster_node says of each machine, ``reach`` what cluster_reach found from those that tried.
    ``wanted`` has managers, agents, nfs_server, replicas, cpu, memory, disk_mb, clock_skew_seconds, pools, port,
    addresses (as far as they were given), and unknown: the machines that could not be looked at, with the reason.
    """
    found = Findings()
    nodes = dict(sorted(nodes.items()))
    for name, reason in sorted(wanted["unknown"].items()):
        found.warnings.append(
            f"{name} is left out by --limit and could not be looked at ({reason.strip().rstrip('.')}). Nothing "
            "about it was checked."
        )
        if not wanted["addresses"].get(name):
            found.problems.append(
                f"{name} is left out and does not answer, so its address is not known, and the others would shut it "
                "out when it is back. Give it in the inventory (node_address), or take the machine out of that."
            )
    _engines(nodes, found)
    _swarms(nodes, found)
    _pools(nodes, wanted["pools"], found)
    _disks(nodes, wanted["disk_mb"], found)
    _replicas(nodes, wanted, found)
    if len(nodes) + len(wanted["unknown"]) > 1:
        _machines(nodes, found)
        _addresses(nodes, found)
        _managers(wanted["managers"], found)
        _held(nodes, wanted["port"], found)
        _kernels(nodes, wanted["nfs_server"], found)
        _reach(nodes, reach, found)
        _strangers(nodes, reach, found)
        _paths(nodes, reach, found)
        _clocks(nodes, reach, wanted["clock_skew_seconds"], found)
    return dataclasses.asdict(found)


# Who tries what


def cluster_listens(node: Json, tcp_ports: list[int], udp_ports: list[int]) -> dict[str, list[int]]:
    """Return the ports on which a machine may be listened for the others.

    None of Swarm's own once its engine is in a swarm: it may want one of them at any moment.
    """
    busy = {(one["protocol"], one["port"]) for one in node["held"] if one["holder"] != OUR_LISTENER}
    if node["swarm"]["state"] != "inactive":
        busy |= SWARM_PORTS
    return {
        "tcp": [port for port in tcp_ports if ("tcp", port) not in busy],
        "udp": [port for port in udp_ports if ("udp", port) not in busy],
    }


def _shut_out(asker: str, peer: str, nodes: Mapping[str, Json]) -> bool:
    """Return whether our own firewall, from an earlier run, does not know a machine that is new in the inventory."""
    admits = nodes[peer]["admits"]
    return admits is not None and nodes[asker]["address"] not in admits


def cluster_peers(
    nodes: Mapping[str, Json], listening: Mapping[str, Json], asker: str, nfs_server: str = ""
) -> list[dict[str, Any]]:
    """Return what ``asker`` shall try: the ports on which our listener answers, and the real services' over TCP.

    ``listening`` has what cluster_reach returned on those machines that listen. An NFS server that is none of the
    machines is tried by its address. Machines whose firewall learns of ``asker`` only in this run are left out.
    """
    peers = []
    for name, node in sorted(nodes.items()):
        if _shut_out(asker, name, nodes):
            continue
        ours = listening.get(name, {})
        echoes = [{**one, "echo": True} for one in ours.get("listening", [])]
        known = {(one["protocol"], one["port"]) for one in echoes}
        wanted = SWARM_PORTS | ({("tcp", 2049)} if name == nfs_server else set())
        real = [
            {"protocol": one["protocol"], "port": one["port"], "echo": False}
            for one in node["held"]
            if one["protocol"] == "tcp"
            and (one["protocol"], one["port"]) in wanted - known
            and one["holder"] in ENGINE_PROCESSES | {"the kernel"}
        ]
        if node["address"]:
            peers.append(
                {"name": name, "address": node["address"], "token": ours.get("token", ""), "ports": echoes + real}
            )
    if nfs_server and nfs_server not in nodes:
        ports = [{"protocol": "tcp", "port": 2049, "echo": False}]
        peers.append({"name": nfs_server, "address": nfs_server, "token": "", "ports": ports})
    return peers


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "cluster_problems": cluster_problems,
            "cluster_listens": cluster_listens,
            "cluster_peers": cluster_peers,
        }
