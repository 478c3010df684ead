"""The serving loop, in this process and on the `process` driver: what it starts, when, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable

import pytest
import structlog
import structlog.testing

from swarm.app import wiring
from swarm.base.clock import Timeline
from swarm.engine import dispatch
from swarm.engine.dispatch import Dispatcher
from swarm.engine.engine import Engine, Limits, Watcher
from swarm.engine.room import Memory
from swarm.engine.values import Values
from swarm.engine.worker import Ended, Worker
from swarm.errors import NoImage, StoreError
from swarm.model import Claim, Outcome, RetryPolicy, Succeeded
from tests.conftest import PATIENCE_SECONDS
from tests.engine.conftest import Bench, ended, proved, running, serving

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

OUT = "import json, os, sys, time\ndef out(v): json.dump(v, open('output.json', 'w'))\n"
DONE = OUT + "out({})"
UP = OUT + "print('up', flush=True)\n"
HANG = UP + "time.sleep(600)"


async def test_it_sees_an_outside_insert_by_itself(plain: Bench) -> None:
    agent = await plain.agent(DONE)
    async with serving(plain):
        plain.insert("t", agent.id)
        assert await ended(plain, "t") == ["done"]
    assert plain.live_vms() == []
    (step,) = await plain.store.steps("t")
    (attempt,) = await plain.attempts()
    assert step.vm_id is not None and step.vm_id == attempt.vm_id


async def test_never_more_than_max_vms(plain: Bench) -> None:
    agent = await plain.agent(DONE)
    for number in range(6):
        plain.insert(f"t{number}", agent.id)
    async with serving(plain, max_vms=2):
        await ended(plain, *(f"t{number}" for number in range(6)))
    moments = plain.sql(
        "SELECT (SELECT count(*) FROM attempts b WHERE b.started_at <= a.started_at AND b.ended_at > a.started_at) "
        "FROM attempts a"
    )
    assert max(int(str(count)) for (count,) in moments) == 2


async def test_priority_then_age(plain: Bench) -> None:
    agent = await plain.agent(DONE)
    for second, (id_, priority) in enumerate((("least", -1), ("old", 0), ("new", 0), ("urgent", 5))):
        plain.insert(id_, agent.id, priority=priority, created_at=f"2026-01-01T00:00:0{second}.000Z")
    async with serving(plain, max_vms=1):
        await ended(plain, "old", "new", "urgent", "least")
    started = plain.sql("SELECT id FROM tickets ORDER BY started_at")
    assert [id_ for (id_,) in started] == ["urgent", "old", "new", "least"]


async def test_a_stuck_vm_holds_only_its_own_slot(plain: Bench) -> None:
    hang, done = await plain.agent(HANG, "hang"), await plain.agent(DONE, "done")
    plain.insert("stuck", hang.id, priority=9)
    for number in range(3):
        plain.insert(f"t{number}", done.id)
    async with serving(plain, max_vms=2):
        assert await ended(plain, "t0", "t1", "t2") == ["done"] * 3
        assert (await plain.store.ticket("stuck")).state == "in_progress"
    assert plain.live_vms() == []


async def test_a_vm_is_not_started_when_it_would_not_fit(plain: Bench) -> None:
    free = 100
    memory = Memory(total_mb=10_000, reserve_mb=0, available_mb=lambda: free)
    agent = await plain.agent(DONE, memory_mb=256)
    plain.insert("t", agent.id)
    async with serving(plain, memory=memory) as dispatcher:

        async def said() -> bool:
            return "memory: 36 MB are left" in dispatcher.waits_for

        await plain.until(said)
        assert (await plain.store.ticket("t")).state == "ready"
        (row,) = await plain.store.workers()
        assert (row.info["memory_mb"], row.info["memory_free_mb"]) == (10_000, 100), "as pages show of the host"
        free = 1000
        assert await ended(plain, "t") == ["done"]


async def test_one_that_can_never_fit_fails_and_blocks_nobody(plain: Bench) -> None:
    memory = Memory(total_mb=1000, reserve_mb=0, available_mb=lambda: 10_000)
    huge = await plain.agent(DONE, "huge", memory_mb=2000)
    small = await plain.agent(DONE, "small", memory_mb=256)
    plain.insert("first", huge.id, priority=9)
    plain.insert("second", small.id)
    async with serving(plain, memory=memory):
        assert await ended(plain, "first", "second") == ["failed", "done"]
    error = (await plain.store.ticket("first")).error
    assert error and "needs 2000 MB" in error


async def test_memory_is_promised_once(plain: Bench) -> None:
    memory = Memory(total_mb=700, reserve_mb=0, available_mb=lambda: 10_000)
    code = OUT + "began = time.monotonic()\ntime.sleep(0.3)\nout({'began': began, 'ended': time.monotonic()})"
    agent = await plain.agent(code, memory_mb=256)
    for number in range(4):
        plain.insert(f"t{number}", agent.id)
    async with serving(plain, memory=memory):
        await ended(plain, "t0", "t1", "t2", "t3")
    # As the agents saw it. By the book they may overlap: an attempt's end is written when its VM is gone.
    ran = [json.loads((await plain.store.ticket(f"t{number}")).outputs or "") for number in range(4)]
    assert max(sum(b["began"] <= a["began"] < b["ended"] for b in ran) for a in ran) <= 2


async def test_a_dependant_starts_when_what_it_needs_is_done(plain: Bench) -> None:
    agent = await plain.agent(DONE)
    plain.sql("INSERT INTO ticket_dependencies VALUES ('second', 'first')")
    plain.insert("second", agent.id)
    plain.insert("first", agent.id)
    async with serving(plain):
        assert await ended(plain, "first", "second") == ["done", "done"]
    ((in_order,),) = plain.sql(
        "SELECT (SELECT completed_at FROM tickets WHERE id = 'first') <= started_at FROM tickets WHERE id = 'second'"
    )
    assert in_order


async def test_retries_with_back_off_and_counts_them(plain: Bench) -> None:
    code = OUT + "n = json.load(open('input.json'))['step']['attempt']\nout({'n': n})\nsys.exit(0 if n == 3 else 1)"
    agent = await plain.agent(code, retry=RetryPolicy(max_attempts=3, delay_seconds=0.1))
    plain.insert("t", agent.id)
    async with serving(plain):
        assert await ended(plain, "t") == ["done"]
    (step,) = await plain.store.steps("t")
    assert (step.retry_count, (await plain.store.ticket("t")).outputs) == (2, '{"n":3}')
    assert [a.outcome for a in await plain.attempts()] == ["failed", "failed", "succeeded"]


@pytest.mark.parametrize("how", ["command", "update", "delete"])
async def test_cancel_kills_the_vm_at_once(plain: Bench, how: str) -> None:
    agent = await plain.agent(HANG)
    plain.insert("t", agent.id)
    async with serving(plain):
        await plain.until_it_prints()
        began = time.monotonic()
        if how == "command":
            await plain.store.cancel("t", "a test")
        elif how == "update":
            plain.sql("UPDATE tickets SET state = 'cancelled' WHERE id = 't'")
        else:
            plain.sql("DELETE FROM tickets WHERE id = 't'")
        while plain.live_vms():
            async with plain.store.watching() as wake:
                await wake.changed(timeout_seconds=0.05)
        # 2 s on a quiet machine. Were it not told at once, it would be at the end of its lease: after 30 s.
        assert time.monotonic() - began < 20
        plain.insert("next", (await plain.agent(DONE, "done")).id)
        assert await ended(plain, "next") == ["done"]
    rows = plain.sql("SELECT count(*) FROM attempts WHERE outcome IS NULL")
    assert rows == [(0,)]
    if how == "delete":
        assert plain.sql("SELECT count(*) FROM step_executions WHERE run_id NOT IN (SELECT id FROM workflow_runs)") == [
            (0,)
        ]
    else:
        assert (await plain.store.ticket("t")).state == "cancelled"


@pytest.mark.parametrize("how", ["command", "update"])
@pytest.mark.parametrize("at", ["while it runs", "when it has just ended"])
async def test_a_cancelled_ticket_is_no_fault(plain: Bench, how: str, at: str) -> None:
    """No warning, no write that the fence refused, and the live view shows 'cancelled' instead of 'lost'."""

    def cancel() -> None:
        plain.sql("UPDATE tickets SET state = 'cancelled' WHERE id = 't'")

    ends: list[Ended] = []
    agent = await plain.agent(HANG if at == "while it runs" else DONE)
    plain.insert("t", agent.id)
    with structlog.testing.capture_logs() as said:
        if at == "while it runs":
            async with running(plain, ended=ends.append):
                await plain.until_it_prints()
                await plain.store.cancel("t", "a test") if how == "command" else cancel()
                await plain.until(lambda: _empty(plain))
        else:
            (claim,) = await plain.worker.claim(limit=1)
            executor = CancelsAtItsEnd(plain, cancel if how == "update" else None)
            worker = Worker(store=plain.store, engine=executor, name=plain.worker.name, lease_seconds=30)
            ends.append(await worker.attempt(claim))
    assert [type(one.outcome).__name__ for one in ends] == ["Cancelled"]
    assert [entry for entry in said if entry["log_level"] not in ("debug", "info")] == []
    assert [event.kind for event in await plain.store.events("t") if event.kind == "refused"] == []
    assert (await proved(plain)).refused == 0


async def _empty(plain: Bench) -> bool:
    return not plain.worker.running


class CancelsAtItsEnd:
    """An agent that succeeds just after its ticket was cancelled, by the command or by ``cancel``."""

    def __init__(self, plain: Bench, cancel: Callable[[], None] | None) -> None:
        self._plain, self._cancel = plain, cancel

    async def execute(self, claim: Claim, watcher: Watcher, timeline: Timeline) -> Outcome:
        if self._cancel is not None:
            self._cancel()
        else:
            await self._plain.store.cancel("t", "a test")
        return Succeeded(outputs="{}")


async def test_a_cancelled_ticket_that_waits_never_starts(plain: Bench) -> None:
    agent = await plain.agent(DONE)
    plain.insert("t", agent.id)
    await plain.store.cancel("t", "a test")
    plain.insert("u", agent.id)
    async with serving(plain):
        await ended(plain, "u")
    assert await plain.attempts("t") == []
    await plain.store.retry("t")
    async with serving(plain):
        assert await ended(plain, "t") == ["done"]


async def test_a_ticket_that_waited_too_long_fails(plain: Bench) -> None:
    agent = await plain.agent(DONE)
    plain.insert("old", agent.id, created_at="2026-01-01T00:00:00Z", updated_at="2026-01-01T00:00:00Z")
    plain.insert("new", agent.id)
    own = plain.settings.model_copy(update={"queue_timeout_seconds": 600.0})
    async with wiring.dispatcher(own, plain.store, max_vms=1, grace_seconds=0) as dispatcher:
        task = asyncio.create_task(dispatcher.run())
        assert await ended(plain, "old", "new") == ["failed", "done"]
        dispatcher.stop()
        await task
    assert "queue timeout of 600 s" in ((await plain.store.ticket("old")).error or "")


async def test_a_soft_stop_lets_what_runs_end(plain: Bench) -> None:
    gate = plain.dir / "gate"
    os.mkfifo(gate)
    agent = await plain.agent(UP + f"open({str(gate)!r}).read(); out({{}})")
    plain.insert("t", agent.id)
    plain.insert("later", agent.id)
    async with serving(plain, max_vms=1, grace_seconds=60.0) as dispatcher:
        await plain.until_it_prints()
        dispatcher.stop()
        await asyncio.to_thread(gate.write_text, "go")
        assert await ended(plain, "t") == ["done"]
    assert (await plain.store.ticket("later")).state == "ready"  # no new claims


async def test_a_stop_without_grace_puts_back_uncounted(plain: Bench) -> None:
    agent = await plain.agent(HANG)
    plain.insert("t", agent.id)
    async with serving(plain, grace_seconds=60.0) as dispatcher:
        await plain.until_it_prints()
        dispatcher.stop()
        dispatcher.stop()
    assert plain.live_vms() == []
    (attempt,) = await plain.attempts()
    (step,) = await plain.store.steps("t")
    assert (attempt.outcome, step.status, step.retry_count) == ("interrupted", "ready", 0)
    assert await plain.store.workers() == []


async def test_a_clock_that_jumps_ahead_starts_nothing_twice(plain: Bench) -> None:
    marks = plain.dir / "marks"
    agent = await plain.agent(UP + f"open({str(marks)!r}, 'a').write('x')\ntime.sleep(2.5)\nout({{}})")
    plain.insert("t", agent.id)
    async with serving(plain):
        await plain.until_it_prints()
        await plain.store.shift_clock(3_600_000)  # a commit: the loop looks at once, and every lease is over
        assert await ended(plain, "t") == ["done"]
    assert len(await plain.attempts()) == 1
    assert marks.read_text() == "x"


async def test_a_clock_that_jumps_back_loses_nothing(plain: Bench) -> None:
    agent = await plain.agent(DONE)
    async with serving(plain):
        plain.insert("a", agent.id)
        await plain.store.shift_clock(-3_600_000)
        plain.insert("b", agent.id)
        assert await ended(plain, "a", "b") == ["done", "done"]


@pytest.mark.parametrize("how", ["mv", "cp"])
async def test_the_database_replaced_ends_it_with_one_clear_line(plain: Bench, how: str) -> None:
    agent = await plain.agent(HANG)
    plain.insert("t", agent.id)
    with pytest.raises(StoreError, match="was changed from outside"):
        async with running(plain) as (_, engine), asyncio.timeout(PATIENCE_SECONDS):
            await plain.until_it_prints()
            new = plain.dir / "new.db"
            sqlite3.connect(new, timeout=60).close()
            new.write_bytes(plain.database.read_bytes())
            if how == "mv":
                new.replace(plain.database)
            else:
                plain.database.write_bytes(new.read_bytes())
            await asyncio.wait({engine})
    assert plain.live_vms() == []


async def test_the_database_locked_by_another_writer(plain: Bench) -> None:
    """For longer than the busy timeout: outcomes wait, leases hold, and nothing is run twice."""
    own = plain.settings.model_copy(update={"busy_timeout_seconds": 0.3})
    agent = await plain.agent(DONE)
    async with wiring.store(own) as store, wiring.worker(own, store) as worker, store.watching() as wake:
        locked = sqlite3.connect(plain.database, isolation_level=None, timeout=60)
        dispatcher = Dispatcher(store=store, worker=worker, wake=wake, max_vms=2, memory=None, grace_seconds=0)
        task = asyncio.create_task(dispatcher.run())
        plain.insert("t", agent.id)
        await plain.until(lambda: _runs(plain, "t"))
        locked.execute("BEGIN IMMEDIATE")
        await wake.changed(timeout_seconds=2.0)  # no one can write meanwhile
        locked.execute("COMMIT")
        locked.close()
        assert await ended(plain, "t") == ["done"]
        dispatcher.stop()
        await task
    assert len(await plain.attempts()) == 1


async def _runs(bench: Bench, id_: str) -> bool:
    return (await bench.store.ticket(id_)).state == "in_progress"


async def test_the_image_deleted_while_it_runs(plain: Bench) -> None:
    agent = await plain.agent(DONE)
    own = plain.settings.model_copy(update={"images_dir": plain.dir / "none"})
    vms = wiring.launcher(own, await wiring.choice(own))
    async with wiring.store(own) as store, wiring.egress(own, store) as egress, store.watching() as wake:
        engine = Engine(
            launcher=vms,
            images=wiring.images(own),
            layers=wiring.layers(own),
            limits=Limits(),
            egress=egress,
            values=Values(),
            installed=None,
        )
        worker = Worker(store=store, engine=engine, name="here", lease_seconds=30)
        dispatcher = Dispatcher(store=store, worker=worker, wake=wake, max_vms=2, memory=None, grace_seconds=0)
        plain.insert("t", agent.id)
        with pytest.raises(NoImage, match="swarm image build"):
            await asyncio.wait_for(dispatcher.run(), 30)
    (step,) = await plain.store.steps("t")
    assert ((await plain.store.ticket("t")).state, step.status, step.retry_count) == ("in_progress", "ready", 0)


async def test_a_missing_image_that_one_agent_names_fails_only_its_ticket(plain: Bench) -> None:
    agent = await plain.agent(DONE, image="0123abcd")
    vms = wiring.launcher(plain.settings, await wiring.choice(plain.settings))
    images, layers = wiring.images(plain.settings), wiring.layers(plain.settings)
    async with wiring.egress(plain.settings, plain.store) as egress, plain.store.watching() as wake:
        engine = Engine(
            launcher=vms,
            images=images,
            layers=layers,
            limits=Limits(),
            egress=egress,
            values=Values(),
            installed=None,
        )
        worker = Worker(store=plain.store, engine=engine, name="here", lease_seconds=30)
        dispatcher = Dispatcher(store=plain.store, worker=worker, wake=wake, max_vms=2, memory=None, grace_seconds=0)
        plain.insert("t", agent.id)
        task = asyncio.create_task(dispatcher.run())
        assert await ended(plain, "t") == ["failed"]
        dispatcher.stop()
        await task  # the engine has no fault
    assert "no image '0123abcd'" in str((await plain.store.ticket("t")).error)


async def test_a_killed_vm_is_an_outcome_unknown(plain: Bench) -> None:
    """Never tried again by itself, unless the agent says that it is idempotent."""
    retry = RetryPolicy(max_attempts=3, delay_seconds=0.1)
    agent = await plain.agent(HANG, retry=retry)
    plain.insert("t", agent.id)
    async with serving(plain):
        await plain.until_it_prints()
        (record,) = plain.vms()
        os.kill(record.pid, signal.SIGKILL)
        assert await ended(plain, "t") == ["failed"]
    assert len(await plain.attempts()) == 1


async def test_an_agent_that_prints_byte_by_byte_costs_few_events(plain: Bench) -> None:
    began = time.monotonic()
    agent = await plain.agent("import os\nfor _ in range(5000): os.write(1, b'x')\n" + DONE)
    plain.insert("t", agent.id)
    async with serving(plain):
        assert await ended(plain, "t") == ["done"]
    printed = [event for event in await plain.store.events("t", limit=10_000) if event.kind == "output"]
    assert "".join(str(event.data["text"]) for event in printed) == "x" * 5000
    assert len(printed) < 100 + 20 * (time.monotonic() - began)  # ten a second


UNDONE = (
    "CREATE TRIGGER again AFTER DELETE ON unmet BEGIN INSERT INTO unmet VALUES (OLD.requires, 0); END",
    "CREATE TRIGGER again AFTER UPDATE OF waits_for ON tickets WHEN NEW.waits_for = '' "
    "BEGIN UPDATE tickets SET waits_for = 'x' WHERE id = NEW.id; END",
)


@pytest.mark.parametrize("sql", UNDONE)
async def test_a_trigger_that_undoes_every_claim_keeps_no_ticket_waiting(plain: Bench, sql: str) -> None:
    plain.sql(sql)
    plain.sql("INSERT INTO unmet VALUES ('{\"q\":1}', 0)")
    plain.sql("INSERT INTO tickets (id, state, waits_for) VALUES ('bad', 'ready', 'x')")
    agent = await plain.agent("import json; json.dump({}, open('output.json', 'w'))", "quick")
    async with serving(plain) as dispatcher:

        async def in_vain() -> bool:
            return dispatcher._empty > dispatch._IN_VAIN

        await plain.until(in_vain)
        plain.insert("t", agent.id)
        assert await ended(plain, "t") == ["done"]
