"""A lost lease is held against a step only on evidence: the guilty end after a bounded number of engines, whatever is
killed elsewhere; the innocent beside them don't."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.model import Claim, Interrupted, Succeeded
from swarm.store.claims import suspects
from swarm.store.store import Store
from tests.store.databases import RETRY, Outside, claim_one, claimed, failed, insert

EXPIRED_MS = 31_000
BACK_OFF_MS = 61_000  # the longest
COMPANY = [False] * suspects.SUSPECT_AFTER


async def lose(store: Store, worker: str) -> list[Claim]:
    """This worker claims all that it can, and dies; then another one sweeps, and the back-off passes."""
    claims = await claimed(store, worker, limit=9)
    await store.shift_clock(EXPIRED_MS)
    assert await claimed(store, "sweeper", ticket_id="nobody") == []
    await store.shift_clock(BACK_OFF_MS)
    return claims


async def test_what_kills_each_engine_alone_is_given_up(store: Store, outside: Outside) -> None:
    insert(outside, "t")
    alone: list[bool] = []
    while (await store.ticket("t")).state != "failed":
        (claim,) = await lose(store, f"w{len(alone)}")
        assert claim.attempt_number == len(alone) + 1
        alone.append(claim.alone)
    assert alone == COMPANY + [True] * suspects.ENOUGH
    ticket, (step,), (run,) = await store.ticket("t"), await store.steps("t"), await store.runs("t")
    assert (step.status, run.status, run.error_step, step.retry_count) == ("failed", "failed", "main", 0)
    assert "lease" in (ticket.error or "") and "the last 3 of them while they ran nothing else" in (ticket.error or "")
    attempts = await store.attempts("t")
    assert [a.reason for a in attempts] == [None] * len(COMPANY) + ["alone"] * suspects.ENOUGH


async def test_the_innocent_beside_it_are_not_convicted(store: Store, outside: Outside) -> None:
    """One ticket kills its engine, five share it. Each runs alone in the end, and only the guilty one is lost then."""
    ids = ["guilty", *"abcde"]
    for id_ in ids:
        insert(outside, id_)
    for number in range(50):
        claims = await claimed(store, f"w{number}", limit=9)
        if not claims:
            break
        if any(claim.ticket.id == "guilty" for claim in claims):
            await store.shift_clock(EXPIRED_MS)
        else:
            for claim in claims:
                await store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=1.0)
        await claimed(store, "sweeper", ticket_id="nobody")
        await store.shift_clock(BACK_OFF_MS)
    states = {id_: (await store.ticket(id_)).state for id_ in ids}
    assert states == {"guilty": "failed"} | dict.fromkeys("abcde", "done")
    deaths = len(await store.attempts("guilty"))
    assert deaths == suspects.SUSPECT_AFTER + suspects.ENOUGH
    assert {len(await store.attempts(id_)) for id_ in "abcde"} == {suspects.SUSPECT_AFTER + 1}


@pytest.mark.parametrize(("others", "takes"), [(0, 5), (1, 7), (2, 9), (3, 11), (4, 12), (12, 12)])
async def test_each_engine_that_dies_without_it_makes_it_take_more(
    store: Store, outside: Outside, others: int, takes: int
) -> None:
    insert(outside, "t")
    for number in range(takes):
        assert (await store.ticket("t")).state in ("ready", "in_progress"), number
        (claim,) = await claimed(store, f"w{number}")
        assert claim.ticket.id == "t"
        await store.shift_clock(1)  # ids of one millisecond are in no order
        if suspects.SUSPECT_AFTER <= number < suspects.SUSPECT_AFTER + others:
            insert(outside, f"other{number}")
            await claimed(store, f"x{number}", ticket_id=f"other{number}")
        await store.shift_clock(EXPIRED_MS)
        assert await claimed(store, "sweeper", ticket_id="nobody") == []
        outside.execute("UPDATE tickets SET state = 'cancelled' WHERE id <> 't'")
        await store.shift_clock(BACK_OFF_MS)
    ticket = await store.ticket("t")
    assert ticket.state == "failed" and f"{takes} engines in a row" in (ticket.error or "")


@pytest.mark.parametrize("clears", [True, False])
async def test_an_end_of_its_own_clears_it_and_a_soft_stop_does_not(
    store: Store, outside: Outside, clears: bool
) -> None:
    insert(outside, "t", agent_id=RETRY.id)
    for number in range(suspects.SUSPECT_AFTER + 1):
        (claim,) = await lose(store, f"w{number}")
    claim = await claim_one(store)
    assert claim.alone
    await store.finish(claim.attempt_id, failed() if clears else Interrupted(), timings={}, vm_time_ms=1.0)
    await store.shift_clock(BACK_OFF_MS)
    assert (await claim_one(store)).alone is not clears


async def test_lost_attempts_use_up_no_tries(store: Store, outside: Outside) -> None:
    """An agent with N tries may fail N - 1 times, however often engines died under it meanwhile."""
    insert(outside, "t", agent_id=RETRY.id)
    for _ in range(RETRY.retry.max_attempts):
        assert (await store.ticket("t")).state in ("ready", "in_progress")
        assert len(await lose(store, "w")) == 1
        claim = await claim_one(store)
        await store.finish(claim.attempt_id, failed(), timings={}, vm_time_ms=1.0)
        await store.shift_clock(BACK_OFF_MS)
    assert (await store.ticket("t")).state == "failed"
    (step,) = await store.steps("t")
    assert step.retry_count == RETRY.retry.max_attempts - 1


# --- waiting for an engine that runs nothing --------------------------------------------------------------------------


async def suspect(store: Store, outside: Outside) -> None:
    insert(outside, "suspect", created_at="2026-01-01T00:00:00.000Z")
    for number in range(suspects.SUSPECT_AFTER):
        assert [claim.ticket.id for claim in await lose(store, f"w{number}")] == ["suspect"]
    # Its back-off is over, and it was claimed and put back just now: it has not waited yet.
    claim = await claim_one(store)
    await store.finish(claim.attempt_id, Interrupted(), timings={}, vm_time_ms=1.0)
    for number, name in enumerate("abc", 1):  # of one millisecond, any may be the first
        insert(outside, name, created_at=f"2026-01-01T00:00:0{number}.000Z")


@pytest.mark.parametrize(
    ("idle", "drain", "waited", "gets"),
    [
        (True, True, False, ["suspect"]),
        (False, True, False, ["a", "b", "c"]),
        (False, True, True, []),
        (False, False, True, ["a", "b", "c"]),
    ],
)
async def test_it_waits_for_an_idle_engine_but_not_for_ever(
    store: Store, outside: Outside, idle: bool, drain: bool, waited: bool, gets: list[str]
) -> None:
    await suspect(store, outside)
    if waited:
        await store.shift_clock(31_000)
    claims = await claimed(store, limit=9, idle=idle, drain=drain)
    assert [claim.ticket.id for claim in claims] == gets
    assert [claim.alone for claim in claims] == [claim.ticket.id == "suspect" for claim in claims]
    if not idle and not waited:
        assert [claim.ticket.id for claim in await claimed(store, "other", limit=9)] == ["suspect"]


async def test_many_waiting_suspects_hide_nobody(store: Store, outside: Outside) -> None:
    for number in range(30):
        insert(outside, f"s{number}", created_at="2026-01-01T00:00:00.000Z")
    for number in range(suspects.SUSPECT_AFTER):
        assert len(await claimed(store, f"w{number}", limit=40)) == 30
        await store.shift_clock(EXPIRED_MS)
        await claimed(store, "sweeper", ticket_id="nobody")
        await store.shift_clock(1_500)  # the back-off after a second loss is 1 s
    insert(outside, "new")
    for _ in range(2):
        found = await claimed(store, limit=1, idle=False)
        assert [claim.ticket.id for claim in found] == ["new"]
        await store.finish(found[0].attempt_id, Interrupted(), timings={}, vm_time_ms=1.0)


@settings(max_examples=300, deadline=None)
@given(losses=st.integers(1, 100))
def test_back_off_is_bounded(losses: int) -> None:
    delay = suspects.delay_ms(losses)
    assert 0 <= delay <= 60_000 and (delay == 0) == (losses < suspects.SUSPECT_AFTER)


async def test_engines_that_die_at_once_are_no_proof(store: Store, outside: Outside) -> None:
    """As when the host loses power: one sweep sees all of their leases end."""
    insert(outside, "t")
    for number in range(suspects.SUSPECT_AFTER + suspects.ENOUGH):
        (claim,) = await claimed(store, f"w{number}")
        await store.shift_clock(1)
        if number == suspects.SUSPECT_AFTER + suspects.ENOUGH - 1:
            assert claim.alone
            insert(outside, "other")
            await claimed(store, "beside", ticket_id="other")
        await store.shift_clock(EXPIRED_MS)
        assert await claimed(store, "sweeper", ticket_id="nobody") == []
        await store.shift_clock(BACK_OFF_MS)
    assert (await store.ticket("t")).state == "in_progress"
