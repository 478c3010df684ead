"""Is an answer of the server as its OpenAPI document says? The clients of `served` hold every one against it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import httpx
from jsonschema import Draft202012Validator

from swarm.api import openapi
from swarm.api.app import ENDPOINTS

PAGE: Final = Path(__file__).parents[2] / "docs" / "openapi.json"


@cache
def document() -> Mapping[str, Any]:
    return openapi.document(ENDPOINTS)


def text() -> str:
    """As it is committed: `make docs` writes it."""
    return json.dumps(document(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


async def check(response: httpx.Response) -> None:
    """For `httpx.AsyncClient(event_hooks={"response": [check]})`."""
    path, method = response.request.url.path, response.request.method.lower()
    operation = _operation(method, path)
    if operation is None or response.status_code == 405:
        return
    said = f"{method.upper()} {path}: {response.status_code}"
    assert str(response.status_code) in operation["responses"], f"{said} is not described"
    content = operation["responses"][str(response.status_code)].get("content", {})
    kind = response.headers.get("content-type", "").partition(";")[0]
    assert kind in content or (not content and not kind), f"{said} {kind} is not described"
    if kind.endswith("json") and response.status_code != 206:
        problems = list(_validator(json.dumps(content[kind]["schema"])).iter_errors(json.loads(await response.aread())))
        assert not problems, f"{said}: {problems[0].json_path}: {problems[0].message[:500]}"


def _operation(method: str, path: str) -> Mapping[str, Any] | None:
    """The one whose address fits best: /v1/tickets/counts is no ticket."""
    fitting = [template for template in document()["paths"] if _pattern(template).fullmatch(path)]
    for template in sorted(fitting, key=lambda one: one.count("{")):
        if (found := document()["paths"][template].get(method)) is not None:
            return dict(found)
    return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = [re.escape(part) for part in re.split(r"\{\w+\}", template)]
    return re.compile("[^/]+".join(parts[:-1]) + ".+" if template.endswith("/files/{name}") else "[^/]+".join(parts))


@cache
def _validator(schema: str) -> Draft202012Validator:
    return Draft202012Validator({**json.loads(schema), "components": document()["components"]})


# --- within /v1, what was there stays ---------------------------------------------------------------------------------


def broken(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """What a client of the old document could miss in the new one."""
    for path, operations in old["paths"].items():
        for method, one in operations.items():
            name = f"{method.upper()} {path}"
            now = new["paths"].get(path, {}).get(method)
            if now is None:
                yield f"{name} is gone"
            else:
                yield from _broken_operation(name, one, now, old, new)


def _broken_operation(name: str, one: Any, now: Any, old: Any, new: Any) -> Iterator[str]:
    before, after = ({each["name"]: each for each in which["parameters"]} for which in (one, now))
    for parameter, given in after.items():
        if parameter not in before and given["required"]:
            yield f"{name}: the parameter {parameter} is new and required"
    for parameter, given in before.items():
        if parameter not in after:
            yield f"{name}: the parameter {parameter} is gone"
            continue
        if after[parameter]["required"] and not given["required"]:
            yield f"{name}: the parameter {parameter} is required now"
        yield from _narrower(f"{name} {parameter}", given["schema"], after[parameter]["schema"], old, new)
    if now.get("requestBody", {}).get("required") and not one.get("requestBody", {}).get("required"):
        yield f"{name}: a body is required now"
    for kind, content in one.get("requestBody", {}).get("content", {}).items():
        if kind not in now.get("requestBody", {}).get("content", {}):
            yield f"{name}: it takes no {kind} any more"
        else:
            yield from _narrower(name, content["schema"], now["requestBody"]["content"][kind]["schema"], old, new)
    for status, answer in one["responses"].items():
        if not status.startswith("2"):
            continue
        if status not in now["responses"]:
            yield f"{name}: it does not answer {status} any more"
            continue
        answered = now["responses"][status].get("content", {})
        for kind, content in answer.get("content", {}).items():
            if kind not in answered:
                yield f"{name}: it does not answer {kind} any more"
            else:
                yield from _poorer(name, content.get("schema", {}), answered[kind].get("schema", {}), old, new)


def _followed(schema: Any, document_: Any) -> Any:
    while "$ref" in schema:
        schema = document_["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def _types(schema: Any, document_: Any) -> set[str]:
    schema = _followed(schema, document_)
    if "anyOf" in schema:
        return set().union(*(_types(each, document_) for each in schema["anyOf"]))
    found = schema.get("type", ())
    return {found} if isinstance(found, str) else set(found)


def _narrower(at: str, before: Any, after: Any, old: Any, new: Any, depth: int = 0) -> Iterator[str]:
    """What a request could say, and can't any more."""
    before, after = _followed(before, old), _followed(after, new)
    if depth > 20:
        return
    if gone := set(before.get("enum", ())) - set(after.get("enum", before.get("enum", ()))):
        yield f"{at}: the values {sorted(map(str, gone))} are gone"
    if "enum" in after and "enum" not in before and "anyOf" not in before:
        yield f"{at}: only some values are taken now"
    if _types(after, new) and (gone := _types(before, old) - _types(after, new)):
        yield f"{at}: {sorted(gone)} is not taken any more"
    for name in set(after.get("required", ())) - set(before.get("required", ())):
        yield f"{at}.{name} is required now"
    for name, one in before.get("properties", {}).items():
        if name not in after.get("properties", {}):
            yield f"{at}.{name} is gone"
        else:
            yield from _narrower(f"{at}.{name}", one, after["properties"][name], old, new, depth + 1)
    if "items" in before and "items" in after:
        yield from _narrower(f"{at}[]", before["items"], after["items"], old, new, depth + 1)


def _poorer(at: str, before: Any, after: Any, old: Any, new: Any, depth: int = 0) -> Iterator[str]:
    """What an answer told, and does not tell any more."""
    before, after = _followed(before, old), _followed(after, new)
    if depth > 20:
        return
    if _types(before, old) and (more := _types(after, new) - _types(before, old)):
        yield f"{at}: it may be {sorted(more)} now"
    if "enum" in before and (more := set(after.get("enum", ())) - set(before["enum"])):
        yield f"{at}: it may be {sorted(map(str, more))} now"
    for name in set(before.get("required", ())) - set(after.get("required", ())):
        yield f"{at}.{name} may be missing now"
    for name, one in before.get("properties", {}).items():
        if name not in after.get("properties", {}):
            yield f"{at}.{name} is gone"
        else:
            yield from _poorer(f"{at}.{name}", one, after["properties"][name], old, new, depth + 1)
    if "items" in before and "items" in after:
        yield from _poorer(f"{at}[]", before["items"], after["items"], old, new, depth + 1)


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
