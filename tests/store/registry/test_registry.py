"""Agents and workflows as rows: a version never changes; an agent can be removed only when nothing needs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from swarm.errors import Conflict, NotFound, StoreError
from swarm.model import TicketState
from swarm.store.store import Store
from swarm.workflow.definition import Step, Workflow
from tests.store.databases import ECHO, Outside, insert

FLOW = Workflow(name="flow", version="1.0.0", steps=(Step(id="a", agent="echo@1"),), variables={"x": 1})
MINE = replace(ECHO, id="mine", name="mine", version="1.2.3", path=Path("/agents/mine-1.2.3-0123456789ab"))


async def test_other_files_under_a_known_version_are_refused(store: Store) -> None:
    await store.put_agent(MINE)
    await store.put_agent(MINE)
    with pytest.raises(Conflict, match="files differ"):
        await store.put_agent(replace(MINE, path=Path("/agents/mine-1.2.3-ba9876543210")))
    moved = replace(MINE, path=Path("/elsewhere/mine-1.2.3-0123456789ab"))
    assert (await store.put_agent(moved)) == moved == await store.agent("mine")
    await store.put_agent(replace(MINE, id="next", version="1.2.4", path=Path("/agents/mine-1.2.4-ba9876543210")))


async def test_a_pre_release_is_meant_only_by_its_name(store: Store) -> None:
    for version in ("1.0.0", "1.1.0-rc.1"):
        await store.put_agent(replace(ECHO, id=version, name="pre", version=version))
    assert [(await store.agent(ref)).version for ref in ("pre", "pre@1", "pre@1.1.0-rc.1")] == [
        "1.0.0", "1.0.0", "1.1.0-rc.1",
    ]  # fmt: skip


@pytest.mark.parametrize("state", list(TicketState))
async def test_an_agent_goes_when_its_tickets_have_ended(store: Store, outside: Outside, state: TicketState) -> None:
    await store.put_agent(MINE)
    insert(outside, "t", agent_id=MINE.id, state=state)
    if state in ("done", "failed", "cancelled"):
        assert await store.remove_agent("mine@1") == MINE
        with pytest.raises(NotFound):
            await store.remove_agent("mine")
    else:
        with pytest.raises(Conflict, match=r"\(t\)"):
            await store.remove_agent("mine@1")
        assert await store.agent("mine") == MINE


@pytest.mark.parametrize("type_", [None, "", "agent", "human"])
async def test_an_agent_that_a_ticket_is_assigned_to(store: Store, outside: Outside, type_: str | None) -> None:
    await store.put_agent(MINE)
    insert(outside, "t", agent_id=None, assignee_id=MINE.id, assignee_type=type_)
    if type_ == "human":
        assert await store.remove_agent("mine") == MINE
    else:
        with pytest.raises(Conflict, match=r"\(t\)"):
            await store.remove_agent("mine")


async def test_a_broken_row_hides_no_others(store: Store, outside: Outside) -> None:
    whole = await store.agents()
    outside.execute("INSERT INTO agents (id, name, version, path, entry) VALUES ('x', 'x', '1', '/x', '{')")
    with pytest.raises(StoreError, match="'x'"):
        await store.agents()
    assert await store.agents(broken=False) == whole


async def test_workflows(store: Store) -> None:
    row = await store.put_workflow(FLOW)
    assert row.enabled and row.parsed() == FLOW and await store.put_workflow(FLOW) == row
    with pytest.raises(Conflict, match="another definition"):
        await store.put_workflow(replace(FLOW, description="changed"))
    with pytest.raises(Conflict, match="under the id"):
        await store.put_workflow(replace(FLOW, id="another"))
    newer = await store.put_workflow(replace(FLOW, version="1.10.0"))
    assert [await store.workflow(ref) for ref in ("flow", "flow@1.0", row.id)] == [newer, row, row]
    assert [one.version for one in await store.workflows()] == ["1.0.0", "1.10.0"]
    off = await store.enable_workflow("flow@1.0.0", enabled=False, by="test")
    assert not off.enabled and not (await store.workflow(row.id)).enabled and (await store.workflow("flow")).enabled
    for ref in ("no", "flow@2", ""):
        with pytest.raises(NotFound):
            await store.workflow(ref)


@pytest.mark.parametrize(
    "steps", ["[]", "{", '{"format": 2}', '{"format": 1}', '{"format": 1, "steps": 3}', "[" * 9999]
)
async def test_a_bad_row_is_listed_and_says_what_is_wrong(store: Store, outside: Outside, steps: str) -> None:
    outside.execute("INSERT INTO workflows (id, name, version, steps) VALUES ('w', 'w', '1', :steps)", {"steps": steps})
    (row,) = await store.workflows()
    with pytest.raises(StoreError, match="'w'"):
        row.parsed()
