"""A workspace that is not the shared one is noticed, by its mount alone."""

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import run

import httpx
import psutil
import pytest
from pool_client import RunningPool, running_pool

from claude_jobs.settings import ReplicaSettings, SettingsError, load
from claude_jobs.workspace_mount import MOUNTINFO, WorkspaceMount, mount_of, mounts

SOURCE = "192.168.77.11:/srv/claude-code/workspace"
# Recorded in containers: what is bound is an NFS mount of the host, or its empty mount point.
ROOT = (
    "590 520 0:49 / / rw,relatime - overlay overlay rw,lowerdir=/l/A:/l/B,upperdir=/d,workdir=/w\n"
    "591 590 0:53 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw\n"
)
NFS = (
    "612 590 0:52 / /workspace rw,relatime - nfs4 192.168.77.11:/srv/claude-code/workspace "
    "rw,vers=4.2,rsize=524288,wsize=524288,namlen=255,hard,proto=tcp,timeo=600,retrans=2,sec=sys,"
    "clientaddr=192.168.77.12,local_lock=none,addr=192.168.77.11\n"
)
LOCAL = (
    "612 590 254:1 /srv/claude-code/workspace /workspace rw,relatime - ext4 /dev/vda1 rw,discard\n"
)


def nfs(source: str, point: str = "/workspace", kind: str = "nfs4", root: str = "/") -> str:
    return f"612 590 0:52 {root} {point} rw,relatime - {kind} {source} rw,hard\n"


def looked_at(directory: Path, text: str, **fields: str) -> str | None:
    """Return what a replica on the node worker-1 finds wrong with these mounts."""
    recorded = directory / "mountinfo"
    recorded.write_text(text)
    settings = ReplicaSettings(
        **{"node_name": "worker-1", "workspace_source": SOURCE, **fields},  # type: ignore[arg-type]
        broker_replica_password="x" * 16,
    )
    return WorkspaceMount(settings, mountinfo=recorded).fault()


def test_the_nfs_mount_of_the_host_is_the_shared_workspace(tmp_path: Path) -> None:
    assert looked_at(tmp_path, ROOT + NFS) is None


def test_a_mount_that_is_missing_is_told_with_node_and_what_is_there(tmp_path: Path) -> None:
    assert looked_at(tmp_path, ROOT + LOCAL) == (
        "the workspace of node worker-1 is not the shared one: /workspace must be "
        "192.168.77.11:/srv/claude-code/workspace (nfs) and is "
        "/srv/claude-code/workspace of /dev/vda1 (ext4)"
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (ROOT, "/ of overlay (overlay)"),
        ("", "no mount"),
        ("nonsense\n\n- - -\n612 590 0:52 / /workspace rw", "no mount"),
        (ROOT + nfs("192.168.77.99:/srv/claude-code/workspace"), "192.168.77.99:/srv/"),
        (ROOT + nfs("192.168.77.11:/srv/claude-code"), "192.168.77.11:/srv/claude-code (nfs4)"),
        # NFS names a directory in its source, and what lies below is another.
        (ROOT + nfs(f"{SOURCE}/jobs"), f"{SOURCE}/jobs (nfs4)"),
        (ROOT + nfs(f"{SOURCE}-2"), f"{SOURCE}-2 (nfs4)"),
        (ROOT + nfs(SOURCE, root="/jobs"), SOURCE),
        # Another file system may be called anything.
        (ROOT + nfs(SOURCE, kind="tmpfs"), f"/ of {SOURCE} (tmpfs)"),
        (ROOT + nfs(SOURCE, kind="fuse.nfs4"), f"/ of {SOURCE} (fuse.nfs4)"),
        (ROOT + nfs(SOURCE, point="/workspace2"), "/ of overlay (overlay)"),
        (ROOT + NFS + LOCAL, "ext4"),
        (ROOT + NFS + nfs(SOURCE, point="/workspace/jobs") + LOCAL, "ext4"),
    ],
)
def test_whatever_else_is_mounted_there_is_not_it(tmp_path: Path, text: str, found: str) -> None:
    said = looked_at(tmp_path, text)
    assert said is not None
    assert found in said.partition(" and is ")[2]


@pytest.mark.parametrize(
    "text",
    [
        LOCAL + NFS,
        nfs(SOURCE, kind="nfs"),
        # Any number of optional fields before the hyphen, which may also be in a name.
        NFS.replace(" - ", " shared:1 master:2 propagate_from:3 - "),
        nfs(SOURCE) + nfs("a:/b", point="/workspace/below"),
        nfs(SOURCE) + nfs("a:/b", point="/workspace2"),
        nfs("192.168.77.11:/srv/claude-code/workspace/"),
    ],
)
def test_however_it_is_written_it_is_recognized(tmp_path: Path, text: str) -> None:
    assert looked_at(tmp_path, ROOT + text) is None


def test_a_directory_below_the_mount_is_named_as_on_the_server(tmp_path: Path) -> None:
    text = ROOT + nfs("192.168.77.11:/srv", point="/mnt")
    below = "/mnt/claude-code/workspace"
    assert looked_at(tmp_path, text, workspace_dir=below) is None
    assert looked_at(tmp_path, text, workspace_dir="/mnt/claude-code") is not None


@pytest.mark.parametrize("source", ["nas.example:/", "[fd00::1]:/srv/x", "nas:/a b/ü"])
def test_sources_of_any_kind_are_compared(tmp_path: Path, source: str) -> None:
    text = ROOT + nfs(source.replace(" ", r"\040"))
    assert looked_at(tmp_path, text, workspace_source=source) is None


def test_the_kernels_escapes_are_undone() -> None:
    line = rb"1 2 0:5 /a\134040b /my\040work\011\012space rw - nfs4 nas:/a\043b\134 rw"
    (mount,) = mounts(line)
    assert (mount.root, str(mount.point)) == (r"/a\040b", "/my work\t\nspace")
    assert mount.source == "nas:/a#b\\"


def test_what_the_kernel_says_of_this_machine_can_be_read() -> None:
    text = MOUNTINFO.read_bytes()
    assert len(list(mounts(text))) == len(text.splitlines())
    proc = mount_of(Path("/proc/self"), text)
    assert proc is not None
    assert (str(proc.point), proc.kind) == ("/proc", "proc")


def test_mounts_that_cannot_be_read_are_a_fault() -> None:
    settings = ReplicaSettings(workspace_source=SOURCE, broker_replica_password="x" * 16)
    said = WorkspaceMount(settings, mountinfo=Path("/nothing")).fault()
    assert said is not None
    assert "the mounts cannot be read (No such file or directory)" in said


def test_on_the_file_server_itself_the_directory_is_right(tmp_path: Path) -> None:
    assert looked_at(tmp_path, ROOT + LOCAL, workspace_host="worker-1") is None
    assert looked_at(tmp_path, ROOT + LOCAL, workspace_host="worker-10") is not None


def test_without_a_source_nothing_is_checked(tmp_path: Path) -> None:
    assert looked_at(tmp_path, ROOT + LOCAL, workspace_source="") is None


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        *(
            ({"WORKSPACE_SOURCE": source}, "workspace_source: must be what the NFS server exports")
            for source in ("/srv", "nas", "nas:srv", "nas:", ":/srv", "a b:/srv", "fd00::1:/srv")
        ),
        ({"WORKSPACE_SOURCE": "nas:/srv/../x"}, "workspace_source: must be what"),
        (
            {"WORKSPACE_SOURCE": SOURCE, "WORKSPACE_HOST": "a host"},
            "workspace_host: must be the name of a node",
        ),
        ({"WORKSPACE_HOST": "manager-1"}, "settings: WORKSPACE_HOST names the file server, but"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_a_sentence(
    variables: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broker_replica_password").write_text("x" * 16)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as refused:
        load(ReplicaSettings, secrets_dir=tmp_path)
    assert str(refused.value).startswith(said)
    assert "; " not in str(refused.value)


# Real processes, to which the kernel seems to say what was recorded

_NAMESPACE = """\
#!/bin/sh
exec unshare --mount sh -c 'mount --bind "{recorded}/$3" /proc/$$/mountinfo && exec "$0" "$@"' \\
    {python} "$@"
"""


@dataclass
class Nodes:
    """A pool of a gateway and a replica, and what the kernel says to them."""

    pool: RunningPool
    recorded: Path
    directory: Path

    def mount(self, process: str, kind: str) -> None:
        """Let a process find its workspace on NFS, or not (kind `ext4`)."""
        (self.recorded / process).write_text(ROOT + nfs(SOURCE, str(self.directory), kind))

    async def replica(self, path: str) -> httpx.Response:
        """Ask the replica itself."""
        process = psutil.Process(self.pool.pool.processes["replica-0"].pid)
        async with httpx.AsyncClient(trust_env=False) as http:
            return await http.get(f"http://127.0.0.1:{process.environ()['PORT']}{path}")

    async def announced_fault(self) -> str:
        """Wait until the replica announces that it takes no job, and return why."""
        while True:
            for replica in (await self.pool.status())["replicas"]["list"]:
                if "fault" in replica:
                    assert replica["status"] == "busy"
                    return str(replica["fault"])
            await asyncio.sleep(0.1)


@asynccontextmanager
async def running_nodes(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Nodes]:
    with tempfile.TemporaryDirectory() as base:
        recorded, directory = Path(base) / "recorded", Path(base) / "workspace"
        for made, mode in ((Path(base), 0o711), (recorded, 0o711), (directory, 0o777)):
            made.mkdir(exist_ok=True)
            made.chmod(mode)
        program = Path(base) / "python"
        program.write_text(_NAMESPACE.format(recorded=recorded, python=sys.executable))
        program.chmod(0o755)
        for process in ("gateway", "replica", "broker", "model-stub"):
            (recorded / process).write_text(ROOT + nfs(SOURCE, str(directory)))
        monkeypatch.setattr(sys, "executable", str(program))
        settings = {
            "WORKSPACE_DIR": str(directory),
            "WORKSPACE_SOURCE": SOURCE,
            "NODE_NAME": "worker-1",
        }
        async with running_pool(replicas=1, settings=settings) as pool:
            yield Nodes(pool, recorded, directory)


@pytest.fixture
def _mounts_may_be_made() -> Iterator[None]:
    if os.geteuid() != 0 or run(["unshare", "--mount", "true"], check=False).returncode != 0:
        pytest.skip("only root has a namespace of mounts of its own")
    yield


@pytest.mark.usefixtures("_mounts_may_be_made")
async def test_a_replica_without_the_shared_workspace_is_unhealthy_and_takes_no_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_nodes(monkeypatch) as nodes:
        assert (await nodes.replica("/health")).status_code == 200
        nodes.mount("replica", "ext4")
        answer = await nodes.replica("/health")
        assert answer.status_code == 503
        assert answer.json()["code"] == "unavailable"
        for part in ("node worker-1", f"must be {SOURCE} (nfs)", f"and is / of {SOURCE} (ext4)"):
            assert part in answer.json()["error"]
        # Also the pull that stood already is withdrawn.
        assert await nodes.announced_fault() == answer.json()["error"]
        status = await nodes.pool.status()
        assert (status["status"], status["replicas"]["idle"]) == ("busy", 0)
        async with nodes.pool.job("say 10 bytes") as stream:
            await stream.until("queued")
            # Longer than the replica waits between two looks.
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(3):
                    await stream.until("connected")
        async with nodes.pool.job("say 10 bytes") as stream:
            await stream.until("queued")
            nodes.mount("replica", "nfs4")
            assert (await stream.ending()).type == "completed"


@pytest.mark.usefixtures("_mounts_may_be_made")
async def test_a_replica_without_the_shared_workspace_still_stops_when_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_nodes(monkeypatch) as nodes:
        nodes.mount("replica", "ext4")
        await nodes.announced_fault()
        process = nodes.pool.pool.processes["replica-0"]
        process.terminate()
        async with asyncio.timeout(10):
            assert await process.wait() == 0


@pytest.mark.usefixtures("_mounts_may_be_made")
async def test_a_gateway_without_the_shared_workspace_takes_no_job_and_no_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_nodes(monkeypatch) as nodes:
        nodes.mount("gateway", "ext4")
        for method, path in (
            ("GET", "/health"),
            ("GET", "/ready"),
            ("GET", "/api/files?list"),
            ("GET", "/api/files/x"),
            ("PUT", "/api/files/x"),
            ("DELETE", "/api/files/x"),
            ("POST", "/api/execute"),
        ):
            code, said, headers = await nodes.pool.refusal(
                method=method, url=path, json={"prompt": "x"}
            )
            assert (code, said["code"], headers["Retry-After"]) == (503, "unavailable", "2"), path
            assert "the workspace of node worker-1 is not the shared one" in said["error"]
            # Some of these answer anybody.
            assert "192.168" not in said["error"]
        assert not any(nodes.directory.iterdir())
        assert (await nodes.pool.http.get("/status")).status_code == 200
        nodes.mount("gateway", "nfs4")
        assert (await nodes.pool.http.get("/health")).status_code == 200
        assert (await nodes.pool.http.put("/api/files/x", content=b"x")).status_code == 201
