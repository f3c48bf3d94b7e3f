"""The API's description says what the application does: all of it, nothing else, and validly."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest
from aiohttp.test_utils import TestClient, TestServer
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from prometheus_client import generate_latest

from claude_jobs.contract.error import HTTP_STATUS, ErrorCode
from claude_jobs.contract.event import Event, FailureCode, Gap
from claude_jobs.gateway.app import create_app
from claude_jobs.gateway.docs import page
from claude_jobs.gateway.metrics import METRICS
from claude_jobs.gateway.openapi import document
from claude_jobs.settings import GatewaySettings

SETTINGS = GatewaySettings(
    broker_gateway_password="password-of-the-gateway",
    allow_anonymous=True,
    job_timeout_seconds=120,
)
METHODS = {"get", "put", "post", "delete", "patch", "head", "options", "trace"}


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    return document(SETTINGS)


def operations(described: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in described["paths"].items():
        for method in METHODS & item.keys():
            yield method, path, item[method]


def validator(described: dict[str, Any], schema: dict[str, Any]) -> Any:
    whole = {"$ref": "#/check", "check": schema, "components": described["components"]}
    return OAS31Validator(whole)


def test_it_is_valid_openapi(described: dict[str, Any]) -> None:
    assert [error.message for error in OpenAPIV31SpecValidator(described).iter_errors()] == []


def test_routes_and_operations_are_the_same(described: dict[str, Any]) -> None:
    routes = {
        (route.method.lower(), route.resource.canonical)
        for route in create_app(SETTINGS).router.routes()
        # A GET answers HEAD as well, as HTTP has it.
        if route.resource and route.method != "HEAD"
    }
    # The workspace itself is one thing, however its address is written.
    routes.discard(("get", "/api/files/"))
    assert routes == {(method, path) for method, path, _ in operations(described)}


def test_only_health_and_readiness_need_no_token(described: dict[str, Any]) -> None:
    is_open = {path for _, path, each in operations(described) if each.get("security") == []}
    assert is_open == {"/health", "/ready"}
    for _, path, operation in operations(described):
        assert ("401" in operation["responses"]) is (path not in is_open), path


def test_a_token_is_optional_only_where_anybody_may_come_in() -> None:
    closed = SETTINGS.model_copy(update={"allow_anonymous": False})
    assert document(SETTINGS)["security"] == [{"bearer": []}, {}]
    assert document(closed)["security"] == [{"bearer": []}]


def test_names_of_operations_are_unique_and_links_lead_to_them(described: dict[str, Any]) -> None:
    names = [operation["operationId"] for *_, operation in operations(described)]
    assert len(names) == len(set(names))
    for *_, operation in operations(described):
        for answer in operation["responses"].values():
            assert {each["operationId"] for each in answer.get("links", {}).values()} <= {*names}


def test_every_error_code_and_every_event_is_described(described: dict[str, Any]) -> None:
    assert described["components"]["responses"].keys() == {*map(str, ErrorCode)}
    kinds = {model.model_fields["type"].default for model in (*get_args(Event), Gap)}
    schemas = described["components"]["schemas"]
    assert schemas["Event"]["discriminator"]["mapping"].keys() == kinds
    assert {*schemas["ServerSentEvent"]["properties"]["event"]["enum"]} == kinds


@pytest.mark.parametrize("name", ["JobRequest", "JobRecord"])
def test_every_field_says_what_it_means(described: dict[str, Any], name: str) -> None:
    for field, schema in described["components"]["schemas"][name]["properties"].items():
        assert schema.get("description"), field


def test_fields_are_named_as_they_are_sent(described: dict[str, Any]) -> None:
    for name, schema in described["components"]["schemas"].items():
        for field in re.findall(r"`(\w+)`", schema.get("description", "")):
            assert "_" not in field, f"{name}: {field}"
        assert not [field for field in schema.get("properties", {}) if "_" in field], name


def test_the_limits_are_those_of_the_deployment(described: dict[str, Any]) -> None:
    request = described["components"]["schemas"]["JobRequest"]
    assert validator(described, request).is_valid({"prompt": "x", "timeoutSeconds": 120})
    assert not validator(described, request).is_valid({"prompt": "x", "timeoutSeconds": 121})


def test_every_example_fits_its_schema(described: dict[str, Any]) -> None:
    checked = 0
    for _, path, operation in operations(described):
        contents = [operation.get("requestBody", {}), *operation["responses"].values()]
        for shown in (each for body in contents for each in body.get("content", {}).values()):
            examples = [each["value"] for each in shown.get("examples", {}).values()]
            for example in [*examples, *([shown["example"]] if "example" in shown else [])]:
                errors = validator(described, shown["schema"]).iter_errors(example)
                assert [error.message for error in errors] == [], path
                checked += 1
    assert checked > 10


def test_the_guide_names_every_operation_event_code_and_metric(described: dict[str, Any]) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    for method, path, _ in operations(described):
        assert f"`{method.upper()} {path}`" in guide
    for kind in described["components"]["schemas"]["Event"]["discriminator"]["mapping"]:
        assert f"\n| `{kind}` |" in guide
    for code in ErrorCode:
        assert f"\n| {HTTP_STATUS[code]} | `{code}` |" in guide
    for failure in FailureCode:
        assert f"`{failure}`" in guide
    for field in described["components"]["schemas"]["JobRequest"]["properties"]:
        assert f"`{field}`" in guide
    shown = generate_latest(create_app(SETTINGS)[METRICS].registry).decode()
    metrics = set(re.findall(r"^# TYPE (claude_jobs_\w+)", shown, re.MULTILINE))
    # These are shown once a broker has answered.
    metrics |= {f"claude_jobs_{name}" for name in ("queue_depth", "unfinished", "replicas")}
    assert metrics == set(re.findall(r"^\| `(claude_jobs_\w+)` ", guide, re.MULTILINE))


class _Page(HTMLParser):
    """The elements, targets and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(str(value))
            if name in {"href", "src"}:
                self.links.append(str(value))


def test_the_page_needs_nothing_else_and_runs_nothing(described: dict[str, Any]) -> None:
    shown = _Page(page(described))
    assert not shown.tags & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert not {name for name in shown.attributes if name.startswith("on") or name == "style"}
    assert "url(" not in page(described)
    assert all(link.startswith("#") for link in shown.links)


def test_the_page_shows_every_operation_and_schema_and_its_links_lead_there(
    described: dict[str, Any],
) -> None:
    shown = _Page(page(described))
    names = {operation["operationId"] for *_, operation in operations(described)}
    assert names | described["components"]["schemas"].keys() <= {*shown.ids}
    assert len(shown.ids) == len(set(shown.ids))
    assert {link.removeprefix("#") for link in shown.links} <= {*shown.ids}


def test_what_the_document_says_cannot_become_markup(described: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>"
    info = described["info"] | {
        "title": evil,
        "summary": evil,
        "description": f"`{evil}`\n\n{evil}",
    }
    assert "<script" not in page(described | {"info": info})


async def test_both_are_served_while_the_broker_is_away(described: dict[str, Any]) -> None:
    away = SETTINGS.model_copy(update={"broker_url": "nats://127.0.0.1:9"})
    async with TestClient(TestServer(create_app(away))) as client:
        async with client.get("/openapi.json") as response:
            assert (response.status, response.content_type) == (200, "application/json")
            assert await response.json() == described
        async with client.get("/docs") as response:
            assert (response.status, response.content_type) == (200, "text/html")
            policy = response.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; style-src 'sha256-")
            assert "unsafe" not in policy
            assert await response.text() == page(described)
