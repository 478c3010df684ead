"""Which VMs are kept: for a person, by agent, step or ticket; for steps that start in a fork of another step's VM."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from swarm.model import Claim, Failed, FailureReason, Interrupted, Outcome, Succeeded
from swarm.store.store import Store
from swarm.store.tickets.room import Room
from tests.store.databases import ECHO, LEASE, RETRY, Outside, insert
from tests.store.flows import claims, finish, names, run, state, statuses, ticket, well
from tests.store.runs.workflows import BROKEN, both_ways
from tests.store.test_hosts import ONE

KEYS = ("never", "failure", "always")


@pytest.mark.parametrize(
    ("of_step", "of_ticket", "of_agent", "kept"),
    [
        (None, None, None, "never"),
        (None, None, "failure", "failure"),
        (None, "never", "failure", "never"),
        ("always", "never", "failure", "always"),
        ("perhaps", "always", None, "always"),  # written by another program
    ],
)
async def test_whose_keep_vm_counts(
    store: Store, outside: Outside, of_step: str | None, of_ticket: str | None, of_agent: str | None, kept: str
) -> None:
    await store.put_agent(replace(RETRY, id="x", name="x", keep_vm=of_agent, keep_vm_seconds=60.0))
    own = f", keep_vm: {of_step}" if of_step in KEYS else ""
    await ticket(
        store, outside, f"steps: [{{id: a, agent: echo}}, {{id: b, agent: x, needs: a{own}}}]", keep_vm=of_ticket
    )
    [first] = await claims(store)
    await finish(store, first)
    if of_step not in (None, *KEYS):
        outside.execute("UPDATE step_executions SET keep_vm = ? WHERE step_id = 'b'", (of_step,))
    [claim] = await claims(store)
    assert (claim.keep_vm, claim.keep_vm_seconds) == (kept, 60.0)
    assert first.keep_vm_seconds == 86_400.0 and not claim.is_source and claim.source is None


async def test_a_plain_ticket_says_how_long(store: Store, outside: Outside) -> None:
    insert(outside, "t", keep_vm="failure", keep_vm_seconds=3600)
    [claim] = await claims(store)
    assert (claim.keep_vm, claim.keep_vm_seconds) == ("failure", 3600.0)


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"keep_vm": "forever"}, "keep_vm 'forever' is unknown; use 'never', 'failure', 'always', or NULL"),
        ({"keep_vm_seconds": 0}, "keep_vm_seconds is 0.0; it must be a number from 1 to 3.1536e+07, or NULL"),
    ],
)
async def test_a_wrong_row_fails(store: Store, outside: Outside, columns: dict[str, object], error: str) -> None:
    insert(outside, "t", **columns)
    assert await claims(store) == []
    assert await state(store) == ("failed", error)


async def test_a_wrong_type_fails(store: Store, outside: Outside) -> None:
    insert(outside, "t")
    if outside.refuses("UPDATE tickets SET keep_vm_seconds = 'a day'"):
        return
    assert await claims(store) == []
    error = "keep_vm_seconds is 'a day'; it must be a number from 1 to 3.1536e+07, or NULL"
    assert await state(store) == ("failed", error)


async def test_a_wrong_row_of_an_agent_says_so(store: Store, outside: Outside) -> None:
    for value, said in (("'often'", "keep_vm must be"), ("'never', keep_vm_seconds = 0", "keep_vm_seconds must be")):
        outside.execute(f"UPDATE agents SET keep_vm = {value} WHERE id = '{ECHO.id}'")
        insert(outside, said.replace(" ", "-"))
        assert await claims(store) == []
        assert said in str((await store.ticket(said.replace(" ", "-"))).error)


# --- forks ------------------------------------------------------------------------------------------------------------

RACE = """
steps:
  - {id: setup, agent: echo}
  - {id: try, agent: retry, from: setup, for_each: {items: [1, 2, 3], join: first_success}}
  - {id: ship, agent: echo, from: try}
"""


def leaves(snapshot: str) -> Outcome:
    return Succeeded(outputs="{}", snapshot_id=snapshot)


def snapshot(
    outside: Outside, id: str, *, kind: str = "step", ticket_id: str | None = None, memory_mb: int = 256
) -> None:
    row = {
        "id": id,
        "kind": kind,
        "host": "here",
        "ticket_id": ticket_id,
        "spec": json.dumps({"memory_mb": memory_mb, "disk_mb": 4000}),
    }
    outside.execute(
        "INSERT INTO snapshots (id, kind, host, ticket_id, spec) VALUES (:id, :kind, :host, :ticket_id, :spec)", row
    )


async def claims_on(store: Store, host: str, memory_mb: int | None = None) -> list[Claim]:
    room = Room(memory_mb=memory_mb)
    await store.decided()
    found = await store.claim("test", limit=9, lease_seconds=LEASE, host=host, room=room)
    while not found and await store.decided():
        found = await store.claim("test", limit=9, lease_seconds=LEASE, host=host, room=room)
    return found


@both_ways
async def test_steps_start_in_forks_on_the_host_that_has_the_snapshot(store: Store, outside: Outside) -> None:
    await ticket(store, outside, RACE)
    [setup] = await claims_on(store, "here")
    assert setup.is_source and setup.source is None
    snapshot(outside, "of-setup")
    await finish(store, setup, lambda _: leaves("of-setup"))
    assert await claims_on(store, "there") == []
    tries = await claims_on(store, "here")
    assert names(tries) == ["try[0]", "try[1]", "try[2]"] and {claim.source for claim in tries} == {"of-setup"}
    # A retry begins again from it, and so does the run of an engine after one that died.
    await finish(store, tries[0], lambda _: Failed(reason=FailureReason.AGENT_FAILED, message="broke"))
    await store.shift_clock(60_000)
    again = await claims_on(store, "here")
    assert {claim.source for claim in again} == {"of-setup"} and "try[1]" in names(again)
    winner = next(claim for claim in again if claim.step_id == "try[1]")
    snapshot(outside, "of-try")
    await finish(store, winner, lambda _: leaves("of-try"))
    [ship] = await claims_on(store, "here")
    assert (await statuses(store))["try[2]"] == "cancelled", "those that lose are killed at once"
    assert (ship.step_id, ship.source, ship.is_source) == ("ship", "of-try", False)
    await finish(store, ship)
    assert await claims(store) == []
    assert (await state(store))[0] == "done"


async def test_a_fork_that_the_disk_has_no_room_for_now_is_in_nobodys_way(store: Store, outside: Outside) -> None:
    """Nor its agent's other steps: it is as large as the VM that it starts from."""
    await ticket(store, outside, "steps: [{id: a, agent: echo}, {id: b, agent: echo, from: a}, {id: c, agent: echo}]")
    first = {claim.step_id: claim for claim in await claims_on(store, "here")}
    snapshot(outside, "of-a")  # of 4000 MB
    await finish(store, first["a"], lambda _: leaves("of-a"))
    await finish(store, first["c"], lambda _: Interrupted())
    await store.decided()

    async def claimed(most_mb: int) -> list[str]:
        room = Room(most_disk_mb=most_mb, whole_disk_mb=9000)
        return names(await store.claim("test", limit=9, lease_seconds=LEASE, host="here", room=room))

    assert (await claimed(3999), await claimed(3999), await claimed(4000)) == (["c"], [], ["b"])


async def test_a_fork_is_as_large_as_the_vm_it_is_one_of(store: Store, outside: Outside) -> None:
    await ticket(store, outside, "steps: [{id: a, agent: echo}, {id: b, agent: echo, from: a}]")
    [first] = await claims_on(store, "here")
    snapshot(outside, "big", memory_mb=900)
    await finish(store, first, lambda _: leaves("big"))
    assert await claims_on(store, "here", memory_mb=899) == []
    [claim] = await claims_on(store, "here", memory_mb=900)
    assert (claim.agent.memory_mb, claim.agent.disk_mb) == (900, 4000)


async def test_a_step_whose_host_is_gone_waits_for_some_time(store: Store, outside: Outside) -> None:
    await ticket(store, outside, "steps: [{id: a, agent: echo}, {id: b, agent: echo, from: a}]")
    [first] = await claims_on(store, "here")
    snapshot(outside, "of-a")
    await finish(store, first, lambda _: leaves("of-a"))
    for _ in range(2):  # its engine lives, and has much else to do
        await store.heartbeat("w", host="here", pid=1, info={})
        assert await claims_on(store, "there") == []
        assert not (await store.due()).ready, "nothing for this host"
        [next_] = await store.next_steps("t")
        assert next_.host is None
        await store.shift_clock(899_000)
    assert await claims_on(store, "there") == []
    [next_] = await store.next_steps("t")
    assert next_.waits_for_host == (
        "b waits for the host here, which has the VM that it starts from: no engine runs there."
    )
    await store.shift_clock(2_000)
    assert (await store.due()).ready
    assert await claims_on(store, "there") == []
    assert (await statuses(store))["b"] == "failed"
    what, said = (await state(store))[:2]
    assert what == "failed" and "is on the host 'here', of which no engine has given a sign of life for 900 s" in str(
        said
    )


async def test_what_waits_for_this_host_is_due_here(store: Store, outside: Outside) -> None:
    """By the name that it was registered with, whatever the operating system says."""
    await ticket(store, outside, "steps: [{id: a, agent: echo}, {id: b, agent: echo, from: a}]")
    [first] = await claims_on(store, "here")
    snapshot(outside, "of-a")
    await finish(store, first, lambda _: leaves("of-a"))
    await store.decided()
    assert not (await store.due()).ready
    assert (await store.register_host(replace(ONE, name="here"))).name == "here"
    assert (await store.due()).ready


@both_ways
async def test_snapshots_that_no_step_can_start_from_any_more_go_at_once(store: Store, outside: Outside) -> None:
    text = """
steps:
  - {id: try, agent: echo, for_each: [1, 5, 3], best: "${outputs.n}"}
  - {id: ship, agent: echo, from: try}
"""
    await ticket(store, outside, text)
    for number, claim in enumerate(await claims_on(store, "here")):
        snapshot(outside, f"of-{number}", ticket_id="t")
        outcome = Succeeded(outputs=f'{{"n": {(1, 5, 3)[number]}}}', snapshot_id=f"of-{number}")
        await store.finish(claim.attempt_id, outcome, timings={}, vm_time_ms=1.0)
        assert number == 2 or await store.expired_snapshots("here") == []
    [ship] = await claims_on(store, "here")
    assert ship.source == "of-1" and {one.id for one in await store.expired_snapshots("here")} == {"of-0", "of-2"}
    await finish(store, ship)
    assert await claims(store) == []
    assert {one.id for one in await store.expired_snapshots("here")} == {"of-0", "of-1", "of-2"}


@both_ways
async def test_the_best_of_those_that_were_in_time(store: Store, outside: Outside) -> None:
    text = """
steps:
  - {id: a, agent: echo}
  - {id: try, agent: echo, needs: a, for_each: {items: [1, 2, 3], best: "${outputs.n}", timeout_seconds: 60}}
  - {id: ship, agent: echo, needs: try, inputs: {n: "${steps.try.outputs.n}"}}
"""
    await ticket(store, outside, text, timeout_seconds=1000)
    await finish(store, (await claims(store))[0])
    tries = await claims(store)
    assert names(tries) == ["try[0]", "try[1]", "try[2]"]
    await store.shift_clock(20_000)
    for number in (0, 2):
        await finish(store, tries[number], lambda claim: Succeeded(outputs=f'{{"n": {int(claim.step_id[4])}}}'))
    assert await claims(store) == [], "there is time left"
    due = (await store.due()).next_ms
    assert due is not None and due <= 40_000
    await store.renew([tries[1].attempt_id], lease_seconds=100)
    await store.shift_clock(40_000)
    [ship] = await claims(store)
    assert (ship.step_id, ship.inputs) == ("ship", '{"n":2}')
    rows = {row.step_id: row for row in await store.steps("t")}
    assert (rows["try[1]"].status, rows["try[1]"].error) == ("cancelled", "the time of 'try' is over")
    await finish(store, ship)
    assert await claims(store) == []
    assert (await state(store))[0] == "done"


async def test_the_vm_of_an_attempt_goes_with_its_ticket(store: Store, outside: Outside) -> None:
    insert(outside, "t", state="draft")
    snapshot(outside, "kept", kind="attempt", ticket_id="t")
    assert await store.expired_snapshots("here") == []
    await store.remove_tickets(["t"], force=False, by="ann")
    assert [one.id for one in await store.expired_snapshots("here")] == ["kept"]


@pytest.mark.parametrize("left", ["", "gone"])
async def test_a_snapshot_that_is_gone_is_told_by_any_host(store: Store, outside: Outside, left: str) -> None:
    await ticket(store, outside, "steps: [{id: a, agent: echo}, {id: b, agent: echo, from: a}]")
    [first] = await claims_on(store, "here")
    await finish(store, first, lambda _: leaves(left))
    [claim] = await claims_on(store, "there")
    assert claim.source == ""


@both_ways
async def test_a_retry_makes_the_vm_again_that_it_starts_from(store: Store, outside: Outside) -> None:
    """The VMs that steps left are gone with their run."""
    text = """
steps:
  - {id: first, agent: echo}
  - {id: setup, agent: echo, needs: first}
  - {id: try, agent: echo, from: setup, for_each: [1, 2]}
  - {id: ship, agent: echo, needs: try}
"""
    await ticket(store, outside, text)

    def behave(claim: Claim) -> Outcome:
        bad = claim.step_id == "try[1]" and len(started) < 1
        return Failed(reason=FailureReason.AGENT_FAILED, message=str(BROKEN)) if bad else well(claim)

    started: list[str] = []
    started = await run(store, behave)
    assert (await state(store))[0] == "failed"
    await store.retry("t", step="try[1]")
    assert await run(store) == ["setup", "try[0]", "try[1]", "ship"]
    assert (await state(store))[0] == "done"
    await store.retry("t", step="ship")
    assert await run(store) == ["ship"], "which starts from none"
