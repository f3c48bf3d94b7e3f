"""What an operator expects of every node."""

import json

from cluster import Cluster

DIRECTORY_DELEGATIONS = "/sys/module/nfsv4/parameters/directory_delegations"
WORKSPACE = "/srv/claude-code/workspace"


def test_every_machine_is_a_node_in_its_role(cluster: Cluster) -> None:
    nodes = {node["Hostname"]: node for node in cluster.lines("node", "ls")}
    assert set(nodes) == set(cluster.nodes)
    assert {node["Status"] for node in nodes.values()} == {"Ready"}
    managers = {name for name, node in nodes.items() if node["ManagerStatus"]}
    assert managers == set(cluster.managers)


def test_every_machine_has_a_kernel_of_its_own(cluster: Cluster) -> None:
    for file in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id"):
        read = {cluster.host(name).check_output("cat %s", file) for name in cluster.nodes}
        assert len(read) == len(cluster.nodes), file


def test_services_run_the_same_pinned_image_on_every_node(cluster: Cluster) -> None:
    """By its ID, or by its digest in the registry."""
    services = json.loads(
        cluster.docker("service", "inspect", *cluster.docker("service", "ls", "--quiet").split())
    )
    (image,) = {service["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"] for service in services}
    registry = cluster.variables(cluster.managers[0]).get("app_image_registry")
    assert image.startswith(f"{registry}/claude-code-sse-api@sha256:" if registry else "sha256:")
    ids = {
        cluster.docker("image", "inspect", "--format", "{{.Id}}", image, on=name)
        for name in cluster.nodes
    }
    assert len(ids) == 1


def test_labels_say_what_runs_where(cluster: Cluster) -> None:
    for name in cluster.nodes:
        (node,) = json.loads(cluster.docker("node", "inspect", name))
        labels = node["Spec"]["Labels"]
        assert labels["claude-code.agents"] == str(name in cluster.agents).lower()
        assert labels["claude-code.gateway"] == str(name in cluster.managers).lower()


def test_the_workspace_is_one_and_the_same(cluster: Cluster) -> None:
    server = cluster.host(cluster.nfs_server)
    top = server.file(WORKSPACE)
    assert (top.uid, top.gid, top.mode) == (10000, 10002, 0o2775)
    for name in set(cluster.nodes) - {cluster.nfs_server}:
        mount = cluster.host(name).mount_point(WORKSPACE)
        assert mount.exists, name
        assert mount.filesystem == "nfs4"
        assert {"vers=4.2", "hard", "acregmax=1", "acdirmax=1"} <= set(mount.options)
        delegations = cluster.host(name).file(DIRECTORY_DELEGATIONS)
        assert not delegations.exists or delegations.content_string.strip() == "N"


def test_root_of_a_node_is_nobody_in_the_workspace(cluster: Cluster) -> None:
    name = next(name for name in cluster.nodes if name != cluster.nfs_server)
    outcome = cluster.host(name).run(f"touch {WORKSPACE}/made-by-root")
    assert outcome.failed
    assert "Permission denied" in outcome.stderr


def test_what_the_nodes_say_to_each_other_is_encrypted(cluster: Cluster) -> None:
    for network in ("ingress", "claude-code-stack_backend"):
        (shown,) = json.loads(cluster.docker("network", "inspect", network))
        assert "encrypted" in shown["Options"], network


def test_the_ports_between_nodes_are_closed_to_others(cluster: Cluster) -> None:
    """From a container, where agents run, no port of the cluster's is reached on any node."""
    probe = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"
    for name, ports in ((cluster.managers[0], (2377, 7946)), (cluster.nfs_server, (2049,))):
        asker = cluster.host(next(other for other in cluster.nodes if other != name))
        address = cluster.variables(name)["node_address"]
        for port in ports:
            assert asker.run(f"python3 -c '{probe}' {address} {port}").succeeded, (name, port)
            inside = asker.run(
                "docker run --rm --entrypoint python3 claude-code-sse-api:latest "
                f"-c '{probe}' {address} {port}"
            )
            assert inside.failed, (name, port)


def test_no_join_token_is_on_any_disk_of_a_worker(cluster: Cluster) -> None:
    for name in cluster.workers:
        # A pattern that does not match itself: sudo logs the command.
        found = cluster.host(name).run(
            "grep --recursive --files-with-matches --text --extended-regexp "
            "'SWMTKN-1-[0-9a-z]{40}' /etc /root /home /tmp /var/tmp /var/log /var/lib/docker/swarm"
        )
        assert found.stdout == "", name


def test_the_engine_starts_with_the_machine(cluster: Cluster) -> None:
    for name in cluster.nodes:
        engine = cluster.host(name).service("docker")
        assert engine.is_enabled, name
        assert engine.is_running, name
