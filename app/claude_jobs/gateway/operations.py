"""What each route does, in OpenAPI's words: parameters, bodies, answers, examples."""

from typing import Any, Literal

from pydantic import BaseModel

from claude_jobs.contract.base import Document
from claude_jobs.contract.error import HTTP_STATUS, ErrorCode
from claude_jobs.contract.job import JobStatus, PermissionMode
from claude_jobs.gateway import files, paging

Object = dict[str, Any]

INTRODUCTION = """\
Post a prompt; one agent, in a container that has never run another job, works on it in the shared
workspace; read its events as Server-Sent Events, now or later, from anywhere.

A job's stream looks like this. Each `data` line repeats the type, so that a client that reads
only those lines works; lines that begin with a colon are comments and keep the connection open.

```
retry: 2000

id: 41
event: queued
data: {"type":"queued","jobId":"019e…","position":1}

id: 42
event: connected
data: {"type":"connected","jobId":"019e…","sessionId":"…","replica":"…","node":"…","attempt":1,…}

id: 43
event: message
data: {"type":"message","content":{"type":"assistant",…},"timestamp":"…"}

id: 51
event: completed
data: {"type":"completed","result":"Done.","sessionId":"…","usage":{…},"costUsd":0.02,…}
```

Every accepted job gets exactly one `completed` or `error`, and it is the last event. A connection
that breaks cancels nothing: attach again with the last `id` that you saw.

Every error is a JSON object with a sentence, `error`, and a word for programs, `code`. Every
request but `/health` and `/ready` needs the header `Authorization: Bearer <token>`.
"""

TAGS = {
    "jobs": "Run jobs, watch them, end them.",
    "sessions": "The conversations that a job can go on with (`resumeSessionId`).",
    "files": "The workspace that all jobs share.",
    "pool": "The state of the replicas and the queue.",
    "about": "This description.",
}

REFUSALS: dict[ErrorCode, str] = {
    ErrorCode.INVALID_REQUEST: "the request cannot be served as it is; the sentence names the "
    "field, parameter or header",
    ErrorCode.UNAUTHORIZED: "no token was sent, or one that is not known here",
    ErrorCode.FORBIDDEN: "this is not allowed",
    ErrorCode.NOT_FOUND: "there is no such thing, or not any more",
    ErrorCode.METHOD_NOT_ALLOWED: "this path does not answer that method; `Allow` lists those "
    "that it answers",
    ErrorCode.CONFLICT: "the state of things is against it",
    ErrorCode.PRECONDITION_FAILED: "a condition (`If-Match` and its like) does not hold",
    ErrorCode.TOO_LARGE: "the body is larger than this deployment takes",
    ErrorCode.RANGE_NOT_SATISFIABLE: "the file has no such bytes; `Content-Range` tells its size",
    ErrorCode.QUEUE_FULL: "the queue, or this token's share of it, is full",
    ErrorCode.INTERNAL: "a fault of the gateway; its log says why",
    ErrorCode.UNAVAILABLE: "the job broker or the workspace is out of reach",
}


# What the models' types do not tell, by schema and field.
FIELDS: dict[str, dict[str, str]] = {
    "JobRequest": {
        "prompt": "What the agent is to do. Must not be empty.",
        "workspace": "The directory to work in, below the shared workspace; it is made if it is "
        "not there. No `..`, no link that leads out.",
        "resumeSessionId": "Go on with this session, with all that was said in it.",
        "model": "The model, as Claude Code takes it: an alias or a full name.",
        "maxTurns": "End after so many turns of the agent.",
        "timeoutSeconds": "End the job when it has run for so long.",
        "permissionMode": "How Claude Code treats tools that need permission; nobody is there "
        "to be asked.",
        "dangerouslySkipPermissions": "Allow every tool. True unless this is false or "
        "`permissionMode` says otherwise; the two must not contradict each other.",
        "allowedTools": "Tools that need no permission, as Claude Code's rules: `Read`, "
        "`Bash(git log *)`.",
        "disallowedTools": "Tools that must not be used, as such rules.",
        "appendSystemPrompt": "Added to Claude Code's own system prompt.",
        "metadata": "Your own notes, handed back with the job's record: 16 KiB of JSON, at most "
        "32 levels deep.",
    },
    "JobRecord": {
        "id": "The job's id, a UUIDv7: ids sort by the time of acceptance.",
        "status": "Where the job stands.",
        "prompt": "As it was submitted.",
        "workspace": "The directory that the job works in, below the shared workspace.",
        "client": "The name of the token that submitted it.",
        "createdAt": "When it was accepted.",
        "attempt": "How often an agent was started for it.",
        "sessionId": "The session, for `resumeSessionId`.",
        "replica": "The replica that runs it, or ran it last.",
        "node": "The machine of that replica.",
        "startedAt": "When its agent was started.",
        "endedAt": "When it ended.",
        "result": "What the agent said at the end.",
        "error": "Why it ended otherwise, as a sentence.",
        "errorCode": "Why, as a word: the `code` of its `error` event.",
        "usage": "Tokens, as Claude Code counts them.",
        "costUsd": "What it cost, in US dollars, as Claude Code reckons.",
        "metadata": "As it was submitted.",
    },
}
_RELATIVE_PART = r"(?!\.\.?(/|$))[^/\x00]{1,255}"
# What the models check in code, as far as a schema can say it.
CONSTRAINTS: dict[str, Object] = {
    "prompt": {"minLength": 1, "pattern": r"\S"},
    "workspace": {"pattern": rf"^(\.|{_RELATIVE_PART}(/{_RELATIVE_PART})*)$"},
}

_BYPASS = "bypassPermissions"
_OTHER_MODES = [str(mode) for mode in PermissionMode if mode != _BYPASS]
# The two ways to say how permissions are treated do not contradict each other.
PERMISSIONS: list[Object] = [
    {"properties": {"permissionMode": {"type": "null"}}},
    {"properties": {"dangerouslySkipPermissions": {"type": "null"}}},
    {
        "properties": {
            "dangerouslySkipPermissions": {"const": True},
            "permissionMode": {"const": _BYPASS},
        }
    },
    {
        "properties": {
            "dangerouslySkipPermissions": {"const": False},
            "permissionMode": {"enum": _OTHER_MODES},
        }
    },
]


class Health(Document):
    """The process lives."""

    status: Literal["ok"]


class Readiness(Document):
    """Jobs can be taken."""

    status: Literal["ready"]


# Answers that no handler has a model for.
ANSWERS: tuple[type[BaseModel], ...] = (Health, Readiness)

_JOB_ID = "019e2f6d-8a41-7c3e-9b52-6f0d1c7a8e24"
_SESSION_ID = "5b3c9a2e-1d47-4f6b-8c0a-7e9d2f4b6a81"
# A UUIDv7 of this and the next centuries.
_UUID7 = "^0[0-9a-f]{7}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"
_RECORD = {
    "id": _JOB_ID,
    "status": "completed",
    "prompt": "create a file called hello.txt",
    "workspace": ".",
    "client": "default",
    "createdAt": "2026-11-24T09:30:00.000000Z",
    "attempt": 1,
    "sessionId": _SESSION_ID,
    "replica": "3f2a9c41d07e",
    "node": "worker-1",
    "startedAt": "2026-11-24T09:30:00.412000Z",
    "endedAt": "2026-11-24T09:30:07.930000Z",
    "result": "I created hello.txt.",
    "usage": {"input_tokens": 2341, "output_tokens": 87},
    "costUsd": 0.0083,
    "metadata": {"ticket": "OPS-17"},
}
_SESSION = {
    "id": _SESSION_ID,
    "lastJobId": _JOB_ID,
    "client": "default",
    "workspace": ".",
    "createdAt": "2026-11-24T09:30:00.412000Z",
    "updatedAt": "2026-11-24T09:30:07.930000Z",
}
_STATUS = {
    "status": "idle",
    "replicas": {
        "total": 1,
        "idle": 1,
        "busy": 0,
        "list": [
            {
                "replica": "3f2a9c41d07e",
                "node": "worker-1",
                "status": "idle",
                "since": "2026-11-24T09:30:09.120000Z",
            }
        ],
    },
    "queue": {"depth": 0, "limit": 1000},
    "timestamp": "2026-11-24T09:30:12.000000Z",
    "demo": False,
}


def paths() -> Object:
    """Return the paths with their operations."""
    return {
        "/api/execute": {"post": _EXECUTE},
        "/api/jobs": {"get": _LIST_JOBS},
        "/api/jobs/{job_id}": {"parameters": [_JOB_PARAMETER], "get": _SHOW_JOB},
        "/api/jobs/{job_id}/events": {"parameters": [_JOB_PARAMETER], "get": _JOB_EVENTS},
        "/api/jobs/{job_id}/cancel": {"parameters": [_JOB_PARAMETER], "post": _CANCEL_JOB},
        "/api/sessions": {"get": _LIST_SESSIONS},
        "/api/sessions/{session_id}": {
            "parameters": [_SESSION_PARAMETER],
            "get": _SHOW_SESSION,
            "delete": _DELETE_SESSION,
        },
        "/api/files": {"get": _LIST_WORKSPACE},
        "/api/files/{path}": {
            "parameters": [_PATH_PARAMETER],
            "get": _READ_FILE,
            "put": _UPLOAD_FILE,
            "delete": _DELETE_FILE,
        },
        "/status": {"get": _STATUS_OPERATION},
        "/health": {"get": _HEALTH},
        "/ready": {"get": _READY},
        "/metrics": {"get": _METRICS},
        "/openapi.json": {"get": _OPENAPI},
        "/docs": {"get": _DOCS},
    }


def _operation(
    tag: str,
    name: str,
    summary: str,
    description: str,
    answers: Object,
    *refusals: ErrorCode,
    parameters: list[Object] | None = None,
    body: Object | None = None,
    is_open: bool = False,
    needs_broker: bool = True,
) -> Object:
    """Put an operation together; what every operation may answer is added."""
    codes = {*refusals, ErrorCode.INTERNAL}
    if needs_broker:
        codes.add(ErrorCode.UNAVAILABLE)
    if not is_open:
        codes.add(ErrorCode.UNAUTHORIZED)
    refused = {str(HTTP_STATUS[code]): {"$ref": f"#/components/responses/{code}"} for code in codes}
    operation: Object = {
        "tags": [tag],
        "operationId": name,
        "summary": summary,
        "description": description,
    }
    if is_open:
        operation["security"] = []
    if parameters:
        operation["parameters"] = parameters
    if body:
        operation["requestBody"] = body
    return operation | {"responses": dict(sorted((answers | refused).items()))}


def _json(description: str, model: str, example: object, **more: object) -> Object:
    """Return an answer in JSON."""
    schema = {"$ref": f"#/components/schemas/{model}"}
    return {
        "description": description,
        **more,
        "content": {"application/json": {"schema": schema, "example": example}},
    }


def _events(description: str, **more: object) -> Object:
    """Return an answer that is an event stream; the schema is that of each event."""
    schema = {"$ref": "#/components/schemas/ServerSentEvent"}
    return {
        "description": description,
        **more,
        "content": {"text/event-stream": {"schema": schema}},
    }


def _text(description: str, *media_types: str) -> Object:
    content = {media_type: {"schema": {"type": "string"}} for media_type in media_types}
    return {"description": description, "content": content}


def _parameter(
    place: Literal["path", "query", "header"], name: str, description: str, schema: Object
) -> Object:
    return {
        "name": name,
        "in": place,
        "description": description,
        "schema": schema,
        **({"required": True} if place == "path" else {}),
    }


def _header(description: str, schema: Object, *, required: bool = True) -> Object:
    return {"description": description, "required": required, "schema": schema}


def _for_job(expression: str) -> Object:
    """Return the links from an answer to what can be done with its job."""
    return {
        name: {"operationId": name, "parameters": {"job_id": expression}}
        for name in ("showJob", "jobEvents", "cancelJob")
    }


_JOB_PARAMETER = _parameter(
    "path",
    "job_id",
    "The job's id: the header `X-Job-Id`, or `id` of its record.",
    {"type": "string", "format": "uuid", "examples": [_JOB_ID]},
)
_SESSION_PARAMETER = _parameter(
    "path",
    "session_id",
    "The session's id: `sessionId` of an event or a job.",
    {"type": "string", "format": "uuid", "examples": [_SESSION_ID]},
)
_LIMIT_PARAMETER = _parameter(
    "query",
    "limit",
    "How many entries the page holds at most.",
    {"type": "integer", "minimum": 1, "maximum": paging.MAX_LIMIT, "default": paging.DEFAULT_LIMIT},
)
_AFTER = {"type": "integer", "minimum": 0, "maximum": 10**18 - 1}
_JOB_HEADERS = {
    "X-Job-Id": _header("The job's id.", {"type": "string", "format": "uuid"}),
    "Location": _header("The job's record.", {"type": "string", "format": "uri-reference"}),
}

_EXECUTE = _operation(
    "jobs",
    "execute",
    "Run a job",
    "Accepts a job and streams its events, from `queued` to `completed` or `error`. Once this "
    "has answered, the job is safe: it survives the loss of the connection, of any replica and "
    "of any gateway.\n\n"
    "With `Prefer: respond-async` the answer is the job's record instead of its events.\n\n"
    "A session that another job uses gives 409, and so does an `Idempotency-Key` that was used "
    "for another request.",
    {
        "200": _events(
            "The job's events.",
            headers=_JOB_HEADERS,
            links=_for_job("$response.header.X-Job-Id"),
        ),
        "202": _json(
            "The job was accepted (`Prefer: respond-async`).",
            "JobRecord",
            {
                name: _RECORD[name]
                for name in ("id", "prompt", "workspace", "client", "createdAt", "metadata")
            }
            | {"status": "queued", "attempt": 0},
            headers=_JOB_HEADERS
            | {
                "Preference-Applied": _header(
                    "The preference that was followed.", {"const": "respond-async"}
                )
            },
            links=_for_job("$response.body#/id"),
        ),
    },
    ErrorCode.INVALID_REQUEST,
    ErrorCode.CONFLICT,
    ErrorCode.TOO_LARGE,
    ErrorCode.QUEUE_FULL,
    parameters=[
        _parameter(
            "header",
            "Prefer",
            "`respond-async`: answer at once with the job's record (RFC 7240). Other preferences "
            "are passed over.",
            {"type": "string", "examples": ["respond-async"]},
        ),
        _parameter(
            "header",
            "Idempotency-Key",
            "Names this submission: the same key with the same body gives the same job, for a "
            "day, however often it is sent.",
            {"type": "string", "maxLength": 255, "pattern": "^[!-~]([ -~]*[!-~])?$"},
        ),
    ],
    body={
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/JobRequest"},
                "examples": {
                    "short": {"value": {"prompt": "create a file called hello.txt"}},
                    "full": {
                        "value": {
                            "prompt": "Fix the failing test and say what was wrong.",
                            "workspace": "shop",
                            "model": "opus",
                            "permissionMode": "acceptEdits",
                            "allowedTools": ["Bash(pytest *)"],
                            "metadata": {"ticket": "OPS-17"},
                        }
                    },
                },
            }
        },
    },
)
_LIST_JOBS = _operation(
    "jobs",
    "listJobs",
    "List jobs",
    "Shows the job records, the newest first. A page may be shorter than `limit` and still have "
    "a `nextCursor`: only its absence means the end.",
    {
        "200": _json(
            "A page of jobs.",
            "JobPage",
            {"jobs": [_RECORD], "nextCursor": _JOB_ID},
        )
    },
    ErrorCode.INVALID_REQUEST,
    parameters=[
        _parameter(
            "query", "status", "Only jobs that stand here.", {"enum": [*map(str, JobStatus)]}
        ),
        _LIMIT_PARAMETER,
        _parameter(
            "query",
            "cursor",
            "The `nextCursor` of the page before.",
            {"type": "string", "pattern": _UUID7},
        ),
    ],
)
_SHOW_JOB = _operation(
    "jobs",
    "showJob",
    "Show a job",
    "Shows what is known about a job. It is kept as long as the deployment keeps events "
    "(a week, unless `EVENT_AGE_HOURS` says otherwise).",
    {"200": _json("The job's record.", "JobRecord", _RECORD)},
    ErrorCode.NOT_FOUND,
)
_JOB_EVENTS = _operation(
    "jobs",
    "jobEvents",
    "Follow a job's events",
    "Replays the events after the last one that you saw, then goes on live until the job's end. "
    "Without an id it starts at the beginning. Any number of clients may read. An id that the "
    "job has not reached gives 400: it belongs to another job.\n\n"
    "When the log no longer holds all that you ask for, a `gap` event says what is missing.",
    {
        "200": _events("The events."),
        "204": {"description": "The job has ended and you have seen its last event."},
    },
    ErrorCode.INVALID_REQUEST,
    ErrorCode.NOT_FOUND,
    parameters=[
        _parameter(
            "header",
            "Last-Event-ID",
            "The `id` of the last event that you saw, or empty for none. It wins over `after`.",
            {"anyOf": [_AFTER, {"type": "string", "maxLength": 0}]},
        ),
        _parameter(
            "query", "after", "The same, where one cannot set a header.", _AFTER | {"default": 0}
        ),
    ],
)
_CANCEL_JOB = _operation(
    "jobs",
    "cancelJob",
    "Cancel a job",
    "A job that waits ends at once; one that runs is interrupted. Its last event is an `error` "
    "with the code `cancelled`. A job that has already ended gives 409.",
    {"202": _json("It will end.", "JobRecord", _RECORD | {"status": "running"})},
    ErrorCode.NOT_FOUND,
    ErrorCode.CONFLICT,
)
_LIST_SESSIONS = _operation(
    "sessions",
    "listSessions",
    "List sessions",
    "Shows the sessions that a job can go on with, the last used first.",
    {
        "200": _json(
            "A page of sessions.",
            "SessionPage",
            {"sessions": [_SESSION], "nextCursor": _SESSION_ID},
        )
    },
    ErrorCode.INVALID_REQUEST,
    parameters=[
        _LIMIT_PARAMETER,
        _parameter(
            "query",
            "cursor",
            "The `nextCursor` of the page before.",
            {"type": "string", "format": "uuid"},
        ),
    ],
)
_SHOW_SESSION = _operation(
    "sessions",
    "showSession",
    "Show a session",
    "Shows what is known about a session.",
    {"200": _json("The session.", "Session", _SESSION)},
    ErrorCode.NOT_FOUND,
)
_DELETE_SESSION = _operation(
    "sessions",
    "deleteSession",
    "Delete a session",
    "Removes a session for good. One that a job uses gives 409.",
    {"204": {"description": "It is gone."}},
    ErrorCode.NOT_FOUND,
    ErrorCode.CONFLICT,
)
_FILE_REFUSALS = (
    *(ErrorCode.INVALID_REQUEST, ErrorCode.FORBIDDEN, ErrorCode.NOT_FOUND),
    ErrorCode.UNAVAILABLE,  # of the file server or the disk, not of the broker
)
_FLAG_ON = ["", "true", "1"]
_FLAG = {"enum": [*_FLAG_ON, "false", "0"]}
_PATH_PARAMETER = _parameter(
    "path",
    "path",
    "Where it lies below the workspace: the rest of the address, slashes included, "
    "percent-encoded once.",
    {
        "type": "string",
        "minLength": 1,
        "maxLength": files.MAX_PATH_BYTES,
        "examples": ["shop/README.md"],
    },
)
_LISTING_PARAMETERS = [
    _parameter(
        "query",
        "limit",
        "With `list`: how many entries the page holds at most.",
        {
            "type": "integer",
            "minimum": 1,
            "maximum": files.MAX_LIMIT,
            "default": files.DEFAULT_LIMIT,
        },
    ),
    _parameter(
        "query", "cursor", "With `list`: the `nextCursor` of the page before.", {"type": "string"}
    ),
]
_IF_MATCH = _parameter(
    "header", "If-Match", "Only if the file has one of these ETags.", {"type": "string"}
)
_IF_NONE_MATCH = _parameter(
    "header",
    "If-None-Match",
    "Only if the file has none of these ETags; `*`: only if there is no file.",
    {"type": "string"},
)
_IF_UNMODIFIED_SINCE = _parameter(
    "header", "If-Unmodified-Since", "Only if it has not changed since.", {"type": "string"}
)
_ETAG = _header("Names this content; for `If-Match`.", {"type": "string"})
_ENTRY = {
    "name": "README.md",
    "type": "file",
    "size": 1204,
    "modifiedAt": "2026-11-24T09:30:07.930000Z",
    "etag": '"1a2b3c"',
}
_LISTING = {"path": "shop", "entries": [_ENTRY]}
_DOWNLOAD_HEADERS = {
    "ETag": _ETAG,
    "Last-Modified": _header("When it last changed.", {"type": "string"}),
    "Accept-Ranges": _header("Parts can be asked for.", {"const": "bytes"}),
}
_ANY: Object = {"*/*": {"schema": {}}}
_LIST_WORKSPACE = _operation(
    "files",
    "listWorkspace",
    "List the workspace",
    "Lists the workspace itself; `list` must be there.",
    {"200": _json("A page of the directory.", "FileListing", _LISTING | {"path": "."})},
    *_FILE_REFUSALS,
    parameters=[
        _parameter("query", "list", "Say that a list is meant.", {"enum": _FLAG_ON})
        | {"required": True, "allowEmptyValue": True},
        *_LISTING_PARAMETERS,
    ],
    needs_broker=False,
)
_READ_FILE = _operation(
    "files",
    "readFile",
    "Download a file or list a directory",
    "Gives the bytes of a file, or of a part of it (`Range`). With `?list`, lists a directory.",
    {
        "200": {
            "description": "The file; with `list`, a page of the directory.",
            "headers": {
                name: header | {"required": False} for name, header in _DOWNLOAD_HEADERS.items()
            },
            "content": {
                "application/json": {
                    "schema": {
                        "anyOf": [
                            {"$ref": "#/components/schemas/FileListing"},
                            {"description": "Without `list`: a file that happens to be JSON."},
                        ]
                    },
                    "example": _LISTING,
                },
            }
            | _ANY,
        },
        "206": {
            "description": "A part of the file.",
            "headers": _DOWNLOAD_HEADERS
            | {"Content-Range": _header("Which part.", {"type": "string"})},
            "content": _ANY,
        },
        "304": {"description": "You have it already."},
    },
    *_FILE_REFUSALS,
    ErrorCode.PRECONDITION_FAILED,
    ErrorCode.RANGE_NOT_SATISFIABLE,
    parameters=[
        _parameter("query", "list", "List a directory.", _FLAG) | {"allowEmptyValue": True},
        *_LISTING_PARAMETERS,
        _parameter(
            "header",
            "Range",
            "One range of bytes; several, or one that cannot be read, give the whole file.",
            {"type": "string", "examples": ["bytes=0-1023"]},
        ),
        _parameter(
            "header", "If-Range", "`Range` counts only if this still holds.", {"type": "string"}
        ),
        _IF_MATCH,
        _IF_NONE_MATCH,
        _parameter(
            "header", "If-Modified-Since", "Only if it has changed since.", {"type": "string"}
        ),
        _IF_UNMODIFIED_SINCE,
    ],
    needs_broker=False,
)
_UPLOAD_FILE = _operation(
    "files",
    "uploadFile",
    "Upload a file",
    "Writes a file, with the directories above it. A reader sees the old content or the new, "
    "never a part. `If-None-Match: *` writes only a new file, `If-Match` only over the one that "
    "you know.",
    {
        "200": _json("It was replaced.", "FileEntry", _ENTRY, headers={"ETag": _ETAG}),
        "201": _json(
            "It was made.",
            "FileEntry",
            _ENTRY,
            headers={
                "ETag": _ETAG,
                "Location": _header("Where it is.", {"type": "string", "format": "uri-reference"}),
            },
        ),
    },
    *_FILE_REFUSALS,
    ErrorCode.CONFLICT,
    ErrorCode.PRECONDITION_FAILED,
    ErrorCode.TOO_LARGE,
    parameters=[_IF_MATCH, _IF_NONE_MATCH, _IF_UNMODIFIED_SINCE],
    body={
        "description": "The file's bytes, whatever they are; none make an empty file.",
        "content": {"application/octet-stream": {"schema": {}}},
    },
    needs_broker=False,
)
_DELETE_FILE = _operation(
    "files",
    "deleteFile",
    "Delete a file or a directory",
    "Deletes a file, an empty directory, or with `?recursive` a directory with all that is in "
    "it. Of a link, the link itself goes, never what it leads to.",
    {"204": {"description": "It is gone."}},
    *_FILE_REFUSALS,
    ErrorCode.CONFLICT,
    ErrorCode.PRECONDITION_FAILED,
    parameters=[
        _parameter("query", "recursive", "Delete what is in it, too.", _FLAG)
        | {"allowEmptyValue": True},
        *(_IF_MATCH, _IF_NONE_MATCH, _IF_UNMODIFIED_SINCE),
    ],
    needs_broker=False,
)
_STATUS_OPERATION = _operation(
    "pool",
    "status",
    "Show the pool",
    "Shows the replicas and the queue: `idle` while at least one replica is idle.",
    {"200": _json("The pool's state.", "PoolStatus", _STATUS)},
)
_HEALTH = _operation(
    "pool",
    "health",
    "Tell whether the gateway lives",
    "Says that this process lives, and that its workspace is the one that all nodes share. "
    "Needs no token.",
    {"200": _json("It lives.", "Health", {"status": "ok"})},
    ErrorCode.UNAVAILABLE,  # of the workspace, not of the broker
    is_open=True,
    needs_broker=False,
)
_READY = _operation(
    "pool",
    "ready",
    "Tell whether jobs can be taken",
    "Says whether the job broker is in reach and the workspace is the one that all nodes share. "
    "Needs no token.",
    {"200": _json("Jobs can be taken.", "Readiness", {"status": "ready"})},
    is_open=True,
)
_METRICS = _operation(
    "pool",
    "metrics",
    "Show the metrics",
    "For Prometheus. Answers whether or not the broker is in reach; what is not known is left "
    "out, and `claude_jobs_broker_connected` is 0 then.",
    {"200": _text("The metrics.", "text/plain", "application/openmetrics-text")},
    needs_broker=False,
)
_OPENAPI = _operation(
    "about",
    "openapi",
    "Show this description for programs",
    "OpenAPI 3.1.",
    {
        "200": {
            "description": "The document.",
            "content": {"application/json": {"schema": {"type": "object"}}},
        }
    },
    needs_broker=False,
)
_DOCS = _operation(
    "about",
    "docs",
    "Show this description for people",
    "One page that needs nothing else: `curl … /docs > api.html`.",
    {"200": _text("The page.", "text/html")},
    needs_broker=False,
)
