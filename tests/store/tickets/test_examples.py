"""The INSERTs of docs/tickets.md run as they are written, and do what the page says."""

from __future__ import annotations

import re
from pathlib import Path

from swarm.model import Claim
from swarm.store.store import Store
from tests.store import flows
from tests.store.databases import Outside

PAGE = (Path(__file__).parents[3] / "docs" / "tickets.md").read_text(encoding="utf-8")


async def test_the_examples_of_the_page(store: Store, outside: Outside) -> None:
    await flows.register(store, "steps: [{id: only, agent: echo@1}]", name="echo-chain")
    examples = re.findall(r"^```sql\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(examples) == 4
    for example in examples:
        outside.script(example)
    claims = dict[str, Claim]()
    while found := await flows.claims(store, 9):
        claims |= {claim.ticket.title: claim for claim in found}
    assert claims.keys() == {"Say hello", "Chain", "Now", "Build"}
    assert (await store.ticket("publish")).state == "blocked"
    await flows.finish(store, claims["Build"])
    (publish,) = await flows.claims(store, 9)
    for claim in (publish, *(claim for title, claim in claims.items() if title != "Build")):
        await flows.finish(store, claim)
    assert {ticket.state for ticket in await store.tickets()} == {"done"}
    some = await store.claim_sandboxes("w", "host", lease_seconds=30.0, limit=9)
    assert [one.agent.name if one.agent else None for one in some] == ["echo", None]
    assert (await store.sandbox("box")).state == "ended"


async def test_a_dependency_that_fails(store: Store, outside: Outside) -> None:
    outside.script(re.findall(r"^BEGIN;.*?^COMMIT;", PAGE, re.MULTILINE | re.DOTALL)[0])
    (build,) = await flows.claims(store, 9)
    await flows.finish(store, build, flows.gives(main=ValueError("broken")))
    publish = await store.ticket("publish")
    assert (publish.state, publish.error) == ("failed", "it depends on the ticket 'build', which failed")
