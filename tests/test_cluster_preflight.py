"""What the role cluster_preflight finds wrong with a set of machines, and how it looks."""

import importlib.util
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROLE = Path(__file__).resolve().parent.parent / "roles" / "cluster_preflight"
Json = dict[str, Any]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROLE / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


judge = load("filter_plugins/cluster_problems.py")
look = load("library/cluster_node.py")
reach = load("library/cluster_reach.py")

GIB = 1 << 30
WANTED: Json = {
    "managers": ["a"],
    "nfs_server": "a",
    "replicas": 5,
    "cpu": "0.25",
    "memory": "512M",
    "port": 3000,
    "pools": ["10.77.0.0/16"],
    "disk_mb": 2048,
    "clock_skew_seconds": 5,
    "unknown": {},
    "addresses": {"c": "192.168.9.3"},
}
NO_SWARM = {
    "state": "inactive",
    "node_id": "",
    "address": "",
    "manager": False,
    "cluster_id": "",
    "managers": [],
    "pools": [],
    "error": "",
}
ENGINE = {
    "version": "26.1.5",
    "live_restore": False,
    "firewall_backend": "iptables",
    "config_error": "",
}


def address_of(name: str) -> str:
    return f"192.168.9.{ord(name[-1]) - ord('a') + 1}"


def node(name: str, **more: Any) -> Json:
    address = more.get("address", address_of(name))
    return {
        "hostname": name,
        "machine_id": f"machine-{name}",
        "boot_id": f"boot-{name}",
        "network": 1,
        "address": address,
        "interface": "eth1",
        "addresses": [
            {"address": "127.0.0.1", "prefix": 8, "interface": "lo", "mtu": 65536},
            {"address": address_of(name), "prefix": 24, "interface": "eth1", "mtu": 1500},
        ],
        "routes": [],
        "clock": {},
        "cores": 2,
        "memory": 8 * GIB,
        "disk": {"path": "/var/lib/docker", "free_mb": 9000},
        "engine": ENGINE | more.pop("engine", {}),
        "swarm": NO_SWARM | more.pop("swarm", {}),
        "kernel": {"ip_vs": True, "vxlan": True, "nfs": True, "nfsd": True},
        "held": [],
        "admits": None,
    } | more


def cluster(names: str = "abc", **changed: Json) -> dict[str, Json]:
    return {name: node(name, **changed.get(name, {})) for name in names}


PORTS = {("tcp", 2377), ("tcp", 7946), ("udp", 7946), ("udp", 4789)}


def tries(
    names: str = "abc",
    fails: Callable[[str, str, str, int], str] = lambda *_: "",
    **paths: dict[str, Json],
) -> dict[str, Json]:
    """What every machine finds when all is well but what ``fails`` gives another outcome."""
    return {
        asker: {
            "tried": [
                {"peer": peer, "protocol": protocol, "port": port}
                | {"outcome": fails(asker, peer, protocol, port) or "open"}
                for peer in names
                if peer != asker
                for protocol, port in sorted(PORTS)
                if port != 2377 or peer == "a"
            ],
            "paths": {
                peer: {"source": address_of(asker), "mtu": 1500, "learned": 1500, "passes": 1500}
                | {"ahead": 0.01, "seconds": 0.01}
                | paths.get(asker, {}).get(peer, {})
                for peer in names
                if peer != asker
            },
        }
        for asker in names
    }


def found(nodes: dict[str, Json], tried: dict[str, Json] | None = None, **wanted: Any) -> Json:
    tried = tries("".join(nodes)) if tried is None and len(nodes) > 1 else tried or {}
    return dict(judge.cluster_problems(nodes, tried, WANTED | {"agents": list(nodes)} | wanted))


def problem(nodes: dict[str, Json], tried: dict[str, Json] | None = None, **wanted: Any) -> str:
    everything = found(nodes, tried, **wanted)
    assert everything["warnings"] == []
    (sentence,) = everything["problems"]
    return str(sentence)


def warning(nodes: dict[str, Json], tried: dict[str, Json] | None = None, **wanted: Any) -> str:
    everything = found(nodes, tried, **wanted)
    assert everything["problems"] == []
    (sentence,) = everything["warnings"]
    return str(sentence)


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcdefgh"])
def test_machines_that_fit_each_other_are_left_in_peace(names: str) -> None:
    assert found(cluster(names)) == {"problems": [], "warnings": []}


def test_all_that_is_wrong_is_said_at_once() -> None:
    nodes = cluster(b={"disk": {"path": "/", "free_mb": 3}}, c={"engine": {"live_restore": True}})
    dropped = tries(fails=lambda by, *_: "silent" * (by == "a"))
    assert len(found(nodes, dropped)["problems"]) == 3


def test_a_machine_that_is_listed_twice_is_found_whatever_it_is_called() -> None:
    one = node("a")
    nodes = {"a": one, "b": {**one, "address": "192.168.9.1"}, "c": node("c")}
    everything = found(nodes, tries(fails=lambda asker, peer, *_: "refused" * (peer == "a")))
    assert everything["problems"] == ["a and b are one and the same machine. List it once."]


def test_containers_of_one_machine_are_not_one_machine() -> None:
    boot = {"boot_id": "same"}
    assert found(cluster(a=boot, b={**boot, "network": 2}, c={**boot, "network": 3})) == {
        "problems": [],
        "warnings": [],
    }


def test_host_names_and_addresses_must_differ_and_copied_disks_are_warned_of() -> None:
    assert "a and c have the same host name, a." in problem(cluster(c={"hostname": "A"}))
    own = {"addresses": node("a")["addresses"], "address": address_of("a")}
    assert "a and b have the same address, 192.168.9.1." in problem(cluster(b=own))
    assert "a and b have the same /etc/machine-id" in warning(
        cluster(b={"machine_id": "machine-a"})
    )


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("", "b has no default route to tell its address in the cluster by."),
        ("192.168.9.77", "b does not have the address 192.168.9.77. Set node_address to one that"),
        ("127.0.0.1", "b has 127.0.0.1 as its address, which no other machine reaches."),
    ],
)
def test_a_machine_needs_an_address_of_its_own_that_others_reach(
    address: str, sentence: str
) -> None:
    said = problem(cluster("ab", b={"address": address}), {})
    assert said.startswith(sentence)
    assert said.rstrip(".").endswith("192.168.9.2")
    assert found(cluster("a", a={"address": address}))["problems"] == []


def test_the_address_that_a_swarm_knows_cannot_be_changed() -> None:
    swarm = {"state": "active", "address": "127.0.0.1", "manager": True, "node_id": "n"}
    assert "a is in its swarm as 127.0.0.1, but its address is 192.168.9.1" in problem(
        cluster(a={"swarm": swarm})
    )


@pytest.mark.parametrize(
    ("count", "sentence"),
    [(1, ""), (2, "two worse than one"), (3, ""), (4, "3 or 5"), (7, ""), (9, "7 at the most")],
)
def test_the_number_of_managers_is_warned_of_where_it_does_not_help(
    count: int, sentence: str
) -> None:
    warnings = found(cluster(), managers=["m"] * count)["warnings"]
    assert bool(warnings) == bool(sentence) and sentence in "".join(warnings)


def test_an_engine_that_cannot_run_a_swarm_is_named() -> None:
    assert 'b has "live-restore" on' in problem(cluster(b={"engine": {"live_restore": True}}))
    nftables = {"firewall_backend": "nftables"}
    assert 'c has "firewall-backend"' in problem(cluster(c={"engine": nftables}))
    assert "c has a /etc/docker/daemon.json with which the engine cannot start: oh" in problem(
        cluster(c={"engine": {"config_error": "oh"}})
    )
    assert found(cluster(c={"engine": {"version": ""}}))["problems"] == []


def test_old_engines_are_refused_and_different_ones_warned_of() -> None:
    older = {"engine": {"version": "20.10.24+dfsg1"}}
    assert "20.10.24+dfsg1 on c, 26.1.5 on a and b" in warning(cluster(c=older))
    assert found(cluster(c={"engine": {"version": "26.0.1"}}))["warnings"] == []
    oldest = {"engine": {"version": "19.03.8"}}
    assert found(cluster(c=oldest))["problems"] == [
        "c runs Docker 19.03.8. Upgrade it to 20.10 or newer."
    ]


def manager(name: str, cluster_id: str, *managers: str) -> Json:
    return {
        "swarm": {
            "state": "active",
            "manager": True,
            "node_id": name,
            "cluster_id": cluster_id,
            "managers": list(managers or [name]),
            "address": address_of(name),
        }
    }


def worker(name: str, *managers: str) -> Json:
    own = {"state": "active", "managers": list(managers), "address": address_of(name)}
    return {"swarm": own}


def test_machines_of_different_swarms_are_told_apart() -> None:
    one, other = manager("a", "one", "a", "b"), manager("c", "other")
    assert (
        found(cluster(a=one, b=manager("b", "one", "a", "b"), c=worker("c", "b")))["problems"] == []
    )
    assert "a and b in one; c in another" in problem(cluster(a=one, b=worker("b", "a"), c=other))
    assert "a and b in one; c in another" in problem(
        cluster(a=one, b=worker("b", "a"), c=worker("c", "x"))
    )
    assert found(cluster(a=one))["problems"] == []


def network(text: str, interface: str = "eth0") -> Json:
    return {"routes": [{"destination": text, "interface": interface}]}


@pytest.mark.parametrize(
    ("pools", "route", "clashes"),
    [
        ([], network("10.0.2.0/24"), True),
        ([], network("10.0.15.0/24"), True),
        ([], network("10.0.16.0/24"), False),  # Swarm will not come to it
        ([], network("10.0.0.0/8", "tun0"), True),
        ([], network("172.16.0.0/12"), False),
        (["10.77.0.0/16"], network("10.77.200.1"), True),
        (["10.77.0.0/16"], network("10.0.2.0/24"), False),
        (["10.77.0.0/16", "192.168.0.0/16"], {}, True),
        *(([], network("10.0.1.0/24", one), False) for one in ("docker_gwbridge", "veth1", "lo")),
        ([], network("10.0.1.0/24", "br-0123456789ab"), False),
        ([], network("10.0.1.0/24", "br-lan"), True),
    ],
)
def test_a_pool_must_be_clear_of_what_a_machine_reaches(
    pools: list[str], route: Json, clashes: bool
) -> None:
    everything = found(cluster(b=route), pools=pools)
    assert bool(everything["problems"]) == clashes and everything["warnings"] == []
    assert all("on b" in one or "on a" in one for one in everything["problems"])


def test_another_pool_is_offered_and_that_of_a_swarm_that_exists_only_warned_of() -> None:
    taken = network("10.0.2.0/24")
    taken["routes"] += network("10.201.0.0/16")["routes"]
    assert "such as [10.77.0.0/16]" in problem(cluster(a=taken), pools=[])
    swarm = manager("a", "one")
    swarm["swarm"]["pools"] = ["10.0.0.0/8"]
    assert "It is fixed for this swarm" in warning(cluster(a=swarm | taken))


def test_a_full_disk_is_named_with_its_machine() -> None:
    full = {"disk": {"path": "/data", "free_mb": 12}}
    assert problem(cluster(b=full)).startswith("b has 12 MB of disk free at /data")


@pytest.mark.parametrize(
    ("protocol", "port", "holder", "sentence"),
    [
        ("tcp", 2377, "nginx", "b has nginx on port 2377/tcp, which Swarm needs. Stop it."),
        ("udp", 4789, "nc", "b has nc on port 4789/udp, which Swarm needs. Stop it."),
        ("tcp", 3000, "node", "b has node on port 3000, which the API is to have on every machine"),
        ("udp", 4789, "the kernel", ""),
        ("tcp", 7946, "dockerd", ""),
        ("tcp", 7946, "cluster-reach", ""),
        ("tcp", 3000, "docker-proxy", ""),
        ("tcp", 2049, "the kernel", ""),
    ],
)
def test_a_port_that_is_needed_must_not_be_another_ones(
    protocol: str, port: int, holder: str, sentence: str
) -> None:
    held = {"held": [{"protocol": protocol, "port": port, "holder": holder}]}
    problems = found(cluster(b=held))["problems"]
    assert bool(problems) == bool(sentence) and "".join(problems).startswith(sentence)


def test_a_kernel_without_what_a_cluster_needs_is_refused_unless_it_is_alone() -> None:
    bare = {"kernel": dict.fromkeys(("ip_vs", "vxlan", "nfs", "nfsd"), False)}
    assert "The kernel of b and c cannot" in (said := problem(cluster(b=bare, c=bare)))
    assert "has no ip_vs, nfs and vxlan" in said
    assert "has no ip_vs, nfsd and vxlan" in problem(cluster(a=bare))
    assert "has no ip_vs and vxlan" in problem(cluster(a=bare), nfs_server="")
    assert found(cluster("a", a=bare))["problems"] == []


def test_replicas_must_fit_by_cores_and_by_memory() -> None:
    small = {"cores": 1, "memory": GIB}
    nodes = cluster("ab", a=small, b=small)  # 2 each: memory
    assert found(nodes, replicas=4)["problems"] == []
    assert "5 replicas do not fit, but 4: 2 on a, 2 on b" in (said := problem(nodes, replicas=5))
    assert "app_stack_replicas to 4 or less" in said
    assert "but 2: 1 on a, 1 on b" in problem(nodes, replicas=3, cpu="0.6")
    # A machine that only serves files, or manages, has no room to give.
    assert "3 replicas do not fit, but 2: 2 on b." in problem(nodes, replicas=3, agents=["b"])
    assert found(nodes, replicas=50, cpu="0", memory=0)["problems"] == []
    warnings = found(nodes, unknown={"c": "Timed out."})["warnings"]
    assert "could not be looked at (Timed out). Nothing" in warnings[0]
    assert "do not fit" in warnings[1]


@pytest.mark.parametrize(
    ("text", "number"),
    [("512M", 512 << 20), ("2g", 2 << 30), ("1.5GiB", 3 << 29), ("64mb", 64 << 20), (0, 0)],
)
def test_memory_is_read_as_docker_reads_it(text: object, number: int) -> None:
    assert judge.size(text) == number
    with pytest.raises(ValueError, match="is no amount of memory"):
        judge.size(f"{text}x")


def test_a_port_that_nobody_reaches_is_the_fault_of_its_machine() -> None:
    said = problem(
        cluster(), tries(fails=lambda _, to, p, n: "silent" * ((to, p, n) == ("c", "udp", 7946)))
    )
    assert said.startswith(
        "No other machine reaches c (192.168.9.3) on udp 7946: nothing comes back"
    )
    assert "in the firewall of c for a and b" in said


def test_a_machine_that_reaches_nobody_is_at_fault_itself() -> None:
    said = problem(
        cluster(), tries(fails=lambda by, _, p, n: "forbidden" * ((by, p, n) == ("c", "udp", 4789)))
    )
    assert said.startswith("c reaches no other machine on udp 4789: its own firewall lets nothing")


def test_a_single_pair_is_named() -> None:
    said = problem(
        cluster(), tries(fails=lambda by, to, p, n: "refused" * ((by, to, n) == ("b", "a", 2377)))
    )
    assert said.startswith("b does not reach a (192.168.9.1) on tcp 2377: it is refused")
    assert "in the firewall of a for b (192.168.9.2)" in said


def test_a_machine_that_is_cut_off_is_named_in_both_directions() -> None:
    everything = found(cluster(), tries(fails=lambda by, to, *_: "silent" * ("c" in (by, to))))
    assert [one.split(" on any of ")[0] for one in everything["problems"]] == [
        "No other machine reaches c (192.168.9.3)",
        "c reaches no other machine",
    ]


def test_of_two_machines_the_one_that_does_not_answer_is_named() -> None:
    said = problem(
        cluster("ab"),
        tries("ab", lambda _, to, p, n: "silent" * ((to, p, n) == ("b", "udp", 4789))),
    )
    assert said.startswith("a does not reach b (192.168.9.2) on udp 4789")


def test_an_nfs_server_that_is_none_of_the_machines_is_named() -> None:
    tried = tries()
    for one in tried.values():
        one["tried"].append({"peer": "nas", "protocol": "tcp", "port": 2049, "outcome": "silent"})
        one["paths"]["nas"] = {"source": "192.168.7.1", "mtu": 1500, "learned": 1500, "passes": 0}
    assert problem(cluster(), tried, nfs_server="nas").startswith(
        "No other machine reaches the NFS server nas on tcp 2049"
    )


def test_the_kernels_choice_of_a_source_must_be_the_address() -> None:
    other = {"source": "192.168.9.200"}
    said = problem(cluster(), tries(b={"a": other, "c": other}))
    assert said.startswith(
        "b sends to a and c from 192.168.9.200, not from its address 192.168.9.2"
    )


def test_packets_that_are_lost_in_silence_are_refused_and_small_ones_warned_of() -> None:
    jumbo = {"mtu": 9000, "learned": 9000}
    lossy = tries(a={"b": jumbo, "c": jumbo}, b={"a": jumbo})
    assert (
        "of up to 9000 bytes (the MTU) that a and b may send, only those of up to 1500"
        in problem(cluster(), lossy)
    )
    learned = {"mtu": 9000, "learned": 1500}  # a router says so
    assert found(cluster(), tries(a={"b": learned}))["problems"] == []
    small = {"mtu": 1400, "learned": 1400, "passes": 1400}
    assert warning(cluster(), tries(a={"b": small})).startswith(
        "a sends packets of only 1400 bytes to b"
    )
    untried = {"passes": 0, "mtu": 9000, "learned": 9000}
    assert found(cluster(), tries(a={"b": untried})) == {"problems": [], "warnings": []}


def clocks(names: str, **ahead: float) -> dict[str, Json]:
    tried = tries(names)
    for by, result in tried.items():
        for to, path in result["paths"].items():
            path["ahead"] = ahead.get(to, 0.0) - ahead.get(by, 0.0)
    return tried


def test_the_clock_that_is_wrong_is_named_and_of_two_both() -> None:
    assert problem(cluster(), clocks("abc", b=60.0)).startswith(
        "The clock of b is 60 seconds ahead of"
    )
    assert "The clock of c is 60 seconds behind" in problem(cluster(), clocks("abc", c=-60.0))
    assert "The clocks of a and b are 7 seconds apart; 5 are" in problem(
        cluster("ab"), clocks("ab", b=7.0)
    )
    assert found(cluster(), clocks("abc", b=4.9))["problems"] == []
    two = found(cluster("abcde"), clocks("abcde", b=60.0, d=-30.0))["problems"]
    assert [one.split(" is ")[0] for one in two] == ["The clock of b", "The clock of d"]


def test_where_no_port_could_be_asked_ansibles_view_of_the_clocks_must_do() -> None:
    tried = tries()
    for one in tried.values():
        for path in one["paths"].values():
            del path["ahead"]
    nodes = cluster()
    for name, late in (("a", 1.0), ("b", 9.0), ("c", 2.0)):
        nodes[name]["clock"] = {"ahead": late}
    assert found(nodes, tried)["problems"] == []
    nodes["b"]["clock"]["ahead"] = 63.0
    assert "The clock of b is 61 seconds ahead" in problem(nodes, tried)


LISTENED = ([2377, 7946, 2049], [7946, 4789])


def test_nothing_is_listened_on_that_a_service_or_a_swarm_may_want() -> None:
    assert judge.cluster_listens(node("a"), *LISTENED) == {"tcp": LISTENED[0], "udp": LISTENED[1]}
    held = [{"protocol": "tcp", "port": 7946, "holder": "nginx"}]
    held += [{"protocol": "udp", "port": 7946, "holder": "cluster-reach"}]
    assert judge.cluster_listens(node("a", held=held), *LISTENED) == {
        "tcp": [2377, 2049],
        "udp": LISTENED[1],
    }
    swarm = manager("a", "one")
    assert judge.cluster_listens(node("a", **swarm), *LISTENED) == {"tcp": [2049], "udp": []}


def test_peers_are_tried_where_we_listen_or_where_a_real_service_does() -> None:
    held = [
        {"protocol": protocol, "port": port, "holder": holder}
        for protocol, port, holder in (
            ("tcp", 2377, "dockerd"),
            ("udp", 7946, "dockerd"),
            ("tcp", 7946, "nginx"),
            ("tcp", 2049, "the kernel"),
            ("tcp", 3000, "dockerd"),
        )
    ]
    listening = {"a": {"token": "t", "listening": [{"protocol": "udp", "port": 4789}]}}
    peers = judge.cluster_peers({"a": node("a"), "b": node("b", held=held)}, listening, "a", "b")
    ours = {"protocol": "udp", "port": 4789, "echo": True}
    real = [{"protocol": "tcp", "port": port, "echo": False} for port in (2377, 2049)]
    assert peers == [
        {"name": "a", "address": "192.168.9.1", "token": "t", "ports": [ours]},
        {"name": "b", "address": "192.168.9.2", "token": "", "ports": real},
    ]
    (nas,) = judge.cluster_peers({}, {}, "a", "192.168.7.9")
    assert (nas["address"], nas["ports"]) == ("192.168.7.9", [real[1]])


def test_a_machine_whose_firewall_learns_of_a_new_one_only_now_is_not_tried() -> None:
    nodes = {"a": node("a", admits=["192.168.9.1"]), "b": node("b")}
    tried = {
        asker: [peer["name"] for peer in judge.cluster_peers(nodes, {}, asker)] for asker in nodes
    }
    assert tried == {"a": ["a", "b"], "b": ["b"]}


def test_a_new_machine_is_refused_where_limit_leaves_out_those_that_must_let_it_in() -> None:
    nodes = cluster(a={"admits": ["192.168.9.1"]})
    everything = judge.cluster_problems(
        nodes, {"b": {"tried": [], "paths": {}}}, WANTED | {"agents": list(nodes)}
    )
    assert any("--limit" in said and "a does not know b" in said for said in everything["problems"])


# How a machine is looked at


def test_addresses_and_routes_are_read_as_ip_writes_them() -> None:
    inet = {"family": "inet", "local": "10.1.0.5", "prefixlen": 24}
    links = [{"ifname": "eth0", "mtu": 1500, "addr_info": [inet, {"family": "inet6"}]}]
    assert look.addresses(links) == [
        {"address": "10.1.0.5", "prefix": 24, "interface": "eth0", "mtu": 1500}
    ]
    lines = [{"dst": "default", "dev": "eth0"}, {"dst": "10.1.0.0/24", "dev": "eth0"}]
    assert look.routes(lines) == [{"destination": "10.1.0.0/24", "interface": "eth0"}]


def test_an_engine_is_described_by_its_words_and_while_it_is_silent_by_its_settings() -> None:
    info = {
        "ServerVersion": "29.1.0",
        "LiveRestoreEnabled": False,
        "FirewallBackend": {"Driver": "nftables+firewalld"},
        "DockerRootDir": "/data",
        "Driver": "overlay2",
    }
    config = {"live-restore": True, "data-root": "/other"}
    said = look.engine(info, "1.52", config, "", "")
    assert (said["answers"], said["version"], said["live_restore"]) == (True, "29.1.0", False)
    assert (said["firewall_backend"], said["data_root"]) == ("nftables", "/data")
    silent = look.engine({}, "", config, "", "26.1.5")
    assert (silent["answers"], silent["version"], silent["live_restore"]) == (False, "26.1.5", True)
    assert (silent["firewall_backend"], silent["data_root"]) == ("iptables", "/other")


def test_an_answer_of_the_engine_is_read_and_an_error_is_none() -> None:
    head = b"HTTP/1.0 200 OK\r\nApi-Version: 1.45\r\nContent-Type: application/json"
    assert look.parse_answer(head + b'\r\n\r\n{"NCPU": 2}\n') == ({"NCPU": 2}, "1.45")
    assert look.parse_answer(b'HTTP/1.0 500 Oh\r\n\r\n{"message": "oh"}') == ({}, "")
    assert look.parse_answer(b"") == ({}, "")
    assert look.engine_info("/nowhere/docker.sock") == ({}, "")


def test_settings_that_cannot_be_read_are_a_finding_of_their_own() -> None:
    assert look.daemon_config("") == ({}, "")
    assert look.daemon_config('{"live-restore": true}') == ({"live-restore": True}, "")
    assert look.daemon_config("{,}")[1] and look.daemon_config("[]")[1] == "it holds no object"


def test_a_place_in_a_swarm_is_read_on_managers_workers_and_outside() -> None:
    info = {
        "Swarm": {
            "LocalNodeState": "active",
            "NodeID": "n1",
            "NodeAddr": "192.168.9.1",
            "ControlAvailable": True,
            "RemoteManagers": [{"NodeID": "n2"}, {"NodeID": "n1"}],
            "Cluster": {"ID": "c1", "DefaultAddrPool": ["10.0.0.0/8"]},
        }
    }
    said = look.swarm(info)
    assert (said["cluster_id"], said["managers"], said["pools"]) == (
        "c1",
        ["n1", "n2"],
        ["10.0.0.0/8"],
    )
    assert look.swarm({"Swarm": {"RemoteManagers": None, "Cluster": None}}) == NO_SWARM
    assert look.swarm({}) == NO_SWARM


def test_who_listens_is_read_from_the_kernels_tables() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        own = Path("/proc/self/comm").read_text().strip()
        assert look.held([port], [port]) == [{"protocol": "tcp", "port": port, "holder": own}]
    assert look.held([port], [port]) == []


def test_room_is_measured_where_a_directory_will_be_made(tmp_path: Path) -> None:
    said = look.disk(str(tmp_path / "not" / "yet"))
    assert said["path"] == str(tmp_path) and said["free_mb"] > 0


# How machines try each other's ports


@pytest.fixture
def listening() -> Iterator[tuple[Any, dict[str, int]]]:
    """Our listener on free ports of this machine, as for two others that will ask."""
    opened = reach.listeners("127.0.0.1", [0], [0])
    ports = {
        "tcp" if one.type == socket.SOCK_STREAM else "udp": one.getsockname()[1] for one in opened
    }
    listener = reach.Listener("secret", {"b", "c"}, time.monotonic() + 30)
    serving = threading.Thread(target=listener.serve, args=(opened,))
    serving.start()
    yield listener, ports
    listener.ends = 0
    with suppress(OSError), socket.create_connection(("127.0.0.1", ports["tcp"]), 1):
        pass
    serving.join(5)
    assert not serving.is_alive()
    for one in opened:
        one.close()


def ask(ports: dict[str, int], kind: str, token: str = "secret", verb: str = "echo") -> Any:
    port = reach.Port("a", "127.0.0.1", token, kind, ports[kind], True)
    return reach.question(port, verb, "b", 0.5)


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_listener_answers_who_knows_the_token_and_nobody_else(
    listening: tuple[Any, dict[str, int]], kind: str
) -> None:
    _, ports = listening
    echo = ask(ports, kind)
    assert echo.outcome == "open" and abs(echo.ahead) < 1
    assert ask(ports, kind, token="guessed").outcome == {"tcp": "stranger", "udp": "silent"}[kind]


def test_an_answer_is_never_longer_than_its_question() -> None:
    listener = reach.Listener("t" * 32, {"b"}, 0)
    for verb in ("echo", "done"):
        question = f"{'t' * 32} {verb} b\n".encode()
        assert 0 < len(listener.answer(question)) <= len(question)
    for stranger in (b"", b"\n", b"\xff" * 600, b"a b", b"x" * 32 + b" done b\n"):
        assert listener.answer(stranger) == b""


def test_a_probe_finds_its_way_and_ends_the_listener(listening: tuple[Any, dict[str, int]]) -> None:
    listener, ports = listening
    peer = {
        "name": "a",
        "address": "127.0.0.1",
        "token": "secret",
        "ports": [{"protocol": kind, "port": port, "echo": True} for kind, port in ports.items()],
    }
    said = reach.probe({"name": "b", "peers": [peer, {**peer, "name": "b"}], "timeout": 3})
    assert {(one["peer"], one["outcome"]) for one in said["tried"]} == {("a", "open")}
    path = said["paths"]["a"]
    assert path["source"] == "127.0.0.1" and abs(path["ahead"]) < 1
    assert 1000 < path["passes"] <= path["mtu"] == path["learned"]
    assert listener.askers == {"c"}
    ask(ports, "tcp", verb="done")  # b again
    assert listener.askers == {"c"}
    reach.probe({"name": "c", "peers": [peer], "timeout": 3})
    assert listener.askers == set()
    assert "tried" in json.loads(json.dumps(said))


def test_what_does_not_answer_is_told_apart() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as quiet:
        quiet.bind(("127.0.0.1", 0))
        port = quiet.getsockname()[1]
        assert ask({"udp": port}, "udp").outcome == "silent"
    assert ask({"udp": port}, "udp").outcome == "refused"
    assert ask({"tcp": 1}, "tcp").outcome == "refused"
    assert reach.outcome_of(PermissionError(1, "")) == "forbidden"
    assert reach.outcome_of(OSError(113, "")) == "unreachable"
    assert reach.outcome_of(TimeoutError()) == "silent"


def test_a_port_of_a_real_service_is_not_listened_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert reach.listeners("127.0.0.1", [port], []) == []
