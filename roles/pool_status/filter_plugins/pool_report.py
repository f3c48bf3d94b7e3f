"""Say how a pool is: what is there, what is wrong with it, and which verb puts it right."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

Json = Mapping[str, Any]

LIVE = frozenset({"assigned", "accepted", "preparing", "ready", "starting", "running"})
# An update in one of these states goes no further by itself.
STUCK = frozenset({"paused", "rollback_paused"})
AGENTS = "claude-code.agents"
STACK = "com.docker.stack.namespace"


# Reading


def moment(text: str) -> datetime | None:
    """Read a time as the engine writes it (RFC 3339 with nanoseconds), or as openssl does; None for none."""
    if not text:
        return None
    if text.startswith("notAfter="):
        return datetime.strptime(text, "notAfter=%b %d %H:%M:%S %Y GMT").replace(tzinfo=UTC)
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d*", r"\1", text).replace("Z", "+00:00"))


def days(since: datetime, until: datetime) -> float:
    """Return how many days lie between two moments."""
    return round((until - since).total_seconds() / 86400, 1)


def is_called(node: Json, name: str, wanted: Json) -> bool:
    """Say whether a node of the swarm is the machine ``name`` of the inventory, which could not be asked itself."""
    address = wanted["addresses"].get(name)
    return (node.get("Description") or {}).get("Hostname") == name or (
        bool(address) and (node.get("Status") or {}).get("Addr") == address
    )


def node_row(name: str, raw: Json, seen: Json, now: datetime) -> dict[str, Any]:
    """Describe a node by what it says itself (``raw``, empty when it was not reached) and what the managers see."""
    info = raw.get("info") or {}
    swarm = info.get("Swarm") or {}
    manager = seen.get("ManagerStatus") or {}
    spec = seen.get("Spec") or {}
    expires = moment(raw.get("certificate", ""))
    free, size = (int(number) for number in (raw.get("disk") or "0 0").split())
    return {
        "name": name,
        "hostname": str((seen.get("Description") or {}).get("Hostname") or name),
        "reached": bool(raw),
        "role": "leader" if manager.get("Leader") else str(spec.get("Role") or ""),
        "state": str((seen.get("Status") or {}).get("State") or "not in the swarm"),
        "reachability": str(manager.get("Reachability") or ""),
        "availability": str(spec.get("Availability") or ""),
        "agents": (spec.get("Labels") or {}).get(AGENTS) == "true",
        "engine": str(
            info.get("ServerVersion")
            or ((seen.get("Description") or {}).get("Engine") or {}).get("EngineVersion")
            or ""
        ),
        "local_state": str(swarm.get("LocalNodeState") or ""),
        "local_error": str(swarm.get("Error") or ""),
        "network_agent": bool(raw.get("agent")),
        "disk_free_mb": free,
        "disk_mb": size,
        "workspace": workspace(raw),
        "certificate_days": days(now, expires) if expires else None,
    }


def workspace(raw: Json) -> str:
    """Say in a word or two what the workspace of a node is."""
    if not raw:
        return ""
    if not raw.get("workspace_answers"):
        return "does not answer"
    mount = ((raw.get("mount") or {}).get("filesystems") or [{}])[0]
    return str(mount.get("source") or "directory")


def service_row(service: Json, tasks: Iterable[Json]) -> dict[str, Any]:
    """Describe a service; replicas of an older version that finish their job are counted apart."""
    spec = service["Spec"]
    mode = spec["Mode"]
    image = spec["TaskTemplate"]["ContainerSpec"]["Image"]
    own = [task for task in tasks if task["ServiceID"] == service["ID"]]
    running = [task for task in own if task["Status"]["State"] == "running"]
    current = [task for task in running if task["DesiredState"] == "running"]
    update = service.get("UpdateStatus") or {}
    return {
        "name": spec["Name"],
        "wanted": mode["Replicated"].get("Replicas", 1) if "Replicated" in mode else len(current),
        # A replica that has ended its job and starts again is no fault.
        "running": sum(
            task["DesiredState"] in ("running", "ready") and task["Status"]["State"] in LIVE for task in own
        ),
        "finishing": len(running) - len(current),
        "image": image,
        "other_images": sorted({task["Spec"]["ContainerSpec"]["Image"] for task in running} - {image}),
        "update": str(update.get("State") or "completed"),
        "update_message": str(update.get("Message") or ""),
        "errors": sorted(
            {
                str(task["Status"].get("Err"))
                for task in own
                if task["Status"].get("Err") and task["DesiredState"] == "running"
            }
        ),
    }


def setting(services: Iterable[Json], name: str) -> str:
    """Return a setting that a service of the pool was deployed with."""
    for service in services:
        for entry in service["Spec"]["TaskTemplate"]["ContainerSpec"].get("Env") or []:
            key, _, value = entry.partition("=")
            if key == name:
                return str(value)
    return ""


def secret_rows(secrets: Iterable[Json], now: datetime) -> list[dict[str, Any]]:
    """Return the secrets with their ages, by name."""
    return sorted(
        (
            {"name": one["Spec"]["Name"], "age_days": days(made, now)}
            for one in secrets
            if (made := moment(one["CreatedAt"])) is not None
        ),
        key=lambda row: str(row["name"]),
    )


# Judging


def membership_problems(row: Json) -> Iterable[str]:
    """Yield what is wrong with a node's place in the swarm, each as a sentence that says what to do."""
    name = row["name"]
    if row["state"] == "not in the swarm":
        if row["local_state"] == "locked":
            yield f"{name} is locked: unlock it (docker swarm unlock, on {name})."
        elif row["reached"]:
            yield f"{name} is not in the swarm: run site.yml to let it join."
        else:
            yield f"{name} is not reached, and is not in the swarm: start it, or take it out of the inventory."
        return
    if row["state"] != "ready":
        yield (
            f"{name} is {row['state']}: start the machine or its engine; if it is gone for good, "
            f"playbooks/remove_node.yml -e node={name}."
        )
    elif not row["reached"]:
        yield f"{name} is in the swarm, but Ansible does not reach it: look at its ssh."
    if row["reachability"] == "unreachable" and row["state"] == "ready":
        yield f"{name} does not answer as a manager: look at its engine (journalctl --unit docker)."


def node_problems(row: Json, source: str, host: str, wanted: Json, *, alone: bool) -> Iterable[str]:
    """Yield what is wrong with a member of the swarm that was reached, each as a sentence that says what to do.

    The workspace is to be a mount of ``source`` on every node but ``host``; an empty ``source`` is a directory. A node
    that is ``alone`` has no network with others.
    """
    name = row["name"]
    if row["state"] == "not in the swarm" or not row["reached"]:
        return
    if not (row["network_agent"] or alone):
        yield (
            f"{name}'s engine has no agent of the network between containers, so no task comes to run there: "
            f"systemctl restart docker on {name}, and unlock it where managers are locked at rest."
        )
    if row["disk_mb"] and row["disk_free_mb"] < wanted["disk_mb"]:
        yield (
            f"{name} has {row['disk_free_mb']} MB free where Docker keeps its data, fewer than {wanted['disk_mb']}: "
            f"make room (docker image prune --all removes images that nothing uses)."
        )
    if row["workspace"] == "does not answer":
        yield f"{name} has no answer from its workspace: see to the file server, then playbooks/repair.yml."
    elif source and row["hostname"] != host and row["workspace"] != source:
        yield f"{name} has a {row['workspace']} in place of the workspace {source}: playbooks/repair.yml."
    if row["certificate_days"] is not None and row["certificate_days"] < wanted["certificate_days"]:
        yield (
            f"{name}'s certificate in the swarm ends in {row['certificate_days']} days and was not renewed: "
            f"see whether {name} reaches the managers on port 2377."
        )


def service_problems(row: Json) -> Iterable[str]:
    """Yield what is wrong with a service."""
    if row["update"] in STUCK:
        yield f"{row['name']}: its update is {row['update']} ({row['update_message']}): playbooks/repair.yml."
    if row["running"] < row["wanted"]:
        why = f" ({'; '.join(row['errors'])})" if row["errors"] else ""
        yield f"{row['name']} has {row['running']} of {row['wanted']} tasks{why}."


def broker_problems(streams: Iterable[Json], copies: int) -> Iterable[str]:
    """Yield what is wrong with the broker's streams."""
    for stream in streams:
        if not stream.get("leader"):
            yield f"The broker's stream {stream['name']} has no leader: most of its servers must run."
        elif stream["behind"]:
            yield f"The broker's stream {stream['name']} is not whole on {', '.join(stream['behind'])}."
        elif stream["copies"] != copies:
            yield f"The broker's stream {stream['name']} has {stream['copies']} of {copies} copies: run site.yml."


def pool_problems(report: Json, services: Iterable[Json]) -> Iterable[str]:
    """Yield what is wrong with replicas and broker."""
    if not report:
        yield "No gateway tells of the pool: see what the gateway and the broker log (docker service logs)."
        return
    for replica in report["replicas"]:
        if replica.get("fault"):
            yield f"A replica on {replica['node']} takes no job: {replica['fault']}"
    yield from broker_problems(report["streams"], int(setting(services, "BROKER_SERVERS") or 1))


def warnings(
    nodes: Sequence[Json], services: Sequence[Json], secrets: Sequence[Json], report: Json, wanted: Json
) -> Iterable[str]:
    """Yield what is no fault, but had better not stay so."""
    for row in nodes:
        if row["availability"] == "drain":
            yield f"{row['name']} is drained: playbooks/activate_node.yml -e node={row['name']} lets work come again."
    engines = Counter(row["engine"] for row in nodes if row["engine"])
    if len(engines) > 1:
        yield f"The nodes have different engines ({', '.join(sorted(engines))}): playbooks/upgrade_engine.yml."
    managers = sum(row["role"] in ("leader", "manager") for row in nodes)
    if managers and managers % 2 == 0:
        yield f"There are {managers} managers: an even number bears no more losses than one less."
    for row in services:
        if row["update"] == "rollback_completed":
            yield f"{row['name']}: its last update was rolled back, it runs as before it ({row['update_message']})."
        if row["finishing"]:
            yield f"{row['name']}: {row['finishing']} tasks of the version before finish their job."
    for row in secrets:
        if row["age_days"] > wanted["secret_days"]:
            yield f"The secret {row['name']} is {row['age_days']:.0f} days old: playbooks/rotate_secrets.yml."
    if report and report["unfinished"] > 0.9 * report["queueLimit"]:
        yield f"The queue is nearly full: {report['unfinished']} of {report['queueLimit']} jobs."


def pool_report(nodes: Mapping[str, Json], swarm: Json, report: Json, wanted: Json) -> dict[str, Any]:
    """Return the state of a pool; ``well`` is false when there is any problem.

    ``nodes`` has for each machine of the inventory what it says itself, ``swarm`` the engine's lists (nodes, services,
    tasks, secrets) as a manager has them, ``report`` what ``claude_jobs report`` prints. What is unknown is empty.
    """
    now = datetime.now(UTC)
    known = {node["ID"]: node for node in swarm.get("nodes") or []}
    rows, taken = [], set()
    for name, raw in nodes.items():
        own = ((raw.get("info") or {}).get("Swarm") or {}).get("NodeID") or ""
        seen: Json = known.get(own) or next((node for node in known.values() if is_called(node, name, wanted)), {})
        taken.add(seen.get("ID"))
        rows.append(node_row(name, raw, seen, now))
    strangers = [
        f"{(node.get('Description') or {}).get('Hostname', node['ID'])} is in the swarm, but not in the inventory: "
        f"add it there, or remove it (docker node rm {node['ID']}, once it is down)."
        for node in known.values()
        if node["ID"] not in taken
    ]
    deployed = [
        one for one in swarm.get("services") or [] if (one["Spec"].get("Labels") or {}).get(STACK) == wanted["stack"]
    ]
    source, host = setting(deployed, "WORKSPACE_SOURCE"), setting(deployed, "WORKSPACE_HOST")
    services = sorted((service_row(one, swarm["tasks"]) for one in deployed), key=lambda row: str(row["name"]))
    secrets = secret_rows(swarm.get("secrets") or [], now)
    problems = [
        problem
        for row in rows
        for problem in (
            *membership_problems(row),
            *node_problems(row, source, host, wanted, alone=len(rows) == 1),
        )
    ]
    problems += strangers
    if not swarm:
        problems.append("No manager answers: see to the engines of the managers; a lost quorum: playbooks/repair.yml.")
    elif not services:
        problems.append("There is no pool in this swarm: run site.yml.")
    else:
        problems += [problem for row in services for problem in service_problems(row)]
        problems += pool_problems(report, deployed)
    return {
        "well": not problems,
        "problems": problems,
        "warnings": list(warnings(rows, services, secrets, report, wanted)),
        "nodes": rows,
        "services": services,
        "pool": report,
        "secrets": secrets,
    }


# Showing


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table, each column as wide as it must be."""
    cells = [[title, *header], *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header) + 1)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def pool_screen(state: Json) -> str:
    """Write the state of a pool (of the filter pool_report) for one screen."""
    lines = table(
        "NODES",
        ["role", "state", "availability", "engine", "disk free", "workspace", "certificate"],
        (
            [
                row["name"],
                row["role"] or "-",
                row["state"] if row["reached"] else f"{row['state']}, not reached",
                row["availability"] or "-",
                row["engine"] or "-",
                f"{row['disk_free_mb'] / 1024:.1f} of {row['disk_mb'] / 1024:.1f} GB" if row["disk_mb"] else "-",
                row["workspace"] or "-",
                "-" if row["certificate_days"] is None else f"{row['certificate_days']:.0f} days",
            ]
            for row in state["nodes"]
        ),
    )
    lines += [
        "",
        *table(
            "SERVICES",
            ["running", "update", "image"],
            (
                [
                    row["name"],
                    f"{row['running']}/{row['wanted']}"
                    + (f" and {row['finishing']} that finish" if row["finishing"] else ""),
                    row["update"],
                    row["image"].removeprefix("sha256:")[:64],
                ]
                for row in state["services"]
            ),
        ),
    ]
    if report := state["pool"]:
        places = Counter((replica["node"], replica["status"]) for replica in report["replicas"])
        total = Counter(replica["status"] for replica in report["replicas"])
        lines += [
            "",
            *table(
                "REPLICAS",
                ["idle", "busy"],
                [
                    ["all", total["idle"], total["busy"]],
                    *(
                        [node, places[node, "idle"], places[node, "busy"]]
                        for node in sorted({node for node, _ in places})
                    ),
                ],
            ),
        ]
        lines += [
            "",
            *table(
                "QUEUE",
                ["waiting", "not ended", "limit"],
                [["jobs", report["waiting"], report["unfinished"], report["queueLimit"]]],
            ),
        ]
        lines += [
            "",
            *table(
                "BROKER",
                ["messages", "MB", "copies", "leader", "behind"],
                (
                    [
                        stream["name"],
                        stream["messages"],
                        f"{stream['bytes'] / 2**20:.1f}",
                        stream["copies"],
                        stream.get("leader") or "none",
                        ", ".join(stream["behind"]) or "-",
                    ]
                    for stream in report["streams"]
                ),
            ),
        ]
    lines += [
        "",
        *table("SECRETS", ["age"], ([row["name"], f"{row['age_days']:.0f} days"] for row in state["secrets"])),
    ]
    for title in ("warnings", "problems"):
        if state[title]:
            lines += ["", title.upper(), *(f"- {one}" for one in state[title])]
    if state["well"]:
        lines += ["", "All is well."]
    return "\n".join(lines)


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"pool_report": pool_report, "pool_screen": pool_screen}
