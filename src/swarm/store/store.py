"""The database as the rest of Swarm sees it: `async def` methods over two threads (docs/adr/0002-store-threads.md).

So many lines because all that can be asked of it stands here, a short method each.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, TypeVar

import sqlalchemy as sa
import structlog

from swarm.cel.jail import Jail
from swarm.errors import StoreError
from swarm.ledger import Bill, Limit, Order, Reservation
from swarm.model import (
    Agent,
    BudgetPolicy,
    Claim,
    Event,
    Failed,
    FailureReason,
    Interrupted,
    Outcome,
    Succeeded,
    Ticket,
)
from swarm.store import audit, spending
from swarm.store.claims import approvals, finish, retry_from
from swarm.store.claims.claim import Claimed, ClaimRequest, Queue
from swarm.store.registry import agents, schedules, secrets, webhooks, workflows
from swarm.store.registry.schedules import DueSchedules, FireRequest, ScheduleRow
from swarm.store.registry.secrets import Sealed, SecretRow
from swarm.store.registry.webhooks import WebhookAnswer, WebhookCall
from swarm.store.registry.workflows import WorkflowRow
from swarm.store.runs import artifacts
from swarm.store.runs.artifacts import ArtifactRow
from swarm.store.runs.background_planner import BackgroundPlanner
from swarm.store.runs.workflow_engine import PLANNING_SECONDS, WorkflowEngine
from swarm.store.sql import database
from swarm.store.sql.database import Database, Tx
from swarm.store.sql.rows import AttemptRow, Due, QueueStatus, Renewal, RunRow, StepRow, WorkerRow
from swarm.store.sql.threads import ConnectionThread, each
from swarm.store.sql.wake import Wake
from swarm.store.tickets import events, tickets
from swarm.workflow.definition import Workflow

log = structlog.get_logger(__name__)

T = TypeVar("T")

_SHIFT_CLOCK: Final = sa.text("UPDATE clock SET offset_ms = offset_ms + :ms")


def _shift(tx: Tx, ms: int) -> None:
    tx.run(_SHIFT_CLOCK, ms=ms)


# Kinds of request: one object each, since those of one kind share a transaction's statements.
_SHIFT = each(_shift)
_TICKET = each(tickets.ticket)
_TICKETS = each(tickets.tickets)
_RUNS = each(tickets.runs)
_STEPS = each(tickets.steps)
_ATTEMPTS = each(tickets.attempts)
_DEPENDS_ON = each(tickets.depends_on)
_CANCEL = each(tickets.cancel)
_RETRY = each(tickets.retry)
_RETRY_FROM = each(retry_from.retry_from)
_QUEUE = each(tickets.queue)
_DUE = each(tickets.due)
_EVENTS = each(events.events)
_PRUNE = each(events.prune)
_RESERVE = each(spending.reserve)
_COSTS = each(spending.costs)
_PUT_SECRET = each(secrets.put)
_SECRETS = each(secrets.listed)
_SEALED = each(secrets.of_names)
_REMOVE_SECRET = each(secrets.remove)
_PUT_AGENT = each(agents.put_agent)
_AGENT = each(agents.agent)
_AGENTS = each(agents.agents)
_REMOVE_AGENT = each(agents.remove_agent)
_PUT_WORKFLOW = each(workflows.put_workflow)
_WORKFLOW = each(workflows.workflow)
_WORKFLOWS = each(workflows.workflows)
_ENABLE = each(workflows.enable)
_DUE_SCHEDULES = each(schedules.due)
_SYNC_SCHEDULES = each(schedules.sync_schedules)
_FIRE_SCHEDULE = each(schedules.fire)
_SCHEDULES = each(schedules.schedules)
_CALL_WEBHOOK = each(webhooks.call)
_RESOLVE_REFERENCES = each(artifacts.resolve_references)
_ARTIFACT = each(artifacts.data)
_ARTIFACTS = each(artifacts.artifacts)
_SWEEP_ARTIFACTS = each(artifacts.sweep)
_WORKERS = each(agents.workers)
_FORGET_WORKER = each(agents.forget_worker)


class Store:
    """Every method may raise StoreError: the database is locked, read-only, full, damaged or not migrated.

    A method that has returned has been committed. Safe to use from many tasks of one event loop at once; that is what
    makes it fast.
    """

    def __init__(self, db: Database, *, over_budget: BudgetPolicy, planning_seconds: float) -> None:
        self._db = db
        self._write = ConnectionThread(db, write=True)
        self._read = ConnectionThread(db, write=False)
        self._workflows = WorkflowEngine(planning_seconds=planning_seconds)
        self._queue = Queue(self._workflows)
        self._finisher = finish.Finisher(self._workflows, over_budget)
        self._planner = BackgroundPlanner(db, self._workflows, self._write)
        self._answer = each(approvals.Approvals(self._workflows).answer)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        url: str,
        *,
        busy_timeout_seconds: float = 30.0,
        over_budget: BudgetPolicy = BudgetPolicy.FAIL,
        planning_seconds: float = PLANNING_SECONDS,
    ) -> AsyncIterator[Store]:
        """``url`` in SQLAlchemy's form: sqlite:////opt/swarm-platform/data/swarm.db. ``planning_seconds``: how long
        decisions on workflows may hold the write lock.

        Raises StoreError when there is something at that place that is no database, or no directory. A database that
        does not exist, or is not migrated, can be opened: for `migrate`.
        """
        db = Database(url, busy_timeout_seconds=busy_timeout_seconds)
        db.check_directory()
        store = cls(db, over_budget=over_budget, planning_seconds=planning_seconds)
        try:
            await store.revision()
            yield store
        finally:
            await asyncio.shield(store._close())

    def watching(self) -> AbstractAsyncContextManager[Wake]:
        """What tells when anybody has committed. Raises StoreError."""
        if self._db.file is None:
            raise StoreError(f"nothing is known that watches {self._db.place}")
        return Wake.watching(self._db.file)

    @property
    def url(self) -> str:
        """Where the database is, without its password."""
        return self._db.url.render_as_string(hide_password=True)

    @property
    def jail(self) -> Jail:
        """Where expressions run that could cost much: one for each store, which ends it. Starts at first need."""
        return self._workflows.jail

    async def _close(self) -> None:
        await self._planner.close()
        await self._write.close()
        await self._read.close()

    # --- the schema ---------------------------------------------------------------------------------------------------

    @staticmethod
    def head() -> str:
        """The revision that this Swarm needs."""
        return database.head()

    async def migrate(self) -> None:
        """Create the database, or bring it to `head()`. Idempotent; safe when several do it at once."""
        await self._write.call_raw(self._db.migrate)

    async def revision(self) -> str | None:
        """The revision that the database is at; None for an empty one, or none at all."""
        return await self._read.call_raw(self._db.revision) if self._db.exists() else None

    async def shift_clock(self, ms: int) -> None:
        """Move the clock that decides leases and back-offs. For tests."""
        await self._write.call(_SHIFT, ms)

    # --- tickets ------------------------------------------------------------------------------------------------------

    async def add_ticket(self, ticket: Ticket, *, depends_on: Sequence[str] = ()) -> Ticket:
        """Raises UsageError for one that could never run, Conflict when its id is taken.

        A workflow is begun this way too, whatever triggers it: ``trigger_type`` and ``trigger_data`` (JSON) of the
        ticket go into its run, and its expressions find them as `trigger`.
        """
        checked = tickets.check(ticket)
        return await self._write.call(tickets.add, tickets.AddRequest(ticket=checked, depends_on=tuple(depends_on)))

    async def ticket(self, id: str) -> Ticket:  # noqa: A002
        """Raises NotFound."""
        return await self._read.call(_TICKET, id)

    async def tickets(
        self, *, states: Sequence[str] = (), project_id: str | None = None, limit: int = 50
    ) -> list[Ticket]:
        """Newest first."""
        request = tickets.ListRequest(states=tuple(states), project_id=project_id, limit=limit)
        return await self._read.call(_TICKETS, request)

    async def runs(self, ticket_id: str) -> list[RunRow]:
        """Oldest first, as are `steps` and `attempts`. Empty for a ticket that never ran."""
        return await self._read.call(_RUNS, ticket_id)

    async def steps(self, ticket_id: str) -> list[StepRow]:
        return await self._read.call(_STEPS, ticket_id)

    async def attempts(self, ticket_id: str) -> list[AttemptRow]:
        return await self._read.call(_ATTEMPTS, ticket_id)

    async def depends_on(self, ticket_id: str) -> list[str]:
        return await self._read.call(_DEPENDS_ON, ticket_id)

    async def cancel(self, ticket_id: str, by: str) -> None:
        """A waiting ticket never starts; the worker of a running one hears of it at its next `renew`.

        Raises NotFound, and Conflict when it is done or failed. Cancelled already: nothing.
        """
        await self._write.call(_CANCEL, tickets.CancelRequest(ticket_id=ticket_id, by=by))

    async def retry(self, ticket_id: str, *, step: str | None = None) -> None:
        """failed or cancelled → ready, for a new run. Raises NotFound, and Conflict in any other state.

        With ``step``, a step of its workflow, the new run keeps what the last one completed, but for that step and
        what depends on it; it is the same frozen workflow, and may be done. ``each[3]`` is one item of a for_each (what
        failed or was not started runs again as well), ``again[3]`` the repetitions from that one. Raises UsageError
        for a step that there is not.
        """
        if step is None:
            await self._write.call(_RETRY, ticket_id)
        else:
            await self._write.call(_RETRY_FROM, retry_from.RetryRequest(ticket_id=ticket_id, step=step))

    async def answer(
        self,
        ticket_id: str,
        *,
        approved: bool,
        by: str,
        why: str = "",
        step: str | None = None,
        budget: Limit | None = None,
    ) -> str:
        """Approve or reject the step that waits for it (``step``, where several do); which one that was.

        ``budget``: what the ticket's is raised to, for a step that came to the end of one. Raises NotFound, UsageError
        for a budget that is no more than the present one, and Conflict when no step waits, when it is not clear which
        is meant, or for a budget when the step waits for something else.
        """
        request = approvals.AnswerRequest(
            ticket_id=ticket_id, step=step, approved=approved, by=by, why=why, budget=budget or Limit()
        )
        answered, undecided = await self._write.call(self._answer, request)
        self._planner.take_up(undecided)
        await self._planner.decided()
        return answered

    async def queue(self) -> QueueStatus:
        return await self._read.call(_QUEUE, None)

    async def due(self) -> Due:
        return await self._read.call(_DUE, None)

    # --- attempts -----------------------------------------------------------------------------------------------------

    def claim(
        self,
        worker: str,
        *,
        limit: int = 1,
        lease_seconds: float,
        ticket_id: str | None = None,
        memory_mb: int | None = None,
        most_memory_mb: int | None = None,
        held: Collection[str] = (),
        queue_timeout_seconds: float | None = None,
    ) -> Coroutine[Any, Any, list[Claim]]:
        """Up to ``limit`` attempts for this worker, each under a lease; none when nothing can run now. To be awaited,
        but asked for with the call itself: it comes behind all that was asked before.

        On the way, expired leases are swept and bad rows are answered in their `error`. With ``ticket_id``, only that
        ticket's. With ``memory_mb``, only while the agents' memory fits in that; the first that does not fit ends the
        claim, so that a big one is not overtaken for ever; one that needs more than ``most_memory_mb`` can never run
        here, and fails. ``held`` are attempts that this worker is executing: should their leases have run out (a clock
        that jumped), they are extended, not swept. A ticket that has waited
        for more than ``queue_timeout_seconds`` when its turn comes fails. When the caller is cancelled meanwhile, what
        was claimed is handed back, uncounted.
        """
        request = ClaimRequest(
            worker=worker,
            limit=limit,
            lease_seconds=lease_seconds,
            ticket_id=ticket_id,
            memory_mb=memory_mb,
            most_memory_mb=most_memory_mb,
            held=frozenset(held),
            queue_timeout_seconds=queue_timeout_seconds,
        )
        return self._claimed(request, self._write.submit(self._queue.claim, request))

    async def _claimed(self, request: ClaimRequest, future: asyncio.Future[Claimed]) -> list[Claim]:
        while True:
            try:
                claimed: Claimed = await asyncio.shield(future)
            except asyncio.CancelledError:
                future.add_done_callback(self._hand_back)
                raise
            self._planner.take_up(claimed.undecided)
            if claimed.claims or not claimed.more:
                return claimed.claims
            future = self._write.submit(self._queue.claim, request)

    async def decided(self) -> bool:
        """Wait for the decisions of workflows that this store has taken up; False when there are none."""
        return await self._planner.decided()

    def _hand_back(self, future: asyncio.Future[Any]) -> None:
        if future.cancelled() or future.exception() is not None:
            return
        for claim in future.result().claims:
            request = finish.FinishRequest(
                attempt_id=claim.attempt_id, outcome=Interrupted(message="never begun"), timings={}, vm_time_ms=0.0
            )
            if not self._write.closed:
                self._write.submit(self._finisher.finish, request).add_done_callback(_ignore)

    async def renew(self, attempt_ids: Sequence[str], *, lease_seconds: float) -> Renewal:
        """Extend leases to ``lease_seconds`` from now. An attempt named in the answer must be stopped at once."""
        request = finish.RenewRequest(attempt_ids=tuple(attempt_ids), lease_seconds=lease_seconds)
        return await self._write.call(finish.renew, request)

    async def running(self, attempt_id: str, vm_id: int) -> None:
        """Record the VM of an attempt. Raises LeaseLost."""
        await self._write.call(finish.running, finish.RunningRequest(attempt_id=attempt_id, vm_id=vm_id))

    async def finish(
        self,
        attempt_id: str,
        outcome: Outcome,
        *,
        timings: Mapping[str, float],
        vm_time_ms: float,
        vm_id: int | None = None,
        events: Sequence[Event] = (),
        in_workflow: bool = False,
        queued: Callable[[], None] = lambda: None,
    ) -> None:
        """End an attempt, and with it, or by the retry policy not yet, its step, run and ticket.

        ``events`` are the last of its ticket, written before the transitions. ``in_workflow``, as its claim says: its
        outputs are made ready for that before the write lock is taken. ``queued`` is called as soon as what is asked
        for afterwards comes later, or into the same transaction.

        Raises LeaseLost, with nothing changed, when it no longer owns its step.
        """
        packed = None
        if in_workflow and isinstance(outcome, Succeeded) and artifacts.worth_packing(outcome.outputs):
            try:
                packed = await asyncio.to_thread(artifacts.pack_text, outcome.outputs)
            except RecursionError:
                outcome = Failed(reason=FailureReason.OUTPUT_INVALID, message="its outputs are nested too deeply")
        request = finish.FinishRequest(
            attempt_id=attempt_id,
            outcome=outcome,
            timings=timings,
            vm_time_ms=vm_time_ms,
            vm_id=vm_id,
            events=tuple(events),
            packed=packed,
        )
        written = self._write.submit(self._finisher.finish, request)
        queued()
        await written

    # --- artifacts --------------------------------------------------------------------------------------------------

    async def resolve_references(self, text: str) -> str:
        """JSON of a workflow's step (its inputs, its outputs), artifacts in the place of references. Raises NotFound
        when one is gone, UsageError when they are too large together."""
        return await self._read.call(_RESOLVE_REFERENCES, text) if artifacts.MARK in text else text

    async def artifact(self, digest: str) -> str:
        """The JSON text of one, by its digest or the beginning of that. Raises NotFound."""
        return await self._read.call(_ARTIFACT, digest)

    async def artifacts(self, *, ticket_id: str | None = None, limit: int = 50) -> list[ArtifactRow]:
        """Of one ticket, oldest first; without one, the largest of all."""
        return await self._read.call(_ARTIFACTS, artifacts.ListRequest(ticket_id=ticket_id, limit=limit))

    # --- events -------------------------------------------------------------------------------------------------------

    async def append(self, new: Sequence[Event]) -> None:
        """``seq`` and ``at`` are given by the database. Events of a ticket that is not there are dropped."""
        if new:
            await self._write.call(events.append, tuple(new))

    async def events(self, ticket_id: str | None, after: int = 0, limit: int = 1000) -> list[Event]:
        """In order, from ``seq`` > ``after``: of one ticket, or with None of all, deleted ones included."""
        request = events.EventsRequest(ticket_id=ticket_id, after=after, limit=limit)
        return await self._read.call(_EVENTS, request)

    async def audit(self, judge: Callable[[audit.Audit], T], *, since: str = "") -> T:
        """What ``judge`` makes of one moment of the database. It runs on the reading thread. ``since``: ISO-8601."""

        def read(tx: Tx, requests: Sequence[None]) -> Sequence[T]:
            return [judge(audit.Audit(tx, since)) for _ in requests]

        return await self._read.call(read, None)

    async def prune(self, older_than_seconds: float) -> int:
        """Remove events of that age whose tickets have ended; how many."""
        removed, after = 0, 0
        while True:
            request = events.PruneRequest(older_than_seconds=older_than_seconds, after=after)
            batch = await self._write.call(_PRUNE, request)
            removed += batch.removed
            if batch.after is None:
                await self._write.call(_SWEEP_ARTIFACTS, None)
                return removed
            after = batch.after

    # --- model calls (swarm.ledger.Ledger) ----------------------------------------------------------------------------

    async def reserve(self, order: Order) -> Reservation:
        """Take what a model call may cost out of every budget that it counts against. Raises NotFound."""
        return await self._write.call(_RESERVE, order)

    async def book(self, bill: Bill) -> None:
        """Settle a reservation: once, also when it is asked for again."""
        await self._write.call(spending.book, bill)

    async def costs(self, by: spending.By, *, since: str = "") -> list[spending.Costs]:
        """Model calls since then (ISO-8601), summed."""
        return await self._read.call(_COSTS, spending.CostsRequest(by=by, since=since))

    # --- secrets, sealed (swarm.admin.vault) --------------------------------------------------------------------------

    async def put_secret(self, secret: Sealed) -> None:
        await self._write.call(_PUT_SECRET, secret)

    async def secrets(self) -> list[SecretRow]:
        return await self._read.call(_SECRETS, None)

    async def sealed_secrets(self, names: Sequence[str]) -> list[Sealed]:
        """Secrets of these names, whatever their scopes."""
        return await self._read.call(_SEALED, tuple(names))

    async def remove_secret(self, name: str, scope: str) -> None:
        """Raises NotFound."""
        await self._write.call(_REMOVE_SECRET, secrets.RemoveRequest(name=name, scope=scope))

    # --- agents, workflows, workers -----------------------------------------------------------------------------------

    async def put_agent(self, agent: Agent) -> Agent:
        """Register. Raises Conflict when that name and version is taken by other content or another id."""
        return await self._write.call(_PUT_AGENT, agent)

    async def agent(self, ref: str) -> Agent:
        """By id, name, name@1 or name@1.0.0. Raises NotFound."""
        return await self._read.call(_AGENT, ref)

    async def agents(self, *, broken: bool = True) -> list[Agent]:
        """Raises StoreError that names the first row that is broken; ``broken`` False leaves such rows out."""
        return await self._read.call(_AGENTS, broken)

    async def remove_agent(self, ref: str) -> Agent:
        """Forget an agent; what it was. Raises NotFound, and Conflict while a ticket that has not ended names it."""
        return await self._write.call(_REMOVE_AGENT, ref)

    async def put_workflow(self, workflow: Workflow) -> WorkflowRow:
        """Register. Raises Conflict when that name and version is taken by another definition or another id."""
        return await self._write.call(_PUT_WORKFLOW, workflow)

    async def workflow(self, ref: str) -> WorkflowRow:
        """By id, name, name@1 or name@1.0.0. Raises NotFound."""
        return await self._read.call(_WORKFLOW, ref)

    async def workflows(self) -> list[WorkflowRow]:
        return await self._read.call(_WORKFLOWS, None)

    async def enable_workflow(self, ref: str, *, enabled: bool) -> WorkflowRow:
        """Raises NotFound."""
        return await self._write.call(_ENABLE, workflows.EnableRequest(ref=ref, enabled=enabled))

    async def schedules(self) -> list[ScheduleRow]:
        """Of the newest version of each workflow."""
        return await self._read.call(_SCHEDULES, None)

    async def due_schedules(self) -> DueSchedules:
        """Those whose time has come, and until the next one's does. Their rows follow the workflows first."""
        found = await self._read.call(_DUE_SCHEDULES, None)
        if found.stale:
            await self._write.call(_SYNC_SCHEDULES, None)
            found = await self._read.call(_DUE_SCHEDULES, None)
        return found

    async def fire_schedule(self, request: FireRequest) -> bool:
        """Make its tickets, and move it on. False, and nothing done, when somebody else did, or it has changed."""
        return await self._write.call(_FIRE_SCHEDULE, request)

    async def call_webhook(self, call: WebhookCall) -> WebhookAnswer:
        """Make the ticket of a request, or name the one that it made before. Raises Conflict for a key that came with
        another body."""
        return await self._write.call(_CALL_WEBHOOK, call)

    async def heartbeat(self, worker: str, *, host: str, pid: int, info: Mapping[str, Any]) -> None:
        """Say that a worker lives, and what it does. Shown by status; decides nothing (leases do)."""
        await self._write.call(agents.heartbeat, agents.Beat(id=worker, host=host, pid=pid, info=info))

    async def workers(self) -> list[WorkerRow]:
        return await self._read.call(_WORKERS, None)

    async def forget_worker(self, worker: str) -> None:
        await self._write.call(_FORGET_WORKER, worker)


def _ignore(future: asyncio.Future[Any]) -> None:
    """The lease ends anyway; retrieving the exception keeps asyncio from reporting it."""
    if not future.cancelled():
        future.exception()
