"""The OpenAPI 3.1 document: `GET /openapi.json`.

Its schemas are made of the models that read requests and write answers, so that neither can
change alone; `operations` says what the routes do, and a test holds it to the application's.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel
from pydantic.alias_generators import to_camel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from claude_jobs import __version__
from claude_jobs.contract.error import HTTP_STATUS, ErrorBody, ErrorCode
from claude_jobs.contract.event import (
    Completed,
    Connected,
    Failed,
    Gap,
    LinePart,
    Message,
    Queued,
    Recovering,
)
from claude_jobs.contract.file import FileEntry, FileListing
from claude_jobs.contract.job import JobRecord, JobRequest
from claude_jobs.contract.session import Session
from claude_jobs.contract.status import PoolStatus
from claude_jobs.gateway import operations
from claude_jobs.gateway.docs import PAGE, page
from claude_jobs.gateway.jobs import JobPage
from claude_jobs.gateway.sessions import SessionPage
from claude_jobs.settings import GatewaySettings

# A JSON object of the document.
Object = dict[str, Any]

_EVENTS: tuple[type[BaseModel], ...] = (
    Queued,
    Connected,
    Message,
    Recovering,
    Completed,
    Failed,
    Gap,
)
_REQUESTS: tuple[type[BaseModel], ...] = (JobRequest,)
_ANSWERS: tuple[type[BaseModel], ...] = (
    JobRecord,
    JobPage,
    Session,
    SessionPage,
    FileEntry,
    FileListing,
    PoolStatus,
    *_EVENTS,
    LinePart,
    ErrorBody,
    *operations.ANSWERS,
)
_BEARER = "bearer"
_ENCODED: web.AppKey[bytes] = web.AppKey("openapi", bytes)
_RETRY_AFTER = "Seconds after which to try again."


def document(settings: GatewaySettings) -> Object:
    """Return the document of a gateway with these settings: its limits stand in it."""
    schemas = _schemas()
    _limit(schemas["JobRequest"], "timeoutSeconds", settings.job_timeout_seconds)
    _limit(schemas["JobRequest"], "maxTurns", settings.max_turns)
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "Claude Code jobs",
            "version": __version__,
            "summary": "A pool of ephemeral Claude Code agents behind one HTTP address.",
            "description": operations.INTRODUCTION,
        },
        # Relative: the address that the document was fetched from.
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in operations.TAGS.items()],
        "security": [{_BEARER: []}, *([{}] if settings.allow_anonymous else [])],
        "paths": operations.paths(),
        "components": {
            "schemas": schemas,
            "responses": {code: _refusal(code) for code in ErrorCode},
            "securitySchemes": {
                _BEARER: {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A token of the deployment (secret `api_tokens`).",
                }
            },
        },
    }


async def show_openapi(request: web.Request) -> web.Response:
    """Show the document."""
    return web.Response(body=request.app[_ENCODED], content_type="application/json")


def add_description(app: web.Application, settings: GatewaySettings) -> None:
    """Make the document and its page, once: they do not change while the gateway runs."""
    described = document(settings)
    app[_ENCODED] = json.dumps(described, ensure_ascii=False, indent=1).encode()
    app[PAGE] = page(described)


class _Schemas(GenerateJsonSchema):
    """JSON schemas that say what is really sent.

    Answers leave out what is not set, so their fields are never null, and those that are always
    set are required.
    """

    def field_title_should_be_set(self, schema: object) -> bool:
        return False  # it repeats the name

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        if self.mode == "serialization":
            return self.generate_inner(schema["schema"])
        return super().nullable_schema(schema)

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        if self.mode == "serialization" or schema.get("default") is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)

    def field_is_required(
        self,
        field: core_schema.ModelField | core_schema.DataclassField | core_schema.TypedDictField,
        total: bool,
    ) -> bool:
        inner = field["schema"]
        if self.mode == "serialization" and inner["type"] == "default":
            return inner.get("default") is not None or "default_factory" in inner
        return super().field_is_required(field, total)


def _schemas() -> Object:
    modes: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
        *((model, "validation") for model in _REQUESTS),
        *((model, "serialization") for model in _ANSWERS),
    ]
    _, made = models_json_schema(
        modes,
        by_alias=True,
        ref_template="#/components/schemas/{model}",
        schema_generator=_Schemas,
    )
    schemas: Object = made["$defs"]
    for name, fields in operations.FIELDS.items():
        for field, description in fields.items():
            schemas[name]["properties"][field]["description"] = description
    for field, constraint in operations.CONSTRAINTS.items():
        schemas["JobRequest"]["properties"][field] |= constraint
    schemas["JobRequest"]["anyOf"] = operations.PERMISSIONS
    for schema in schemas.values():
        _name_fields_as_sent(schema)
    names = {_type_of(schemas[model.__name__]): model.__name__ for model in _EVENTS}
    schemas["Event"] = {
        "description": "An event of a job; its `type` says which.",
        "oneOf": [_schema(name) for name in names.values()],
        "discriminator": {
            "propertyName": "type",
            "mapping": {kind: _schema(name)["$ref"] for kind, name in names.items()},
        },
    }
    schemas["ServerSentEvent"] = {
        "type": "object",
        "description": "One event of a stream, as its lines `id:`, `event:` and `data:` tell it.",
        "properties": {
            "id": {
                "type": "string",
                "pattern": "^[0-9]+$",
                "description": "Where the event stands in the log; send the last one that you "
                "saw as `Last-Event-ID`. A `queued` that tells a new position has none: it is "
                "in no log.",
            },
            "event": {"enum": list(names), "description": "The event's type."},
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": _schema("Event"),
            },
            "retry": {
                "type": "integer",
                "description": "Milliseconds to wait before attaching again.",
            },
        },
        "required": ["event", "data"],
    }
    return schemas


def _name_fields_as_sent(schema: Object) -> None:
    """Put a description's names of fields into the form that JSON has them in."""
    if "properties" in schema and "description" in schema:
        schema["description"] = re.sub(
            r"`(\w+)`",
            lambda found: (
                f"`{name}`" if (name := to_camel(found[1])) in schema["properties"] else found[0]
            ),
            schema["description"],
        )


def _type_of(schema: Mapping[str, Any]) -> str:
    return str(schema["properties"]["type"]["const"])


def _schema(name: str) -> Object:
    return {"$ref": f"#/components/schemas/{name}"}


def _limit(schema: Object, field: str, most: int) -> None:
    """Lower a whole number's maximum to what this deployment allows."""
    for choice in schema["properties"][field]["anyOf"]:
        if choice.get("type") == "integer":
            choice["maximum"] = min(most, choice["maximum"])


def _refusal(code: ErrorCode) -> Object:
    headers: Object = {}
    if code in {ErrorCode.QUEUE_FULL, ErrorCode.UNAVAILABLE}:
        headers["Retry-After"] = {
            "description": _RETRY_AFTER,
            "required": True,
            "schema": {"type": "integer", "minimum": 1},
        }
    if code is ErrorCode.UNAUTHORIZED:
        headers["WWW-Authenticate"] = {"required": True, "schema": {"type": "string"}}
    if code is ErrorCode.RANGE_NOT_SATISFIABLE:
        headers["Content-Range"] = {"required": True, "schema": {"type": "string"}}
    if code is ErrorCode.METHOD_NOT_ALLOWED:
        headers["Allow"] = {"required": True, "schema": {"type": "string"}}
    sentence = operations.REFUSALS[code]
    return {
        "description": f"`{code}` ({HTTP_STATUS[code]}): {sentence}",
        **({"headers": headers} if headers else {}),
        "content": {
            "application/json": {
                "schema": _schema("ErrorBody") | {"properties": {"code": {"const": code}}},
            }
        },
    }
