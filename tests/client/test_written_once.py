"""The files of the SDK: what they import, and that the two clients are one text."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from typing import assert_type

import pytest

import swarm
from swarm import client
from swarm.client import aio, aio_sandboxes, sync, sync_sandboxes
from tests.client.made import CLIENT, SOURCES, made


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_the_synchronous_client_is_made_from_the_other(file: Path) -> None:
    assert file.read_text(encoding="utf-8") == made(file), f"src/swarm/client/{file.name} is stale: run `make docs`"
    assert "async" not in file.read_text(encoding="utf-8").lower()


@pytest.mark.parametrize("path", [*sorted(CLIENT.glob("*.py")), CLIENT.parent / "__init__.py"], ids=lambda p: p.name)
def test_it_needs_httpx_alone(path: Path) -> None:
    modules = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules |= {one.name for one in node.names} if isinstance(node, ast.Import) else set()
        modules |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
    others = {name for name in modules if name.partition(".")[0] not in sys.stdlib_module_names}
    allowed = ("httpx", "swarm.client") if path.parent == CLIENT else ()
    assert not [name for name in others if not name.startswith(allowed)]
    assert swarm.__doc__


def test_both_clients_have_the_same_methods_with_the_same_types() -> None:
    of_sandboxes = [(sync_sandboxes, aio_sandboxes, name) for name in ("Sandbox", "Sandboxes")]
    others = [(sync, aio, name) for name in ("Swarm", "Ticket", "Tickets", "Workflows", "Approval", "Approvals")]
    for made_from, source, name in (*of_sandboxes, *others):
        one, other = getattr(made_from, name), getattr(source, f"Async{name}")
        ours = {method for method in vars(one) if not method.startswith("_")}
        assert ours == {method for method in vars(other) if not method.startswith("_")}
        for method in ours:
            if inspect.isfunction(vars(one)[method]):
                assert list(inspect.signature(vars(one)[method]).parameters) == list(
                    inspect.signature(vars(other)[method]).parameters
                )
    assert sorted(client.__all__) == client.__all__ and all(hasattr(client, name) for name in client.__all__)


async def _types(s: client.Swarm, a: client.AsyncSwarm) -> None:
    """For mypy, as `make check` runs it."""
    assert_type(s.tickets.submit("claude", prompt="x", priority=1).wait(timeout=3), client.Ticket)
    assert_type(await (await a.workflows.run("chain", n=1)).wait(), client.AsyncTicket)
    assert_type([line.text for line in s.tickets.get("t").output()], list[str])
    assert_type([one.question async for one in a.approvals.list()], list[str | None])
    s.tickets.submit("claude", priority="high")  # type: ignore[arg-type]
    s.tickets.submit("claude", prioritiy=1)  # type: ignore[call-arg]
    list(s.tickets.list(states="done"))  # type: ignore[call-arg]
