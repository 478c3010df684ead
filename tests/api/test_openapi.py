"""The OpenAPI document: valid, committed, and within /v1 nothing that was there goes."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from swarm.api.app import ENDPOINTS
from swarm.api.openapi import described as operations
from tests.api import described
from tests.api.served import Served


def test_it_is_valid() -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(described.document())
    for schema in described.document()["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    names = [one["operationId"] for path in described.document()["paths"].values() for one in path.values()]
    assert len(names) == len(set(names)) == len(ENDPOINTS)  # a client that is generated has one function for each


def test_it_is_the_committed_one() -> None:
    assert described.PAGE.read_text(encoding="utf-8") == described.text(), "`make docs` writes docs/openapi.json"


async def test_the_server_gives_it(served: Served) -> None:
    given = (await served.viewer.get("/v1/openapi.json")).json()
    assert given == described.document()
    routes = {(one.method, one.path.replace(":path}", "}")) for one in ENDPOINTS}
    assert operations(given) == routes


def test_what_was_there_stays() -> None:
    """Compared with the last commit that changed it."""
    page = str(described.PAGE.relative_to(described.PAGE.parents[1]))
    root = described.PAGE.parents[1]
    for revision in ("HEAD", "HEAD^"):
        shown = subprocess.run(["git", "show", f"{revision}:{page}"], cwd=root, capture_output=True, check=False)
        if shown.returncode == 0 and (old := json.loads(shown.stdout)) != described.document():
            assert list(described.broken(old, described.document())) == []
            return
    pytest.skip("there is no other version in git's history")


def test_the_page_names_every_route() -> None:
    page = (described.PAGE.parent / "api.md").read_text(encoding="utf-8")
    placed = [(one.method, re.sub(r"{(\w+)(:path)?}", lambda found: found[1].upper(), one.path)) for one in ENDPOINTS]
    routes = {f"{method} {path}" for method, path in placed if path.startswith("/v1/")}
    assert [one for one in sorted(routes) if f"`{one}`" not in page] == []


def _at(*path: str) -> Callable[[Any], Any]:
    def find(document: Any) -> Any:
        for part in path:
            document = document[part]
        return document

    return find


_SCHEMAS = ("components", "schemas")
_LIST = ("paths", "/v1/tickets", "get", "parameters")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["paths"].pop("/v1/tickets/{id}/cancel"), "POST /v1/tickets/{id}/cancel is gone"),
        (lambda d: d["paths"]["/v1/tickets/{id}"].pop("delete"), "DELETE /v1/tickets/{id} is gone"),
        (lambda d: _at(*_LIST)(d).pop(0), "GET /v1/tickets: the parameter state is gone"),
        (lambda d: _at(*_LIST)(d)[0].update(required=True), "state is required now"),
        (lambda d: _at(*_LIST)(d)[-1].update(schema={"type": "string"}), "['integer'] is not taken"),
        (lambda d: _at(*_SCHEMAS, "TicketState", "enum")(d).remove("draft"), "['draft'] are gone"),
        (lambda d: _at(*_SCHEMAS, "Submission", "required")(d).append("agent"), "agent is required now"),
        (lambda d: _at(*_SCHEMAS, "Submission", "properties")(d).pop("agent"), "agent is gone"),
        (lambda d: _at(*_SCHEMAS, "Ticket", "properties")(d).pop("error"), "error is gone"),
        (lambda d: _at(*_SCHEMAS, "Ticket", "required")(d).remove("id"), "id may be missing now"),
        (lambda d: _at(*_SCHEMAS, "TicketSummary", "properties", "title")(d).update(type="null"), "['null'] now"),
        (lambda d: _at(*_SCHEMAS, "Count", "properties", "number")(d).update(type="string"), "['string'] now"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_breaks_a_client_is_found(change: Callable[[Any], object], said: str) -> None:
    old, new = described.document(), copy.deepcopy(described.document())
    change(new)
    assert any(said in one for one in described.broken(old, new)), list(described.broken(old, new))
    added = copy.deepcopy(old)
    added["paths"]["/v1/new"] = added["paths"]["/v1/tickets"]
    added["components"]["schemas"]["Submission"]["properties"]["new"] = {"type": "string"}
    assert list(described.broken(old, added)) == []


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (200, "application/json", {"tickets": []}),
        (200, "application/json", {"tickets": [{"id": 1}], "after": None}),
        (200, "text/html", ""),
        (418, "application/problem+json", {}),
        (400, "application/problem+json", {"detail": "x"}),
    ],
    ids=str,
)
async def test_an_answer_that_is_not_as_described_is_found(status: int, kind: str, body: Any) -> None:
    answer = httpx.Response(
        status,
        headers={"content-type": kind},
        content=json.dumps(body),
        request=httpx.Request("GET", "http://x/v1/tickets"),
    )
    with pytest.raises(AssertionError, match="GET /v1/tickets"):
        await described.check(answer)
