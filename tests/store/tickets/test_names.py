"""What people type: ids and their beginnings, names; and what they may have meant."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from swarm.errors import Conflict, NotFound
from swarm.store.registry.secrets import Sealed
from swarm.store.store import Store
from tests.store import flows
from tests.store.databases import ECHO, Outside, insert

A, B, C = "0199aaaa-0000-4000-8000-000000000001", "0199bbbb-0000-4000-8000-000000000002", "0199bbbb" + "0" * 24
IDS = ("report", "report-7", "test-10", A, B, C, "abc", "GROẞ-1", "100%_x", "x\U0010ffffy", "0199aaaa-mine")
FOUND = {
    "report": "report",
    "report-7": "report-7",
    "0199a": A,  # and not the one that somebody named
    "0199bbbb-": B,
    "0199bbbb0": C,
    C: C,
    "abc": "abc",
    "100%_x": "100%_x",
}
UNKNOWN = {
    "ab": "no ticket 'ab'",  # too short to be a beginning
    "010": "no ticket '010'",
    "test-1": "no ticket 'test-1'; did you mean 'test-10'?",  # `ticket rm test-1` must not mean it
    "0199aaaa-m": "no ticket",
    "0%_%": "no ticket '0%_%'",  # no pattern
    "groẞ": "no ticket",  # case counts
    "reprot-7": "no ticket 'reprot-7'; did you mean 'report-7'?",
    "nothing-like-it": "`swarm ticket list` shows the newest",
    "": "no ticket ''",
    "\udcff\udcff\udcff\udcff": "no ticket",
    "y" * 100_000: "no ticket",
}


@pytest.fixture
def filled(store: Store, outside: Outside) -> Store:
    for id in IDS:
        insert(outside, id)
    return store


@pytest.mark.parametrize("ref", FOUND)
async def test_a_ticket_by_the_beginning_of_its_id(filled: Store, ref: str) -> None:
    assert await filled.ticket_id(ref) == FOUND[ref]


@pytest.mark.parametrize("ref", UNKNOWN, ids=ascii)
async def test_a_ticket_that_there_is_not(filled: Store, ref: str) -> None:
    with pytest.raises(NotFound) as error:
        await filled.ticket_id(ref)
    assert UNKNOWN[ref] in str(error.value) and len(str(error.value)) < 200


async def test_several_tickets_begin_like_that(filled: Store, outside: Outside) -> None:
    with pytest.raises(Conflict, match=f"several tickets begin with '0199b': {B}, {C}; write more of it"):
        await filled.ticket_id("0199b")
    many = [f"feed{number:028x}" for number in range(9)]
    for id in many:
        insert(outside, id)
    with pytest.raises(Conflict, match=f"{', '.join(many[:5])}, …; write more"):
        await filled.ticket_id("feed")


async def test_agents_and_workflows_by_the_beginning_of_an_id(store: Store) -> None:
    await store.put_agent(replace(ECHO, id=f"f00dcafe{A[8:]}", name="other"))
    await store.put_agent(replace(ECHO, id=f"f00dbeef{A[8:]}", name="another"))
    flow = await flows.register(store, "steps: [{id: only, agent: echo@1}]")
    assert (await store.agent("f00dc")).name == "other"
    assert (await store.workflow(flow[:8])).name == "flow"
    with pytest.raises(Conflict, match=r"several agents begin with 'f00d': f00dbeef-.*, f00dcafe-"):
        await store.agent("f00d")
    assert await store.names([ECHO.id, flow, "nobody", None]) == {ECHO.id: "echo@1.0.0", flow: "flow@1.0.0"}
    assert await store.names([]) == {}


MISSPELT: dict[str, tuple[Callable[[Store], Coroutine[Any, Any, Any]], str]] = {
    "agent": (lambda store: store.agent("ehco"), "no agent 'ehco'; did you mean 'echo'?"),
    "version": (lambda store: store.agent("echo@7"), "no agent 'echo@7'; did you mean 'echo'?"),
    "agent, unlike any": (lambda store: store.agent("zzz"), "no agent 'zzz'; `swarm agent list` shows all"),
    "agent to remove": (lambda store: store.remove_agent("ech"), "did you mean 'echo'?"),
    "workflow": (lambda store: store.workflow("flwo"), "no workflow 'flwo'; did you mean 'flow'?"),
    "workflow to enable": (lambda store: store.enable_workflow("flows", enabled=True, by="a"), "did you mean 'flow'?"),
    "secret": (lambda store: store.remove_secret("TOKNE", "all"), "no secret 'TOKNE' for all; did you mean 'TOKEN'?"),
    "scope": (lambda store: store.remove_secret("TOKEN", "all"), "no secret 'TOKEN' for all; it is set for agent:echo"),
}


@pytest.mark.parametrize("what", MISSPELT)
async def test_what_was_meant(store: Store, what: str) -> None:
    await flows.register(store, "steps: [{id: only, agent: echo@1}]")
    await store.put_secret(Sealed(name="TOKEN", scope="agent:echo", sealed="x"))
    ask, sentence = MISSPELT[what]
    with pytest.raises(NotFound) as error:
        await ask(store)
    assert sentence in str(error.value)
