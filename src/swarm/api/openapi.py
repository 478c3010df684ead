"""The OpenAPI document of the API, made from its endpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, Literal

from pydantic import TypeAdapter

from swarm import __version__
from swarm.api.endpoint import EVENT_STREAM, JSON, Endpoint
from swarm.api.problem import MEDIA_TYPE
from swarm.base.plain import JSON_TEXTS

_REF: Final = "#/components/schemas/{model}"
_PROBLEM: Final = {
    "type": "object",
    "description": "RFC 9457. `detail` is a sentence that says what to do.",
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
    "required": ["type", "title", "status", "detail"],
}
_ALWAYS: Final = {
    400: "what was given makes no sense",
    401: "no valid token",
    403: "not this role's",
    429: "too many requests",
    503: "the database can't serve it now; try again",
}


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """OpenAPI 3.1."""
    schemas: dict[str, Any] = {"ProblemDetails": _PROBLEM}
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, path, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Swarm", "version": __version__, "license": {"name": "Apache-2.0"}},
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint, path: str, schemas: dict[str, Any]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", path)
    ]
    if endpoint.query is not None:
        query = _schema(endpoint.query, schemas, inline=True)
        for name, schema in query.get("properties", {}).items():
            parameters.append(
                {
                    "name": name,
                    "in": "query",
                    "required": name in query.get("required", ()),
                    "schema": schema,
                    **({"description": schema["description"]} if "description" in schema else {}),
                }
            )
    for name, why in {**endpoint.headers, **(_RANGE if endpoint.ranges else {})}.items():
        parameters.append(
            {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": why}
        )
    operation: dict[str, Any] = {
        "operationId": _name(endpoint),
        "summary": endpoint.summary,
        "description": f"For the role {endpoint.role} and above."
        + (" Not for tokens of one project." if endpoint.shared else ""),
        "tags": [path.removeprefix("/v1").split("/")[1]],
        "parameters": parameters,
        "responses": _responses(endpoint, schemas),
    }
    if endpoint.body is not None:
        operation["requestBody"] = {
            "required": any(one.is_required() for one in endpoint.body.model_fields.values()),
            "content": {JSON: {"schema": _schema(endpoint.body, schemas)}},
        }
    elif endpoint.upload:
        schema = {"type": "string", "contentMediaType": endpoint.upload[0]}
        operation["requestBody"] = {"required": True, "content": {kind: {"schema": schema} for kind in endpoint.upload}}
    return operation


def _responses(endpoint: Endpoint, schemas: dict[str, Any]) -> dict[str, Any]:
    good: dict[str, Any] = {"description": HTTPStatus(endpoint.status).phrase}
    if endpoint.media_type != JSON:
        stream = endpoint.media_type == EVENT_STREAM  # OpenAPI 3.1 has no words for its parts
        good["content"] = {endpoint.media_type: {} if stream else {"schema": {"type": "string"}}}
    elif endpoint.answer is not None:
        good["content"] = {JSON: {"schema": _schema(endpoint.answer, schemas, answer=True)}}
    status = endpoint.status if endpoint.answer is not None or endpoint.media_type != JSON else 204
    found = {str(status): good}
    if endpoint.ranges:
        found["206"] = {**good, "description": HTTPStatus.PARTIAL_CONTENT.phrase}
    also = {404: "no such thing", 409: "its state forbids this"} if "{" in endpoint.path else {}
    also |= _WITH_BODY if endpoint.body or endpoint.upload else {}
    also |= {416: "there is no such range"} if endpoint.ranges else {}
    also |= {502: "its VM does not answer as it should"} if endpoint.path.startswith("/v1/sandboxes/{id}/") else {}
    for code, why in sorted({**_ALWAYS, **also, **endpoint.errors}.items()):
        found[str(code)] = {
            "description": why,
            "content": {MEDIA_TYPE: {"schema": {"$ref": _REF.format(model="ProblemDetails")}}},
        }
    return found


_RANGE: Final = {"Range": "one range of bytes, such as bytes=0-1023"}
_WITH_BODY: Final = {
    408: "the body did not arrive in time",
    409: "its state forbids this",
    413: "the body is too large",
    415: "the body has another content type",
}


def _schema(kind: Any, schemas: dict[str, Any], *, inline: bool = False, answer: bool = False) -> dict[str, Any]:
    mode: Literal["serialization", "validation"] = "serialization" if answer else "validation"
    made = TypeAdapter(kind).json_schema(ref_template=_REF, mode=mode)
    for name, one in made.pop("$defs", {}).items():
        _keep(schemas, name, _as_sent(one, answer=answer))
    if inline or "title" not in made or made.get("type") != "object":
        return _as_sent(made, answer=answer)
    name = made["title"]
    _keep(schemas, name, _as_sent(made, answer=answer))
    return {"$ref": _REF.format(model=name)}


def _keep(schemas: dict[str, Any], name: str, schema: dict[str, Any]) -> None:
    if schemas.setdefault(name, schema) != schema:
        raise ValueError(f"two classes of the API are named {name}")


def _as_sent(schema: dict[str, Any], *, answer: bool) -> dict[str, Any]:
    """Columns that hold JSON as text are sent as that JSON. What is sent has no defaults."""
    for name, one in schema.get("properties", {}).items():
        if answer:
            one.pop("default", None)
        if name in JSON_TEXTS and one.get("type", "string") == "string" and "$ref" not in one:
            schema["properties"][name] = {"title": name, "description": "any JSON value"}
    return schema


def _name(endpoint: Endpoint) -> str:
    """'cancel_ticket' is the name of its function."""
    name: str = getattr(endpoint.handler, "__name__")  # noqa: B009
    return name.strip("_")


def described(document_: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Method and path of every operation."""
    return {(method.upper(), path) for path, operations in document_["paths"].items() for method in operations}
