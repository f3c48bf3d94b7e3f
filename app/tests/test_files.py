"""The workspace over HTTP: a real gateway without a broker, and agents who fight it."""

import asyncio
import contextlib
import fcntl
import gzip
import json
import os
import shutil
import socket
import stat
import sys
import tempfile
import threading
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import pytest_asyncio
from aiohttp import ETag
from hypothesis import given, settings
from hypothesis import strategies as st

from claude_jobs.contract.file import FileListing
from claude_jobs.development import free_port
from claude_jobs.gateway import file_store
from claude_jobs.gateway.conditions import Conditions, Version
from claude_jobs.workspace import DIRECTORY_MODE

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

LIMIT = 4 * 2**20
TOKEN = "a-token-for-the-files"
SECRET = b"nobody outside may see this"
NEW = Conditions(if_none_match=(ETag("*"),))


@dataclass
class Gateway:
    """A gateway whose broker is away, its workspace, and a directory beside it."""

    http: httpx.AsyncClient
    root: Path
    outside: Path
    process: Process

    async def refusal(self, method: str, path: str, **more: Any) -> tuple[int, str, str]:
        """Send what is refused; returns status, code and sentence."""
        response = await self.http.request(method, path, **more)
        body = response.json()
        assert body.keys() == {"error", "code"}
        assert str(self.root) not in body["error"]
        return response.status_code, body["code"], body["error"]

    async def put(self, path: str, content: bytes, **headers: str) -> httpx.Response:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.put(f"/api/files/{path}", content=content, headers=names)

    async def get(self, path: str, **headers: str) -> httpx.Response:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.get(f"/api/files/{path}", headers=names)

    async def names(self, path: str = "") -> list[str]:
        listing = FileListing.model_validate_json((await self.get(f"{path}?list")).content)
        return [entry.name for entry in listing.entries]

    def hidden(self) -> list[Path]:
        return list(self.root.rglob(f"{file_store.UPLOAD_PREFIX}*"))

    def empty(self) -> None:
        for child in self.root.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()


def make_directories(base: Path) -> tuple[Path, Path, Path]:
    root, outside, secrets = base / "workspace", base / "outside", base / "secrets"
    for directory in (root, outside, secrets):
        directory.mkdir()
    base.chmod(0o711)
    if os.geteuid() == 0:
        os.chown(root, 0, 10002)
    root.chmod(DIRECTORY_MODE)
    (outside / "secret").write_bytes(SECRET)
    (secrets / "api_tokens").write_text(json.dumps({"tests": TOKEN}))
    (secrets / "broker_gateway_password").write_text("x" * 32)
    return root, outside, secrets


@asynccontextmanager
async def running_gateway(base: Path) -> AsyncIterator[Gateway]:
    root, outside, secrets = make_directories(base)
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "claude_jobs",
        "gateway",
        env={
            "PATH": os.defpath,
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            "PORT": str(port),
            "SECRETS_DIR": str(secrets),
            "WORKSPACE_DIR": str(root),
            "BROKER_URL": f"nats://127.0.0.1:{free_port()}",
            "MAX_UPLOAD_BYTES": str(LIMIT),
            "LOG_LEVEL": "error",
        },
    )
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}",
        headers={"Authorization": f"Bearer {TOKEN}"},
        trust_env=False,
        timeout=30,
    ) as http:
        try:
            async with asyncio.timeout(30):
                while True:
                    assert process.returncode is None
                    with contextlib.suppress(httpx.TransportError):
                        await http.get("/health")
                        break
                    await asyncio.sleep(0.05)
            yield Gateway(http, root, outside, process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def the_gateway() -> AsyncIterator[Gateway]:
    base = Path(tempfile.mkdtemp(prefix="files-"))
    try:
        async with running_gateway(base) as gateway:
            yield gateway
    finally:
        shutil.rmtree(base)


@pytest.fixture
def gateway(the_gateway: Gateway) -> Iterator[Gateway]:
    the_gateway.empty()
    yield the_gateway
    assert the_gateway.hidden() == []
    assert [path.name for path in the_gateway.outside.iterdir()] == ["secret"]
    assert (the_gateway.outside / "secret").read_bytes() == SECRET
    assert the_gateway.process.returncode is None


async def test_what_is_put_can_be_read_listed_and_deleted(gateway: Gateway) -> None:
    made = await gateway.put("some/new/hello.txt", b"hello")
    assert made.status_code == 201
    assert made.headers["Location"] == "/api/files/some/new/hello.txt"
    assert (gateway.root / "some/new/hello.txt").read_bytes() == b"hello"
    read = await gateway.get("some/new/hello.txt")
    assert (read.status_code, read.content) == (200, b"hello")
    assert read.headers["ETag"] == made.headers["ETag"] == made.json()["etag"]
    assert read.headers["Content-Type"] == "text/plain; charset=utf-8"
    listed = (await gateway.get("some/new?list")).json()
    assert listed == {"path": "some/new", "entries": [made.json()]}
    assert made.json().keys() == {"name", "type", "size", "modifiedAt", "etag"}
    replaced = await gateway.put("some/new/hello.txt", b"other")
    assert replaced.status_code == 200
    assert replaced.headers["ETag"] != made.headers["ETag"]
    assert (await gateway.http.delete("/api/files/some/new/hello.txt")).status_code == 204
    assert await gateway.names("some/new") == []
    assert await gateway.refusal("GET", "/api/files/some/new/hello.txt") == (
        404,
        "not_found",
        "there is no 'some/new/hello.txt' in the workspace",
    )


async def test_nobody_reads_without_a_token(gateway: Gateway) -> None:
    for method in ("GET", "PUT", "DELETE"):
        response = await gateway.http.request(
            method, "/api/files/x", headers={"Authorization": "Bearer x"}
        )
        assert response.status_code == 401


# Downloads


@pytest.mark.parametrize(
    ("asked", "expected", "content_range"),
    [
        ("bytes=0-0", b"0", "bytes 0-0/10"),
        ("bytes=2-5", b"2345", "bytes 2-5/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=7-99", b"789", "bytes 7-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"),
        ("bytes=-99", b"0123456789", "bytes 0-9/10"),
        ("BYTES=0-1", b"01", "bytes 0-1/10"),
    ],
)
async def test_a_part_is_sent(
    gateway: Gateway, asked: str, expected: bytes, content_range: str
) -> None:
    (gateway.root / "ten").write_bytes(b"0123456789")
    response = await gateway.get("ten", Range=asked)
    assert (response.status_code, response.content) == (206, expected)
    assert response.headers["Content-Range"] == content_range
    assert response.headers["Content-Length"] == str(len(expected))


@pytest.mark.parametrize("asked", ["bytes=10-", "bytes=99-100", "bytes=-0"])
async def test_a_part_behind_the_end_is_refused(gateway: Gateway, asked: str) -> None:
    (gateway.root / "ten").write_bytes(b"0123456789")
    response = await gateway.get("ten", Range=asked)
    assert (response.status_code, response.json()["code"]) == (416, "range_not_satisfiable")
    assert response.headers["Content-Range"] == "bytes */10"


@pytest.mark.parametrize(
    "asked",
    ["", "bytes", "bytes=", "bytes=-", "bytes=5-2", "bytes=a-b", "lines=0-1", "bytes=0-1,3-4",
     "bytes=0-" + "9" * 5000, "bytes=٣-٤"],
)  # fmt: skip
async def test_a_range_that_is_none_or_several_gets_the_whole(gateway: Gateway, asked: str) -> None:
    (gateway.root / "ten").write_bytes(b"0123456789")
    response = await gateway.http.get("/api/files/ten", headers={b"Range": asked.encode()})
    assert (response.status_code, response.content) == (200, b"0123456789")


async def test_an_empty_file_is_sent_whole(gateway: Gateway) -> None:
    (gateway.root / "empty").touch()
    response = await gateway.get("empty")
    assert (response.status_code, response.content) == (200, b"")
    assert (await gateway.get("empty", Range="bytes=0-")).status_code == 416


async def test_a_range_is_of_the_version_that_the_client_has_begun(gateway: Gateway) -> None:
    (gateway.root / "ten").write_bytes(b"0123456789")
    first = await gateway.get("ten")
    for known in (first.headers["ETag"], first.headers["Last-Modified"]):
        part = await gateway.get("ten", Range="bytes=5-", If_Range=known)
        assert part.status_code == 206
    (gateway.root / "ten").write_bytes(b"abcdefghijk")
    os.utime(gateway.root / "ten", (0, 0))
    for known in (first.headers["ETag"], first.headers["Last-Modified"], "W/" + "x", '""'):
        whole = await gateway.get("ten", Range="bytes=5-", If_Range=known)
        assert (whole.status_code, whole.content) == (200, b"abcdefghijk")


async def test_head_tells_what_get_would_send(gateway: Gateway) -> None:
    (gateway.root / "ten").write_bytes(b"0123456789")
    got, head = await gateway.get("ten"), await gateway.http.head("/api/files/ten")
    assert (head.status_code, head.content) == (200, b"")
    for name in ("Content-Length", "ETag", "Last-Modified", "Accept-Ranges", "Content-Type"):
        assert head.headers[name] == got.headers[name]
    assert head.headers["Content-Length"] == "10"


async def test_a_known_version_is_not_sent_again(gateway: Gateway) -> None:
    (gateway.root / "ten").write_bytes(b"0123456789")
    first = await gateway.get("ten")
    tag, date = first.headers["ETag"], first.headers["Last-Modified"]
    for headers in (
        {"If_None_Match": tag},
        {"If_None_Match": f"W/{tag}"},
        {"If_None_Match": f'"x", {tag}'},
        {"If_None_Match": "*"},
        {"If_Modified_Since": date},
    ):
        again = await gateway.get("ten", **headers)
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["ETag"] == tag
    other = await gateway.get("ten", If_None_Match='"x"', If_Modified_Since=date)
    assert other.status_code == 200


async def test_another_version_than_the_wanted_is_not_sent(gateway: Gateway) -> None:
    (gateway.root / "ten").write_bytes(b"0123456789")
    first = await gateway.get("ten")
    tag, date = first.headers["ETag"], first.headers["Last-Modified"]
    assert (await gateway.get("ten", If_Match=tag)).status_code == 200
    assert (await gateway.get("ten", If_Unmodified_Since=date)).status_code == 200
    long_ago = "Thu, 01 Jan 1970 00:00:00 GMT"
    for headers in (
        {"If_Match": '"x"'},
        {"If_Match": f"W/{tag}"},
        {"If_Match": "x"},
        {"If_Unmodified_Since": long_ago},
    ):
        response = await gateway.get("ten", **headers)
        assert (response.status_code, response.json()["code"]) == (412, "precondition_failed")


@pytest.mark.parametrize(
    "name",
    ["page.html", "page.HTM", "image.svg", "page.xhtml", "data.xml", "code.js", "style.css",
     "doc.pdf", "page.html.gz", "noname", "x.unheard-of", "page.shtml", "a.mht"],
)  # fmt: skip
async def test_a_browser_runs_nothing_of_what_agents_wrote(gateway: Gateway, name: str) -> None:
    (gateway.root / name).write_text("<script>alert(1)</script>")
    response = await gateway.get(name)
    assert response.headers["Content-Disposition"] == "attachment"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in response.headers["Content-Security-Policy"]


@pytest.mark.parametrize("name", ["a.txt", "a.png", "a.json", "a.csv", "a.mp4"])
async def test_what_runs_nothing_is_shown(gateway: Gateway, name: str) -> None:
    (gateway.root / name).write_text("x")
    response = await gateway.get(name)
    assert "Content-Disposition" not in response.headers
    assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_a_file_that_gets_shorter_while_it_is_sent_breaks_the_connection(
    gateway: Gateway,
) -> None:
    path = gateway.root / "shrinks"
    path.write_bytes(b"x" * 64 * 2**20)
    with pytest.raises(httpx.TransportError):
        async with gateway.http.stream("GET", "/api/files/shrinks") as response:
            assert response.headers["Content-Length"] == str(64 * 2**20)
            os.truncate(path, 10)
            async for _ in response.aiter_raw():
                pass


@pytest.mark.parametrize("moment", [-1e15, 1e15, -1.0])
async def test_a_file_of_an_impossible_time_is_served(gateway: Gateway, moment: float) -> None:
    (gateway.root / "old").write_bytes(b"x")
    with contextlib.suppress(OverflowError, OSError):
        os.utime(gateway.root / "old", (moment, moment))
    assert (await gateway.get("old")).status_code == 200
    assert await gateway.names() == ["old"]


# Directories


async def test_a_directory_is_listed_by_name_and_kind(gateway: Gateway) -> None:
    (gateway.root / "directory").mkdir()
    (gateway.root / "file").write_bytes(b"12345")
    (gateway.root / "link").symlink_to("/etc/passwd")
    os.mkfifo(gateway.root / "pipe")
    for path in ("/api/files?list", "/api/files/?list", "/api/files/?list=true"):
        listing = (await gateway.http.get(path)).json()
        assert listing["path"] == "."
        shown = {entry["name"]: (entry["type"], entry.get("size")) for entry in listing["entries"]}
        assert list(shown) == sorted(shown)
        assert shown == {
            "directory": ("directory", None),
            "file": ("file", 5),
            "link": ("link", None),
            "pipe": ("other", None),
        }


async def test_a_large_directory_comes_in_pages_and_holds_up_nobody(gateway: Gateway) -> None:
    names = [f"file-{number:05}" for number in range(5000)]
    for name in names:
        (gateway.root / name).touch()
    seen: list[str] = []
    query = {"list": "", "limit": "700"}
    while True:
        asked = asyncio.create_task(gateway.http.get("/api/files", params=query))
        page = (await asked).json()
        assert len(page["entries"]) <= 700
        seen += [entry["name"] for entry in page["entries"]]
        if "nextCursor" not in page:
            break
        (gateway.root / seen[-1]).unlink()  # a page goes on though its neighbour went away
        query["cursor"] = page["nextCursor"]
    assert seen == names
    assert len((await gateway.get("?list&limit=10000")).json()["entries"]) == 5000 - 7
    assert len((await gateway.get("?list")).json()["entries"]) == 1000


async def test_names_of_any_bytes_are_listed_and_reached(gateway: Gateway) -> None:
    names = [
        b"\xff\xfe",
        b"a b",
        b"%41",
        b"line\nbreak",
        "ü€".encode(),
        b"\\",
        b"?#&",
        b"...",
        b"'\"",
    ]
    for name in names:
        (gateway.root / os.fsdecode(name)).write_bytes(name)
    entries = (await gateway.get("?list")).json()["entries"]
    assert len(entries) == len(names)
    for entry in entries:
        path = entry.get("encodedName") or quote(entry["name"])
        name = (await gateway.get(path)).content
        assert name in names
        assert (await gateway.http.delete(f"/api/files/{path}")).status_code == 204
    assert await gateway.names() == []
    assert (await gateway.put("%ff/%25", b"x")).status_code == 201
    assert (gateway.root / os.fsdecode(b"\xff") / "%").exists()
    page = (await gateway.get("%ff?list")).json()
    assert page["path"] == "\ufffd"


async def test_a_directory_is_no_file_and_a_file_no_directory(gateway: Gateway) -> None:
    (gateway.root / "directory").mkdir()
    (gateway.root / "file").touch()
    for path in ("", "/", "/directory", "/directory/", "/directory?list=false"):
        status, code, sentence = await gateway.refusal("GET", f"/api/files{path}")
        assert (status, code) == (400, "invalid_request")
        assert "add ?list" in sentence
    assert (await gateway.refusal("GET", "/api/files/file?list"))[0] == 400
    assert (await gateway.refusal("GET", "/api/files/file/x"))[0] == 404
    assert (await gateway.refusal("GET", "/api/files/nothing?list"))[0] == 404
    assert (await gateway.refusal("PUT", "/api/files/directory"))[:2] == (409, "conflict")
    assert (await gateway.refusal("PUT", "/api/files/file/x"))[:2] == (409, "conflict")
    assert (await gateway.refusal("PUT", "/api/files/new/"))[0] == 400
    assert (await gateway.refusal("PUT", "/api/files/"))[0] == 400
    assert (await gateway.refusal("PUT", "/api/files"))[0] == 405


@pytest.mark.parametrize(
    "query",
    ["list&limit=0", "list&limit=x", "list&limit=10001", "list&limit=-1", "list&limit=٣",
     "list&cursor=zz", "list=maybe", "lst", "list&list", "list&limit=1&limit=2"],
)  # fmt: skip
async def test_a_wrong_parameter_is_named(gateway: Gateway, query: str) -> None:
    status, code, sentence = await gateway.refusal("GET", f"/api/files?{query}")
    assert (status, code) == (400, "invalid_request")
    assert sentence.partition(":")[0] in {"list", "limit", "cursor", "lst"}


# Uploads


async def in_pieces(content: bytes, size: int = 65_536) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def test_a_large_file_comes_and_goes_unchanged(gateway: Gateway) -> None:
    content = os.urandom(LIMIT)
    for body in (content, in_pieces(content)):
        response = await gateway.http.put("/api/files/large", content=body)
        assert response.json()["size"] == LIMIT
        assert (await gateway.get("large")).content == content


async def test_an_upload_over_the_limit_is_refused_and_leaves_nothing(gateway: Gateway) -> None:
    (gateway.root / "kept").write_bytes(b"kept")
    content = b"x" * (LIMIT + 1)
    for path in ("kept", "new", "some/where/new"):
        for body in (content, in_pieces(content)):
            response = await gateway.http.put(f"/api/files/{path}", content=body)
            assert (response.status_code, response.json()["code"]) == (413, "too_large")
            assert str(LIMIT) in response.json()["error"]
    assert await gateway.names() == ["kept"]
    assert (gateway.root / "kept").read_bytes() == b"kept"


async def test_a_condition_guards_an_upload(gateway: Gateway) -> None:
    made = await gateway.put("x", b"1", If_None_Match="*")
    assert made.status_code == 201
    assert (await gateway.put("x", b"2", If_None_Match="*")).status_code == 412
    assert (await gateway.put("x", b"2", If_Match='"other"')).status_code == 412
    assert (await gateway.put("y", b"2", If_Match="*")).status_code == 412
    assert (await gateway.put("x", b"2", If_Match=made.headers["ETag"])).status_code == 200
    assert (await gateway.put("x", b"3", If_Match=made.headers["ETag"])).status_code == 412
    assert (gateway.root / "x").read_bytes() == b"2"
    assert await gateway.names() == ["x"]


async def test_of_those_who_know_one_version_one_replaces_it(gateway: Gateway) -> None:
    tag = (await gateway.put("x", b"first")).headers["ETag"]
    answers = await asyncio.gather(
        *(gateway.put("x", b"%d" % number * 100_000, If_Match=tag) for number in range(20))
    )
    winners = [number for number, answer in enumerate(answers) if answer.status_code == 200]
    assert len(winners) == 1
    assert {answer.status_code for answer in answers} == {200, 412}
    assert (gateway.root / "x").read_bytes() == b"%d" % winners[0] * 100_000


async def test_of_those_who_make_a_file_one_makes_it(gateway: Gateway) -> None:
    answers = await asyncio.gather(
        *(gateway.put("deep/x", b"%d" % number, If_None_Match="*") for number in range(20))
    )
    assert sorted(answer.status_code for answer in answers) == [201] + [412] * 19


@pytest.mark.parametrize("kind", ["replace", "make"])
async def test_two_gateways_do_not_both_write_over_what_they_know(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """One stops between its check and its act until the other is done, or waits for it."""
    path = gateway.root / "x"
    if kind == "replace":
        path.write_bytes(b"known")
        known = (ETag(Version.of(path.stat()).tag),)
    conditions = Conditions(if_match=known) if kind == "replace" else NEW
    other_is_done_or_waits, inside = threading.Event(), threading.Event()
    change_mode, lock = os.fchmod, fcntl.flock

    def stop_the_first(descriptor: int, mode: int) -> None:
        if not inside.is_set():
            inside.set()
            assert other_is_done_or_waits.wait(20)
        change_mode(descriptor, mode)

    def tell_who_waits(descriptor: int, operation: int) -> None:
        try:
            lock(descriptor, operation)
        except BlockingIOError:
            other_is_done_or_waits.set()
            raise

    monkeypatch.setattr(os, "fchmod", stop_the_first)
    monkeypatch.setattr(fcntl, "flock", tell_who_waits)

    def write(content: bytes) -> bool:
        upload = file_store.Upload(gateway.root, ("x",), conditions)
        try:
            upload.begin()
            upload.write(content)
            begun.wait(20)
            upload.commit()
        except file_store.ConditionError:
            return False
        else:
            return True
        finally:
            upload.discard()
            if inside.is_set():
                other_is_done_or_waits.set()

    begun = threading.Barrier(2)
    wrote = await asyncio.gather(asyncio.to_thread(write, b"one"), asyncio.to_thread(write, b"two"))
    assert sorted(wrote) == [False, True]
    assert path.read_bytes() == (b"one" if wrote[0] else b"two")


async def test_of_two_uploads_one_wins_whole(gateway: Gateway) -> None:
    contents = [bytes([65 + number]) * 1_000_000 for number in range(8)]
    await asyncio.gather(*(gateway.put("x", content) for content in contents))
    assert (gateway.root / "x").read_bytes() in contents


async def test_a_reader_sees_the_old_file_or_the_new(gateway: Gateway) -> None:
    contents = [bytes([65 + number]) * 1_000_000 for number in range(10)]
    await gateway.put("x", contents[0])

    async def read() -> None:
        while not done.is_set():
            assert (await gateway.get("x")).content in contents

    done = asyncio.Event()
    readers = [asyncio.create_task(read()) for _ in range(3)]
    for content in contents:
        await gateway.put("x", content)
    done.set()
    await asyncio.gather(*readers)


async def test_an_upload_that_breaks_off_leaves_no_trace(gateway: Gateway) -> None:
    (gateway.root / "kept").write_bytes(b"kept")
    for path in (b"kept", b"some/where/new"):
        for framing in (b"Content-Length: 1000000", b"Transfer-Encoding: chunked"):
            _, writer = await asyncio.open_connection("127.0.0.1", gateway.http.base_url.port)
            writer.write(
                b"PUT /api/files/%s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n%s\r\n\r\n"
                % (path, TOKEN.encode(), framing)
            )
            writer.write(b"186A0\r\n" if b"chunked" in framing else b"")
            writer.write(b"x" * 100_000)
            await writer.drain()
            while not gateway.hidden():
                await asyncio.sleep(0.01)
            assert "where" not in await gateway.names("some/where" if b"some" in path else "")
            writer.close()
            while gateway.hidden():
                await asyncio.sleep(0.01)
    while await gateway.names() != ["kept"]:
        await asyncio.sleep(0.01)
    assert (gateway.root / "kept").read_bytes() == b"kept"


async def test_a_refused_upload_is_not_even_sent(gateway: Gateway) -> None:
    (gateway.root / "kept").write_bytes(b"kept")

    def answer(condition: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", gateway.http.base_url.port or 0)) as client:
            client.sendall(
                b"PUT /api/files/kept HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n"
                b"Content-Length: 5\r\nExpect: 100-continue\r\n%s\r\n" % (TOKEN.encode(), condition)
            )
            said = client.recv(100)
            if b" 100 " in said:
                client.sendall(b"other")
                said += client.recv(1000)
            return said

    assert (await asyncio.to_thread(answer, b"If-None-Match: *\r\n")).startswith(b"HTTP/1.1 412 ")
    said = await asyncio.to_thread(answer, b"")
    assert said.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")
    assert (gateway.root / "kept").read_bytes() == b"other"


@pytest.mark.parametrize(
    "headers", [{"Content-Range": "bytes 0-1/2"}, {"Content-Encoding": "gzip"}]
)
async def test_a_part_or_a_coding_is_no_file(gateway: Gateway, headers: dict[str, str]) -> None:
    status, code, sentence = await gateway.refusal(
        "PUT", "/api/files/x", content=gzip.compress(b"xx"), headers=headers
    )
    assert (status, code) == (400, "invalid_request")
    assert sentence.startswith(next(iter(headers)))


async def test_agents_can_change_what_was_uploaded(gateway: Gateway) -> None:
    await gateway.put("new/deep/file", b"uploaded")
    for directory in ("new", "new/deep"):
        assert stat.S_IMODE((gateway.root / directory).stat().st_mode) == DIRECTORY_MODE
    assert stat.S_IMODE((gateway.root / "new/deep/file").stat().st_mode) == 0o664
    if os.geteuid() != 0:
        return
    script = "echo changed >> new/deep/file && touch new/deep/mine && rm new/deep/file"
    process = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        script,
        cwd=gateway.root,
        user=10001,
        group=10002,
        extra_groups=[],
    )
    assert await process.wait() == 0


async def test_a_script_that_is_replaced_can_still_be_run(gateway: Gateway) -> None:
    (gateway.root / "run").write_text("#!/bin/sh\n")
    (gateway.root / "run").chmod(0o750)
    await gateway.put("run", b"#!/bin/sh\nexit 0\n")
    assert stat.S_IMODE((gateway.root / "run").stat().st_mode) == 0o774


async def test_what_a_crash_left_is_hidden_and_goes_in_time(gateway: Gateway) -> None:
    (gateway.root / "deep").mkdir()
    (gateway.root / "loop").symlink_to(".")
    new = gateway.root / "deep" / f"{file_store.UPLOAD_PREFIX}new"
    old = gateway.root / "deep" / f"{file_store.UPLOAD_PREFIX}old"
    outside = gateway.outside / f"{file_store.UPLOAD_PREFIX}old"
    (gateway.root / "out").symlink_to(gateway.outside)
    try:
        for path in (new, old, outside):
            path.touch()
        for path in (old, outside):
            os.utime(path, (0, 0))
        assert await gateway.names("deep") == []
        for method in ("GET", "PUT", "DELETE"):
            assert (await gateway.refusal(method, f"/api/files/deep/{old.name}"))[0] == 400
        assert file_store.sweep(gateway.root) == 1
        assert [path.exists() for path in (new, old, outside)] == [True, False, True]
        os.utime(new, (0, 0))
        # Nobody sees it, so that it is not in the way either.
        assert (await gateway.http.delete("/api/files/deep")).status_code == 204
    finally:
        outside.unlink()


# Deletion


async def test_only_an_empty_directory_is_deleted_without_being_asked_twice(
    gateway: Gateway,
) -> None:
    (gateway.root / "tree/below").mkdir(parents=True)
    (gateway.root / "tree/below/file").touch()
    (gateway.root / "tree/out").symlink_to(gateway.outside)
    status, code, sentence = await gateway.refusal("DELETE", "/api/files/tree")
    assert (status, code) == (409, "conflict")
    assert "?recursive" in sentence
    (gateway.root / "empty").mkdir()
    assert (await gateway.http.delete("/api/files/empty")).status_code == 204
    assert (await gateway.http.delete("/api/files/tree?recursive")).status_code == 204
    assert await gateway.names() == []


async def test_a_tree_of_any_depth_is_deleted(gateway: Gateway) -> None:
    (gateway.root / "top").mkdir()
    deeper = "import os\nfor _ in range(3000):\n os.mkdir('d')\n os.chdir('d')\nopen('file', 'w')"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", deeper, cwd=gateway.root / "top"
    )
    assert await process.wait() == 0
    assert file_store.sweep(gateway.root) == 0
    assert (await gateway.http.delete("/api/files/top?recursive")).status_code == 204
    assert await gateway.names() == []


async def test_a_link_is_deleted_and_not_what_it_leads_to(gateway: Gateway) -> None:
    (gateway.root / "kept").mkdir()
    (gateway.root / "kept/file").touch()
    for target in ("kept", "kept/file", "nothing", str(gateway.outside), "link"):
        (gateway.root / "link").symlink_to(target)
        assert (await gateway.http.delete("/api/files/link?recursive")).status_code == 204
        assert not (gateway.root / "link").is_symlink()
    assert (gateway.root / "kept/file").exists()


async def test_the_workspace_itself_is_not_deleted(gateway: Gateway) -> None:
    (gateway.root / "file").touch()
    for path in ("/", "/%2E", "/%2E/", "/?recursive", "/%2E?recursive"):
        status, code, _ = await gateway.refusal("DELETE", f"/api/files{path}")
        assert (status, code) == (403, "forbidden"), path
    assert (await gateway.refusal("DELETE", "/api/files?recursive"))[0] == 405
    assert await gateway.names() == ["file"]


async def test_a_condition_guards_a_deletion(gateway: Gateway) -> None:
    tag = (await gateway.put("x", b"1")).headers["ETag"]
    for headers in ({"If-Match": '"other"'}, {"If-None-Match": tag}):
        assert (await gateway.refusal("DELETE", "/api/files/x", headers=headers))[0] == 412
    gone = await gateway.http.delete("/api/files/x", headers={"If-Match": tag})
    assert gone.status_code == 204
    assert (await gateway.refusal("DELETE", "/api/files/x"))[0] == 404


# Confinement


@pytest.mark.parametrize(
    "path",
    [
        "..%2fsecrets%2fapi_tokens",
        "%2e%2e/secrets/api_tokens",
        "a/%2e%2e/%2e%2e/outside/secret",
        "%2e%2e",
        "/etc/passwd",
        "%2fetc/passwd",
        "a%00b",
        "%00",
        "x" * 256,
        "%c3%bc" * 128,
        "a/" * 257 + "a",
        "/".join(["y" * 250] * 17),
    ],
)
async def test_a_path_that_can_name_nothing_here_is_refused(gateway: Gateway, path: str) -> None:
    for method in ("GET", "PUT", "DELETE"):
        status, code, sentence = await gateway.refusal(method, f"/api/files/{path}")
        assert (status, code) == (400, "invalid_request")
        assert sentence.startswith("the path must ")


async def test_dots_are_no_way_out_whoever_writes_them(gateway: Gateway) -> None:
    # A client of its own: httpx takes dots away.
    for path in (b"../outside/secret", b"a/../../outside/secret", b"../../../etc/passwd"):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http.base_url.port)
        writer.write(
            b"GET /api/files/%s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n"
            b"Connection: close\r\n\r\n" % (path, TOKEN.encode())
        )
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert SECRET not in answer
        writer.close()


async def test_percent_signs_are_decoded_once(gateway: Gateway) -> None:
    await gateway.put("%252e%252e", b"a file with percent signs")
    assert (gateway.root / "%2e%2e").exists()
    assert (await gateway.get("%252e%252e")).content == b"a file with percent signs"


@pytest.mark.parametrize(
    "target",
    ["../outside", "/etc", "{outside}", "a/../../outside", "{root}/../outside", "{root}-2", "/"],
)
async def test_a_link_that_leads_out_is_not_followed(gateway: Gateway, target: str) -> None:
    (gateway.root / "a").mkdir()
    (gateway.root / "link").symlink_to(target.format(root=gateway.root, outside=gateway.outside))
    for method, path in (
        ("GET", "link"),
        ("GET", "link?list"),
        ("GET", "link/secret"),
        ("GET", "link/nothing/x"),
        ("PUT", "link"),
        ("PUT", "link/new"),
        ("PUT", "link/new/x"),
        ("DELETE", "link/secret"),
        ("DELETE", "link/secret?recursive"),
    ):
        status, code, sentence = await gateway.refusal(method, f"/api/files/{path}")
        assert (status, code) == (403, "forbidden"), (method, path)
        assert "leaves the workspace" in sentence


async def test_links_that_stay_inside_are_followed(gateway: Gateway) -> None:
    (gateway.root / "a/b").mkdir(parents=True)
    (gateway.root / "a/file").write_bytes(b"inside")
    for name, target in {
        "relative": "a/b/../file",
        "absolute": f"{gateway.root}/a/file",
        "twice": "relative",
        "new": "a/b/new/file",
    }.items():
        (gateway.root / name).symlink_to(target)
    for name in ("relative", "absolute", "twice"):
        assert (await gateway.get(name)).content == b"inside"
    assert (await gateway.put("new", b"through a link")).status_code == 201
    assert (gateway.root / "a/b/new/file").read_bytes() == b"through a link"
    await gateway.put("absolute", b"changed")
    assert (gateway.root / "a/file").read_bytes() == b"changed"
    assert (gateway.root / "absolute").is_symlink()


async def test_loops_of_links_end(gateway: Gateway) -> None:
    (gateway.root / "one").symlink_to("two")
    (gateway.root / "two").symlink_to("one/x")
    (gateway.root / "dots").symlink_to("./dots/./dots")
    for path in ("one", "two/x", "dots"):
        for method in ("GET", "PUT"):
            status, code, sentence = await gateway.refusal(method, f"/api/files/{path}")
            assert (status, code) == (403, "forbidden")
            assert "cannot be followed" in sentence


async def test_what_is_no_regular_file_is_refused_at_once(gateway: Gateway) -> None:
    os.mkfifo(gateway.root / "pipe")
    (gateway.root / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(gateway.root / "socket"))
    if os.geteuid() == 0:
        with contextlib.suppress(PermissionError):
            os.mknod(gateway.root / "zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    async with asyncio.timeout(5):
        for name in await gateway.names():
            assert (await gateway.refusal("GET", f"/api/files/{name}"))[:2] == (403, "forbidden")
        assert (await gateway.refusal("PUT", "/api/files/pipe"))[:2] == (409, "conflict")
        assert (await gateway.http.delete("/api/files/pipe")).status_code == 204


NAMES = ["a", "b", "..", ".", "", "in", "out", "up", "loop", "absolute", "new", "secret", "\0", "é"]


@given(
    method=st.sampled_from(["GET", "PUT", "DELETE"]),
    names=st.lists(st.sampled_from(NAMES), max_size=6),
    quote_all=st.booleans(),
    query=st.sampled_from(["", "?list", "?recursive"]),
)
@settings(max_examples=300, deadline=None)
async def test_no_path_reaches_what_lies_outside(
    the_gateway: Gateway, method: str, names: list[str], quote_all: bool, query: str
) -> None:
    root = the_gateway.root
    (root / "a/b").mkdir(parents=True, exist_ok=True)
    for name, target in {
        "in": "a/b",
        "out": "../outside",
        "up": "..",
        "a/up": "../..",
        "a/b/out": "../../../outside",
        "loop": "loop/x",
        "absolute": str(root / "a"),
        "a/absolute": str(the_gateway.outside),
    }.items():
        with contextlib.suppress(FileExistsError):
            (root / name).symlink_to(target)
    path = "/".join(names)
    quoted = "".join(f"%{byte:02x}" for byte in path.encode()) if quote_all else quote(path)
    response = await the_gateway.http.request(method, f"/api/files/{quoted}{query}", content=b"x")
    assert response.status_code in {200, 201, 204, 400, 403, 404, 405, 409}
    assert SECRET not in response.content
    assert [path.name for path in the_gateway.outside.iterdir()] == ["secret"]
    assert (the_gateway.outside / "secret").read_bytes() == SECRET
    the_gateway.empty()


@asynccontextmanager
async def an_agent_that_swaps(root: Path, outside: Path) -> AsyncIterator[None]:
    """Let a process swap a directory, a file and the hidden uploads for links out all the time."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SWAPPER, root, outside)
    try:
        yield
        assert process.returncode is None, "the swapper died"
    finally:
        process.kill()
        await process.wait()


SWAPPER = """
import contextlib, ctypes, os, sys
root, outside = sys.argv[1:]
os.chdir(root)
EXCHANGE, HERE = 2, -100
exchange = ctypes.CDLL(None).renameat2
os.symlink(outside, "link")
os.symlink(outside + "/secret", "directory/link")
while True:
    exchange(HERE, b"directory", HERE, b"link", EXCHANGE)
    with contextlib.suppress(OSError):
        exchange(HERE, b"directory/secret", HERE, b"directory/link", EXCHANGE)
        for place in ("directory", "link"):
            if not os.path.islink(place):
                for name in os.listdir(place):
                    if name.startswith(".claude-jobs-upload-"):
                        os.unlink(f"{place}/{name}")
                        os.symlink(outside + "/secret", f"{place}/{name}")
"""


async def test_an_agent_that_swaps_links_gets_nothing_in_or_out(gateway: Gateway) -> None:
    directory = gateway.root / "directory"
    directory.mkdir()
    (directory / "secret").write_bytes(b"inside")
    seen: dict[tuple[str, int], int] = {}
    loop = asyncio.get_running_loop()

    async def request(method: str, path: str, **more: Any) -> None:
        while loop.time() < end:
            response = await gateway.http.request(method, f"/api/files/{path}", **more)
            assert SECRET not in response.content
            if method == "GET" and response.status_code == 200 and "?list" not in path:
                assert response.content == b"inside"
            key = method, response.status_code
            seen[key] = seen.get(key, 0) + 1

    async with an_agent_that_swaps(gateway.root, gateway.outside):
        end = loop.time() + 3
        await asyncio.gather(
            request("GET", "directory/secret"),
            request("GET", "directory/secret"),
            request("GET", "directory?list"),
            request("PUT", "directory/secret", content=b"inside"),
            request("PUT", "directory/new", content=b"inside", headers={"If-None-Match": "*"}),
            request("PUT", "directory/deeper/new", content=b"inside"),
            request("DELETE", "directory/deeper?recursive"),
            request("DELETE", "directory/new"),
        )
    assert {status for _, status in seen} <= {200, 201, 204, 403, 404, 409, 412}, seen
    assert seen["GET", 200] > 10, seen  # it was a fight, and not only refusals
    assert seen["GET", 403] > 10, seen
    assert seen["PUT", 403] > 10, seen
    assert seen.get(("PUT", 201), 0) + seen.get(("PUT", 200), 0) > 10, seen
    gateway.empty()
