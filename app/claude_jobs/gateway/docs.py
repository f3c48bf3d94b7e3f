"""The OpenAPI document for people: `GET /docs`, one page that needs nothing else.

No script, nothing from elsewhere: it can be saved and read offline, and no token leaks from it.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

from aiohttp import web

Object = Mapping[str, Any]

_METHODS = ("get", "put", "post", "delete")
_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; --strong: #0b62c4; }
@media (prefers-color-scheme: dark) { :root { --strong: #7ab8ff; } }
body { font: 1rem/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
a { color: var(--strong); }
code, pre { font: .875em/1.45 ui-monospace, monospace; }
code { background: var(--soft); border-radius: .2rem; padding: .1em .3em; }
pre { background: var(--soft); border-radius: .3rem; overflow-x: auto; padding: .7rem; }
pre code { background: none; padding: 0; }
section { border-top: 1px solid var(--line); margin-top: 1.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem .35rem 0; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
td:first-child { overflow-wrap: normal; }
h3 code { overflow-wrap: anywhere; }
nav ul { columns: 17rem; list-style: none; padding: 0; }
.method { color: var(--strong); font-weight: 700; text-transform: uppercase; }
.note { opacity: .75; }
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
# Also in the page itself, for one that was saved.
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'"
)
_HEADERS = {
    "Content-Security-Policy": f"{_POLICY}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

PAGE: web.AppKey[str] = web.AppKey("docs", str)


async def show_docs(request: web.Request) -> web.Response:
    """Show the page."""
    return web.Response(text=request.app[PAGE], content_type="text/html", headers=_HEADERS)


def page(document: Object) -> str:
    """Return the HTML page of an OpenAPI document, as far as ours use OpenAPI."""
    info = document["info"]
    body = "".join(
        (
            f"<h1>{escape(info['title'])} <small class=note>{escape(info['version'])}</small></h1>",
            f"<p>{escape(info['summary'])}</p>",
            _navigation(document),
            _prose(info["description"]),
            *(_tag(document, tag) for tag in document["tags"]),
            "<section id=errors><h2>Errors</h2>",
            _table(
                ("Code", "What it says"),
                (
                    (f"<code>{escape(code)}</code>", _inline(answer["description"]))
                    for code, answer in document["components"]["responses"].items()
                ),
            ),
            "</section><section id=schemas><h2>Schemas</h2>",
            *(_schema(*named) for named in sorted(document["components"]["schemas"].items())),
            "</section>",
        )
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def _operations(document: Object) -> Iterator[tuple[str, str, Object]]:
    """Yield method, path and operation; the path's parameters are added to the operation's."""
    for path, item in document["paths"].items():
        for method in _METHODS:
            if operation := item.get(method):
                parameters = [*item.get("parameters", ()), *operation.get("parameters", ())]
                yield method, path, operation | {"parameters": parameters}


def _navigation(document: Object) -> str:
    entries = "".join(
        f'<li><a href="#{operation["operationId"]}">{escape(operation["summary"])}</a></li>'
        for _, _, operation in _operations(document)
    )
    return (
        f"<nav><ul>{entries}<li><a href='#errors'>Errors</a></li>"
        "<li><a href='#Event'>Events</a></li><li><a href='#schemas'>Schemas</a></li></ul></nav>"
    )


def _tag(document: Object, tag: Object) -> str:
    operations = (each for each in _operations(document) if tag["name"] in each[2]["tags"])
    return (
        f"<section><h2>{escape(tag['name'].capitalize())}</h2>{_prose(tag['description'])}"
        + "".join(_operation(document, *each) for each in operations)
        + "</section>"
    )


def _operation(document: Object, method: str, path: str, operation: Object) -> str:
    parts = [
        f'<h3 id="{operation["operationId"]}">{escape(operation["summary"])}<br>'
        f"<code><span class=method>{method}</span> {escape(path)}</code></h3>",
        _prose(operation["description"]),
        f"<pre><code>{escape(_curl(method, path, operation))}</code></pre>",
    ]
    if operation["parameters"]:
        parts.append(
            _table(
                ("Parameter", "In", "Type", "Meaning"),
                (
                    (
                        f"<code>{escape(parameter['name'])}</code>",
                        parameter["in"],
                        _type(parameter["schema"]),
                        _inline(parameter["description"]),
                    )
                    for parameter in operation["parameters"]
                ),
            )
        )
    if body := operation.get("requestBody"):
        parts.append(
            f"<p>Body: {_contents(body['content'])}. {_inline(body.get('description', ''))}</p>"
        )
    parts.append(_table(("Answer", "What it says"), _answers(document, operation["responses"])))
    return "".join(parts)


def _answers(document: Object, answers: Object) -> Iterator[tuple[str, str]]:
    for status, answer in answers.items():
        if reference := answer.get("$ref"):
            answer = document["components"]["responses"][_name(reference)]  # noqa: PLW2901
        said = [_inline(answer["description"])]
        if "$ref" not in answers[status] and "content" in answer:
            said.append(f"<br>{_contents(answer['content'])}")
        if headers := answer.get("headers"):
            names = ", ".join(f"<code>{escape(name)}</code>" for name in headers)
            said.append(f"<br><span class=note>Headers: {names}</span>")
        yield status, "".join(said)


def _contents(content: Object) -> str:
    return "; ".join(
        f"<code>{escape(media_type)}</code> {_type(shown['schema'])}".rstrip()
        for media_type, shown in content.items()
    )


def _curl(method: str, path: str, operation: Object) -> str:
    words = ["curl"]
    if operation.get("security") != []:
        words.append('-H "Authorization: Bearer $TOKEN"')
    contents = operation.get("requestBody", {}).get("content", {})
    if example := next(
        iter(contents.get("application/json", {}).get("examples", {}).values()), None
    ):
        words += ["-H 'Content-Type: application/json'", f"-d '{json.dumps(example['value'])}'"]
    if "application/octet-stream" in contents:
        words.append("-T README.md")
    elif method == "delete" or (method == "post" and not contents):
        words.append(f"-X {method.upper()}")
    if any(
        "text/event-stream" in each.get("content", ()) for each in operation["responses"].values()
    ):
        words.append("-N")
    for parameter in operation["parameters"]:
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", parameter["schema"]["examples"][0])
        elif parameter.get("required") and parameter["in"] == "query":
            path += f"?{parameter['name']}"
    return " ".join([*words, f'"$URL{path}"'])


def _schema(name: str, schema: Object) -> str:
    parts = [f'<h3 id="{name}">{escape(name)}</h3>', _prose(schema.get("description", ""))]
    if properties := schema.get("properties"):
        required = schema.get("required", ())
        parts.append(
            _table(
                ("Field", "Type", "Meaning"),
                (
                    (
                        f"<code>{escape(field)}</code>" + ("" if field in required else "?"),
                        _type(shown),
                        _inline(shown.get("description", "")),
                    )
                    for field, shown in properties.items()
                ),
            )
        )
    else:
        parts.append(f"<p>{_type(schema)}</p>")
    return "".join(parts)


def _type(schema: Object) -> str:
    """Return a schema in a few words, with links to the named ones."""
    if reference := schema.get("$ref"):
        return f'<a href="#{_name(reference)}">{escape(_name(reference))}</a>'
    for union in ("anyOf", "oneOf"):
        if choices := schema.get(union):
            shown = (_type(each) for each in choices if each.get("type") != "null")
            return " or ".join(each for each in shown if each)
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f"<code>{escape(str(each) or '(empty)')}</code>" for each in values)
    if schema.get("type") == "array":
        return f"list of {_type(schema['items']) or 'anything'}"
    if "contentSchema" in schema:
        return f"{_type(schema['contentSchema'])} as JSON"
    return escape(
        " ".join((schema.get("format", schema.get("type", "")), *_bounds(schema)))
    ).strip()


def _bounds(schema: Object) -> Iterator[str]:
    match schema:
        case {"minimum": least, "maximum": most}:
            yield f"{least}–{most}"  # noqa: RUF001 - a range
        case {"minimum": least}:
            yield f"≥ {least}"
    if "maxLength" in schema:
        yield f"≤ {schema['maxLength']} characters"
    if "default" in schema:
        yield f"(default {schema['default']})"


def _prose(text: str) -> str:
    """Return text as HTML: paragraphs, and lines between ``` as they are."""
    parts = re.split(r"^```\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        f"<pre><code>{escape(part)}</code></pre>"
        if position % 2
        else "".join(f"<p>{_inline(each)}</p>" for each in part.split("\n\n") if each.strip())
        for position, part in enumerate(parts)
    )


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headings = "".join(f"<th>{each}</th>" for each in head)
    lines = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return (
        f"<div class=wide><table><tr>{headings}</tr>"
        + "".join(f"<tr>{line}</tr>" for line in lines)
        + "</table></div>"
    )


def _name(reference: str) -> str:
    return reference.rpartition("/")[2]
