"""The examples do what they say, against a real pool."""

import asyncio
import os
import shutil
import sys
from pathlib import Path

import pytest
from cutting_proxy import cutting_proxy
from pool_client import RunningPool

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

EXAMPLES = Path(__file__).parents[2] / "examples"
NODE = shutil.which("node")

needs_node = pytest.mark.skipif(NODE is None, reason="there is no node on this machine")


async def output(pool: RunningPool, *command: str, url: str | None = None) -> str:
    """Run a program that must end well, and return what it says."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            "CLAUDE_JOBS_URL": url or pool.pool.url,
            "CLAUDE_JOBS_TOKEN": pool.pool.token,
        },
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, said.decode()
    return said.decode()


async def test_curl(pool: RunningPool) -> None:
    said = await output(pool, str(EXAMPLES / "curl.sh"))
    assert said.rstrip().endswith("== all done"), said
    for line in ("event: connected", "event: completed"):
        assert said.count(line) == 1, said
    assert "\nerror\n" in said  # how the stream of the cancelled job ends


async def test_the_client_in_python(pool: RunningPool) -> None:
    said = await output(pool, sys.executable, str(EXAMPLES / "client.py"))
    assert (pool.workspace / "examples" / "test.txt").exists()
    assert "- Create a file called test.txt" in said


async def test_plain_httpx_even_over_a_wire_that_breaks(pool: RunningPool) -> None:
    async with cutting_proxy(pool.pool.port) as proxy:
        proxy.limits = [3000]
        said = await output(
            pool, sys.executable, str(EXAMPLES / "plain_httpx.py"), "run echo there", url=proxy.url
        )
    assert "coming back:" in said
    kinds = [line.split()[1] for line in said.splitlines() if line[:1].isdigit()]
    assert [kinds.count(kind) for kind in ("connected", "completed")] == [1, 1]
    assert kinds[-1] == "completed"


def browser_module(directory: Path, program: str) -> str:
    """Make a program of the page's script, as far as it needs no page, and what a test adds."""
    page = (EXAMPLES / "browser.html").read_text(encoding="utf-8")
    script = page.partition('<script type="module">')[2].partition("// ---- the page ----")[0]
    file = directory / "program.mjs"
    file.write_text(script + program, encoding="utf-8")
    return str(file)


@needs_node
async def test_the_parser_of_the_page_takes_pieces_of_any_size(
    pool: RunningPool, tmp_path: Path
) -> None:
    program = r"""
import assert from "node:assert/strict";
const text = 'retry: 10\n\n: comment\n\nid: 1\nevent: a\ndata: {"x":\ndata: "é"}\n\n' +
  'event: queued\r\ndata:{"y":2}\r\n\r\nid: 7\rdata: {}\r\rid: 8\ndata: {"half":';
const wanted = [{ id: "1", type: "a", data: { x: "é" } },
  { id: null, type: "queued", data: { y: 2 } }, { id: "7", type: "message", data: {} }];
for (let size = 1; size <= text.length; size += 1) {
  const parser = new EventParser();
  const seen = [];
  for (let at = 0; at < text.length; at += size) {
    seen.push(...parser.feed(text.slice(at, at + size)));
  }
  assert.deepEqual(seen, wanted, `in pieces of ${size}`);
  assert.equal(parser.retry, 10);
}
console.log("well");
"""
    assert await output(pool, str(NODE), browser_module(tmp_path, program)) == "well\n"


@needs_node
async def test_the_page_comes_back_to_its_job(pool: RunningPool, tmp_path: Path) -> None:
    program = r"""
import assert from "node:assert/strict";
const jobs = new Jobs({ base: process.env.CLAUDE_JOBS_URL, token: process.env.CLAUDE_JOBS_TOKEN });
const read = async (id, after = 0) => {
  const seen = [];
  for await (const event of jobs.events(id, { after })) if (event.id) seen.push(event);
  return seen;
};
const job = await jobs.submit({ prompt: "run echo 1\nrun echo 2" });
const seen = await read(job.id);
assert.equal(seen.at(-1).type, "completed");
assert.deepEqual(await read(job.id), seen);
assert.deepEqual(await read(job.id, seen.at(-1).id), []);
const other = await jobs.submit({ prompt: "work forever" });
await jobs.cancel(other.id);
assert.equal((await read(other.id)).at(-1).data.code, "cancelled");
await assert.rejects(jobs.submit({ prompt: "" }), { code: "invalid_request" });
const long = await read((await jobs.submit({ prompt: "say 9000000 bytes" })).id);
const texts = long.filter((event) => event.data.content?.type === "assistant");
assert.equal(texts[0].data.content.message.content[0].text.length, 9000000);
console.log("well");
"""
    file = browser_module(tmp_path, program)
    async with cutting_proxy(pool.pool.port) as proxy:
        proxy.limits = [10**9, 2000, 6000]
        assert await output(pool, str(NODE), file, url=proxy.url) == "well\n"
    assert proxy.connections > 3


async def test_the_page_loads_nothing_from_outside() -> None:
    page = (EXAMPLES / "browser.html").read_text(encoding="utf-8")
    for word in ("src=", "href=", "@import", "http://", "https://", "innerHTML ="):
        assert word not in page
