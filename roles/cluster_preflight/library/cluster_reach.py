#!/usr/bin/python
"""Try whether the machines of a cluster-to-be reach each other's ports."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import os
import secrets
import selectors
import signal
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: cluster_reach
short_description: Try whether the machines of a cluster-to-be reach each other's ports
description:
  - "With O(mode=listen) a process is left behind that answers on those of the ports on which nothing listens yet. It
    answers only who knows the token that is returned, and ends when all who are to ask have said that they are done, or
    after O(seconds)."
  - "With O(mode=probe) the ports of all peers are tried at once: those with a token by a question that only the
    listener can answer, over TCP and UDP; those of a real service by a connection. On the way the clocks are compared,
    the kernel's choice of the source address is read, and packets as large as the interface's MTU are sent."
  - Neither changes anything that stays, so both also run in check mode.
options:
  mode:
    description: What to do.
    type: str
    required: true
    choices: [listen, probe]
  name:
    description: Name of this machine among its peers.
    type: str
    required: true
  address:
    description: Address to listen on; of use with O(mode=listen).
    type: str
    default: ""
  tcp_ports:
    description: Ports to listen on; of use with O(mode=listen).
    type: list
    elements: int
    default: []
  udp_ports:
    description: Ports to listen on; of use with O(mode=listen).
    type: list
    elements: int
    default: []
  askers:
    description: Names of the machines that will ask; of use with O(mode=listen).
    type: list
    elements: str
    default: []
  seconds:
    description: How long to listen at the most.
    type: float
    default: 60
  peers:
    description: >-
      The machines to ask, each with name, address, token (empty where only real services listen) and ports, a list of
      objects with protocol, port and echo (whether the token's holder answers there); of use with O(mode=probe).
    type: list
    elements: dict
    default: []
  timeout:
    description: Seconds that a peer may take to answer.
    type: float
    default: 3
author:
  - claude-code-sse-api maintainers
"""

EXAMPLES = r"""
- name: Listen for the others
  cluster_reach:
    mode: listen
    name: node-1
    address: 192.168.1.11
    tcp_ports: [2377, 7946]
    udp_ports: [7946, 4789]
    askers: [node-2, node-3]
  register: listening

- name: Try the others' ports
  cluster_reach:
    mode: probe
    name: node-1
    peers:
      - name: node-2
        address: 192.168.1.12
        token: "{{ hostvars['node-2'].listening.token }}"
        ports: [{protocol: udp, port: 7946, echo: true}]
"""

RETURN = r"""
token:
  description: What one must know to get an answer. Of no use once the listener has ended.
  type: str
  returned: with mode=listen
listening:
  description: The ports on which the listener answers, with protocol and port.
  type: list
  elements: dict
  returned: with mode=listen
tried:
  description: >-
    For each port of each peer an object with peer, protocol, port and outcome, one of open, silent (no answer),
    refused, unreachable (no route, or so says a router), forbidden (this machine's own firewall) and stranger
    (somebody else answers).
  type: list
  elements: dict
  returned: with mode=probe
paths:
  description: >-
    For each peer the source address that the kernel picks and the MTU that it assumes before (mtu) and after (learned)
    large packets were sent; the largest packet that arrived (passes, 0 when none was tried); by how many seconds the
    peer's clock is ahead (ahead, absent when unknown).
  type: dict
  returned: with mode=probe
"""

Json = dict[str, Any]
# How the listener is called among the machine's processes (15 letters at the most).
PROCESS = "cluster-reach"
# From Linux's in.h; Python has no names for them.
IP_MTU_DISCOVER, IP_PMTUDISC_PROBE, IP_MTU = 10, 3, 14
HEADERS = 28  # of IPv4 and UDP
SIZES = (9000, 8950, 1500, 1492, 1480, 1460, 1450, 1440, 1420, 1400, 1380, 1350, 1280, 1000)
MESSAGE = 512
CLIENTS = 256
WORKERS = 64


# Listening


def listeners(address: str, tcp_ports: Iterable[int], udp_ports: Iterable[int]) -> list[socket.socket]:
    """Return a socket for each port that is free."""
    opened = []
    for kind, ports in ((socket.SOCK_STREAM, tcp_ports), (socket.SOCK_DGRAM, udp_ports)):
        for port in ports:
            one = socket.socket(socket.AF_INET, kind)
            try:
                if kind == socket.SOCK_STREAM:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind((address, port))
                if kind == socket.SOCK_STREAM:
                    one.listen(128)
            except OSError:  # a real service listens there, or the address is not ours
                one.close()
                continue
            one.setblocking(False)
            opened.append(one)
    return opened


@dataclasses.dataclass
class Listener:
    """Answers whoever knows the token, until everybody has said that they are done."""

    token: str
    askers: set[str]
    ends: float
    clients: int = 0

    def answer(self, message: bytes) -> bytes:
        """Return the answer to a message, never longer than the message; nothing for a stranger."""
        words = message[:MESSAGE].split(b"\n", 1)[0].decode(errors="replace").split(" ")
        if len(words) != 3 or not secrets.compare_digest(words[0].encode(), self.token.encode()):
            return b""
        if words[1] == "done":
            self.askers.discard(words[2])
        return f"{words[2]} {time.time():.6f}\n".encode()

    def serve(self, opened: Iterable[socket.socket]) -> None:
        with selectors.DefaultSelector() as selector:
            for one in opened:
                selector.register(one, selectors.EVENT_READ, "tcp" if one.type == socket.SOCK_STREAM else "udp")
            while self.askers and (left := self.ends - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    assert isinstance(key.fileobj, socket.socket)  # noqa: S101 - only those are registered
                    with contextlib.suppress(OSError):
                        self._handle(selector, key.fileobj, key.data)

    def _handle(self, selector: selectors.BaseSelector, one: socket.socket, kind: str) -> None:
        if kind == "udp":
            message, sender = one.recvfrom(65535)
            if answer := self.answer(message):
                one.sendto(answer, sender)
        elif kind == "tcp":
            client, _ = one.accept()
            client.setblocking(False)
            if self.clients >= CLIENTS:
                client.close()
                return
            self.clients += 1
            selector.register(client, selectors.EVENT_READ, "client")
        else:
            answer = b""
            try:
                answer = self.answer(one.recv(MESSAGE))
                if answer:
                    one.sendall(answer)  # it stays open: who closes first keeps the port busy for a while
            finally:
                if not answer:
                    selector.unregister(one)
                    self.clients -= 1
                    one.close()


def end_leftovers() -> None:
    """End a listener that a run which was broken off has left in this machine's network."""
    network = Path("/proc/self/ns/net").stat().st_ino
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (
                process.name.isdigit()
                and (process / "comm").read_text().strip() == PROCESS
                and (process / "ns/net").stat().st_ino == network
            ):
                os.kill(int(process.name), signal.SIGTERM)
                found.append(process / "ns/net")  # gone as soon as it is dead, whoever takes note of that
    deadline = time.monotonic() + 2
    while any(sign.exists() for sign in found) and time.monotonic() < deadline:
        time.sleep(0.02)


def leave_behind(listener: Listener, opened: list[socket.socket]) -> None:
    """Let a process of its own serve, which holds nothing of this one's but the sockets."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for handle in range(3):
            os.dup2(null, handle)
        kept = {one.fileno() for one in opened} | {0, 1, 2}
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - what is listed are numbers
            if int(name) not in kept:
                with contextlib.suppress(OSError):
                    os.close(int(name))
        Path("/proc/self/comm").write_text(PROCESS)
        listener.serve(opened)
    finally:
        os._exit(0)


def listen(wanted: Mapping[str, Any]) -> Json:
    end_leftovers()
    opened = listeners(wanted["address"], wanted["tcp_ports"], wanted["udp_ports"]) if wanted["askers"] else []
    listening = [
        {"protocol": "tcp" if one.type == socket.SOCK_STREAM else "udp", "port": one.getsockname()[1]} for one in opened
    ]
    token = secrets.token_hex(16)
    if opened:
        leave_behind(Listener(token, set(wanted["askers"]), time.monotonic() + wanted["seconds"]), opened)
    for one in opened:
        one.close()
    return {"token": token, "listening": listening}


# Probing


@dataclasses.dataclass(frozen=True)
class Port:
    """A port of a peer."""

    peer: str
    address: str
    token: str
    protocol: str
    number: int
    echo: bool


@dataclasses.dataclass(frozen=True)
class Echo:
    """What came of a question: how it went, how long it took and by how much the other's clock is ahead."""

    outcome: str
    seconds: float = 0
    ahead: float | None = None


def outcome_of(error: OSError) -> str:
    """Say in a word what an error means."""
    if isinstance(error, TimeoutError):
        return "silent"
    if isinstance(error, ConnectionError):  # also a reset: somebody is there who does not want us
        return "refused"
    if error.errno in (errno.EPERM, errno.EACCES):
        return "forbidden"
    return "unreachable"


def _ask(connection: socket.socket, question: bytes, expected: bytes, deadline: float) -> Echo:
    """Ask over a socket that is connected; over UDP ask again while nothing comes."""
    again = connection.type == socket.SOCK_DGRAM
    pause = 0.4
    while (left := deadline - time.monotonic()) > 0:
        connection.settimeout(min(left, pause) if again else left)
        asked, start = time.time(), time.monotonic()
        try:
            connection.send(question)
            answer = connection.recv(MESSAGE)
        except TimeoutError:
            if not again:
                break
            pause *= 2
            continue
        seconds = time.monotonic() - start
        words = answer.split()
        if len(words) != 2 or words[0] != expected:
            return Echo("stranger")
        return Echo("open", seconds, float(words[1]) - (asked + seconds / 2))
    return Echo("silent")


def question(port: Port, verb: str, word: str, timeout: float) -> Echo:
    """Ask one question on one port."""
    deadline = time.monotonic() + timeout
    kind = socket.SOCK_STREAM if port.protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect((port.address, port.number))
            if not port.echo:
                return Echo("open")
            # Longer than its answer, so that nobody can make the listener say more than it is told.
            message = f"{port.token} {verb} {word}\n".encode()
            return _ask(connection, message, word.encode(), deadline)
        except OSError as error:
            return Echo(outcome_of(error))


def path_to(address: str) -> Json:
    """Return which address and which MTU the kernel would take towards an address. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        try:
            connection.connect((address, 9))
            return {
                "source": connection.getsockname()[0],
                "mtu": connection.getsockopt(socket.IPPROTO_IP, IP_MTU),
            }
        except OSError:
            return {"source": "", "mtu": 0}


def largest(port: Port, mtu: int, timeout: float) -> Json:
    """Return the largest packet (of the interface's MTU at most) that arrives unbroken, and what MTU was learned."""
    top = min(mtu, 65535)
    sizes = [top, *(size for size in SIZES if size < top)]
    arrived = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE)
        deadline = time.monotonic() + timeout
        try:
            connection.connect((port.address, port.number))
            for _ in range(2):
                for size in sizes:
                    with contextlib.suppress(OSError):  # too large for the interface, or an earlier one's complaint
                        message = f"{port.token} echo size-{size}\n".encode()
                        connection.send(message.ljust(size - HEADERS, b"\0"))
                until = min(deadline, time.monotonic() + timeout / 2)
                while arrived < top and (left := until - time.monotonic()) > 0:
                    connection.settimeout(left)
                    with contextlib.suppress(OSError):
                        word = connection.recv(MESSAGE).split(b" ")[0]
                        if word.startswith(b"size-"):
                            arrived = max(arrived, int(word[5:]))
            return {"passes": arrived, "learned": connection.getsockopt(socket.IPPROTO_IP, IP_MTU)}
        except OSError:
            return {"passes": arrived, "learned": mtu}


def probe(wanted: Mapping[str, Any]) -> Json:
    timeout = wanted["timeout"]
    peers = [peer for peer in wanted["peers"] if peer["name"] != wanted["name"]]
    ports = [
        Port(peer["name"], peer["address"], peer["token"], one["protocol"], one["port"], one["echo"])
        for peer in peers
        for one in peer["ports"]
    ]
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        paths: dict[str, Json] = {peer["name"]: {"passes": 0, **path_to(peer["address"])} for peer in peers}
        for path in paths.values():
            path["learned"] = path["mtu"]
        echoes = dict(zip(ports, pool.map(lambda port: question(port, "echo", "hello", timeout), ports), strict=True))
        answering = [port for port, echo in echoes.items() if port.echo and echo.outcome == "open"]
        for name, path in paths.items():
            timed = [
                (echo.seconds, echo.ahead)
                for port, echo in echoes.items()
                if port.peer == name and echo.ahead is not None
            ]
            if timed:
                path["seconds"], path["ahead"] = min(timed)
        # One datagram port of each peer for the large packets; every port that answers for the farewell.
        by_udp = {port.peer: port for port in reversed(answering) if port.protocol == "udp"}
        sizes = pool.map(lambda port: largest(port, paths[port.peer]["mtu"], timeout / 2), by_udp.values())
        for name, size in zip(by_udp, sizes, strict=True):
            paths[name].update(size)
        list(pool.map(lambda port: question(port, "done", wanted["name"], timeout / 2), answering))
    return {
        "tried": [
            {"peer": port.peer, "protocol": port.protocol, "port": port.number, "outcome": echo.outcome}
            for port, echo in echoes.items()
        ],
        "paths": paths,
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "mode": {"type": "str", "required": True, "choices": ["listen", "probe"]},
            "name": {"type": "str", "required": True},
            "address": {"type": "str", "default": ""},
            "tcp_ports": {"type": "list", "elements": "int", "default": []},
            "udp_ports": {"type": "list", "elements": "int", "default": []},
            "askers": {"type": "list", "elements": "str", "default": []},
            "seconds": {"type": "float", "default": 60},
            "peers": {"type": "list", "elements": "dict", "default": []},
            "timeout": {"type": "float", "default": 3},
        },
        supports_check_mode=True,
    )
    act = listen if module.params["mode"] == "listen" else probe
    module.exit_json(changed=False, **act(module.params))


if __name__ == "__main__":
    main()
