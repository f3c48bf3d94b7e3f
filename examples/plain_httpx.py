"""A job with httpx and httpx-sse alone, without a package of this project.

CLAUDE_JOBS_URL=… CLAUDE_JOBS_TOKEN=… python examples/plain_httpx.py "your prompt"
"""

import json
import os
import sys
import time
import uuid

import httpx
from httpx_sse import connect_sse

api = httpx.Client(
    base_url=os.environ.get("CLAUDE_JOBS_URL", "http://127.0.0.1:3000"),
    headers={"Authorization": f"Bearer {os.environ['CLAUDE_JOBS_TOKEN']}"},
    timeout=45,  # a comment comes every 15 s: longer silence is a dead line
)
prompt = {"prompt": " ".join(sys.argv[1:]) or "Create a file called test.txt"}
# The key makes it safe to send this again when the answer was lost.
submission = {"Prefer": "respond-async", "Idempotency-Key": str(uuid.uuid4())}
job = api.post("/api/execute", json=prompt, headers=submission).raise_for_status().json()
last, ended = "0", False
while not ended:
    try:
        path, after = f"/api/jobs/{job['id']}/events", {"Last-Event-ID": last}
        with connect_sse(api, "GET", path, headers=after) as source:
            for event in source.iter_sse():
                last = event.id or last
                if event.data:
                    print(event.id, event.event, json.loads(event.data))
                ended = ended or event.event in ("completed", "error")
    except httpx.TransportError as lost:
        print("coming back:", lost, file=sys.stderr)
    if not ended:
        time.sleep(2)
