"""The database as the rest of Swarm sees it: `async def` methods over two threads (docs/adr/0002-store-threads.md).

So many lines because everything that can be asked of the database has a short method here.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from swarm.base.aio import finish_uninterrupted
from swarm.cel.jail import Jail
from swarm.errors import ChangeRefused, Conflict, StoreError, UsageError
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
    Sandbox,
    SandboxClaim,
    SandboxState,
    Snapshot,
    Succeeded,
    Ticket,
)
from swarm.store import audit, details, hosts, spending
from swarm.store.claims import approvals, finish, retry_from
from swarm.store.claims.claim import Claimer
from swarm.store.claims.finish import AppendRequest
from swarm.store.claims.kept import HOST_TIMEOUT_SECONDS
from swarm.store.claims.looks import Looks
from swarm.store.claims.request import Claimed, ClaimRequest
from swarm.store.details import TicketDetails
from swarm.store.hosts import Alive, Holds, HostState, Machine
from swarm.store.registry import (
    agents,
    host_files,
    notices,
    packages,
    schedules,
    secrets,
    tokens,
    webhooks,
    workers,
    workflows,
)
from swarm.store.registry.host_files import HostFile, Offer
from swarm.store.registry.notices import NoticeKind, NoticeRow
from swarm.store.registry.packages import Package
from swarm.store.registry.schedules import DueSchedules, FireRequest, ScheduleRow
from swarm.store.registry.secrets import Sealed, SecretRow
from swarm.store.registry.tokens import Actor, TokenRow
from swarm.store.registry.webhooks import Once, WebhookAnswer, WebhookCall
from swarm.store.registry.workflows import WorkflowRow
from swarm.store.runs import artifacts, overview, packing, views
from swarm.store.runs.artifacts import ArtifactRow
from swarm.store.runs.background_planner import BackgroundPlanner
from swarm.store.runs.overview import RunGraph
from swarm.store.runs.packing import Packer
from swarm.store.runs.views import RunStates, StepDetails, TryView, WaitingStep
from swarm.store.runs.workflow_engine import PLANNING_SECONDS, WorkflowEngine
from swarm.store.sandboxes import holding, sandboxes, snapshots, taking
from swarm.store.sandboxes.claiming import SandboxClaimer
from swarm.store.sandboxes.holding import SandboxRenewal
from swarm.store.sandboxes.sandboxes import SandboxFilter, SandboxPage
from swarm.store.sandboxes.share import Share
from swarm.store.sandboxes.snapshots import SnapshotFilter, SnapshotPage
from swarm.store.sandboxes.taking import Taking
from swarm.store.sql import database
from swarm.store.sql.database import Database
from swarm.store.sql.dialect import Sql
from swarm.store.sql.grants import grants
from swarm.store.sql.rows import (
    AttemptRow,
    Due,
    HostRow,
    QueueStatus,
    Renewal,
    RunRow,
    StepRow,
    TicketSummary,
    WorkerRow,
)
from swarm.store.sql.threads import ConnectionThread
from swarm.store.sql.transaction import Tx
from swarm.store.sql.wake import Wake
from swarm.store.tickets import dependencies, display, events, facts, pages, places, tickets
from swarm.store.tickets.display import ModelCall, NextStep, Question, RunningAttempt
from swarm.store.tickets.events import LeftFiles
from swarm.store.tickets.facts import Backlog, Facts, Traced
from swarm.store.tickets.isolation import IsolatingThread, Isolation
from swarm.store.tickets.pages import Count, TicketFilter, TicketPage
from swarm.store.tickets.places import Elsewhere, Places
from swarm.store.tickets.room import Room
from swarm.store.tickets.settled import Settled
from swarm.store.untold import UNTOLD
from swarm.workflow.definition import Workflow

T = TypeVar("T")

_USED_AFTER_SECONDS: Final = 1.0
_HOST_LOOK_SECONDS: Final = 0.5  # between two looks at whether another machine lives
_SHIFT_CLOCK: Final = Sql("UPDATE clock SET offset_ms = offset_ms + :ms")


class Store:
    """Every method may raise StoreError: the database is locked, read-only, full, damaged or not migrated. What one
    returns is on the disk (but see `untold`). Requests of many tasks (of one event loop) share transactions."""

    def __init__(
        self, db: Database, *, over_budget: BudgetPolicy, planning_seconds: float, host_id: str | None = None
    ) -> None:
        self._db, self.isolation = db, Isolation()
        self._host_id, self._host = host_id, ""
        self.labels: Mapping[str, Any] = {}  # of this host, and what memory one VM may have; None: any
        self.vm_memory_mb: int | None = None
        self._machine: Machine | None = None  # once an engine of this process has registered it
        self._workflows = WorkflowEngine(planning_seconds=planning_seconds, isolation=self.isolation)
        self._packer = Packer()
        self._packing = asyncio.Lock()  # one thread waits for the packer: threads are few, and shared
        self._queue = Claimer(self._workflows)
        self._finisher = finish.Finisher(self._workflows, over_budget, self.isolation, self._queue.maintenance)
        finisher = self._finisher
        untold = (*UNTOLD, finisher.append, finisher.renew, finisher.running, self._workflows.write_items)
        shared = (self._queue.claim, finisher.finish, finisher.append, finisher.renew, finisher.running)
        joined = (finisher.finish, self._queue.claim)
        self._write = IsolatingThread(db, self.isolation, untold=untold, shared=shared, joined=joined)
        self._read = ConnectionThread(db, write=False, untold=untold)
        self._settled = Settled(self._read, db.dialect)
        self._survey_read: ConnectionThread | None = None  # begins at its first use
        self._planner = BackgroundPlanner(db, self._workflows, self._write)
        self._approvals = approvals.Approvals(self._workflows)
        looks = self._looks = Looks(self._queue.pace, self._read)
        self.looking_by = looks.by
        self._holders = SandboxClaimer(self._read, self._write)
        self._tokens_used = set[str]()  # of which that is being written
        self._host_timeout_seconds = HOST_TIMEOUT_SECONDS

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        url: str,
        *,
        busy_timeout_seconds: float = 30.0,
        over_budget: BudgetPolicy = BudgetPolicy.FAIL,
        planning_seconds: float = PLANNING_SECONDS,
        host_timeout_seconds: float = HOST_TIMEOUT_SECONDS,
        host_id: str | None = None,
    ) -> AsyncIterator[Store]:
        """``url`` in SQLAlchemy's form: sqlite:////opt/swarm-platform/data/swarm.db. ``planning_seconds``: how long
        decisions on workflows may hold the write lock. ``host_timeout_seconds``: after so long without a sign of life
        from its engines, a host's snapshots are not waited for. ``host_id``: this machine's. Raises StoreError when the
        file is not a database, or its directory does not exist. One that does not exist or is not migrated can be
        opened, for `migrate`.
        """
        db = Database(url, busy_timeout_seconds=busy_timeout_seconds)
        db.check_directory()
        store = cls(db, over_budget=over_budget, planning_seconds=planning_seconds, host_id=host_id)
        store._host_timeout_seconds = host_timeout_seconds
        try:
            await store.revision()
            yield store
        finally:
            await asyncio.shield(store._close())

    @asynccontextmanager
    async def watching(self, *, events: bool = True) -> AsyncIterator[Wake]:
        """Notices commits by any process; with PostgreSQL and ``events`` False, not those that only add events. Raises
        StoreError."""
        async with self._db.watching(events=events) as wake:
            self._db.wakes.append(wake)
            try:
                yield wake
            finally:
                self._db.wakes.remove(wake)

    @property
    def url(self) -> str:
        """Where the database is, without its password."""
        return self._db.url

    @property
    def is_file(self) -> bool:
        """Not a server, which may be away for a time."""
        return self._db.file is not None

    @property
    def jail(self) -> Jail:
        """Runs expressions that could be expensive. One per store; it starts at first use and ends with the store."""
        return self._workflows.jail

    async def _close(self) -> None:
        await self._planner.close()
        await self._write.close()
        await self._read.close()
        if self._survey_read is not None:
            await self._survey_read.close()
        await asyncio.to_thread(self._packer.close)

    @property
    def _survey(self) -> ConnectionThread:
        """For what takes seconds of a large database: one such read at a time, and no other read waits for it."""
        if self._survey_read is None:
            self._survey_read = ConnectionThread(self._db, write=False)
        return self._survey_read

    # --- the schema ---------------------------------------------------------------------------------------------------

    @staticmethod
    def head() -> str:
        """The revision that this version of Swarm needs."""
        return database.HEAD

    async def migrate(self) -> None:
        """Create the database, or upgrade it to `head()`. Idempotent; several processes may call it at once."""
        await self._write.call_raw(self._db.migrate)

    async def grants(self, role: str, *, run: bool = False) -> str:
        """SQL that lets a role of PostgreSQL INSERT and SELECT tickets, dependencies and sandboxes; with ``run``, it is
        run. Raises UsageError for SQLite, NotFound without such a role."""
        return await self._write.call_raw(lambda connection: grants(self._db, connection, role, run=run))

    async def revision(self) -> str | None:
        """The revision of the database; None if it is empty or does not exist."""
        return await self._read.call_raw(self._db.revision) if self._db.exists() else None

    async def shift_clock(self, ms: int) -> None:
        """Move the clock that leases and back-offs use. For tests."""
        await self._write.call(lambda tx: tx.run(_SHIFT_CLOCK, ms=ms))

    # --- tickets ------------------------------------------------------------------------------------------------------

    async def add_ticket(
        self,
        ticket: Ticket,
        *,
        depends_on: Sequence[str] = (),
        uses: int = 0,
        sent_as: str | None = None,
        by: str | None = None,
    ) -> Ticket:
        """Raises UsageError for a ticket that could never run, Conflict when its id is taken. A workflow's expressions
        see ``trigger_type`` and ``trigger_data`` (JSON) as `trigger`. ``uses``: how many artifacts were kept for it; a
        Conflict if `prune` has removed some, since it had no ticket yet. ``sent_as``: they were kept by this name
        (`artifacts.sent_as`), and become the ticket's, which then has no others. ``by``: who adds it, for an event."""
        return await self._write.call(
            tickets.add, tickets.check(ticket), depends_on=tuple(depends_on), uses=uses, sent_as=sent_as, by=by
        )

    async def add_ticket_once(
        self,
        ticket: Ticket,
        once: Once,
        *,
        depends_on: Sequence[str] = (),
        uses: int = 0,
        sent_as: str | None = None,
        by: str,
    ) -> tuple[Ticket, bool]:
        """The ticket, and whether this request had added it before: then nothing is added. Raises as `add_ticket`, and
        Conflict for a key that was used for something else."""
        checked = tickets.check(ticket)
        return await self._write.call(
            webhooks.add_once, checked, once=once, depends_on=tuple(depends_on), uses=uses, sent_as=sent_as, by=by
        )

    async def ticket(self, id: str) -> Ticket:
        """Raises NotFound."""
        return await self._read.call(tickets.ticket, id)

    async def ticket_id(self, ref: str) -> str:
        """What a person typed: an id, or the beginning of a generated one, of at least four characters. Raises
        NotFound, and Conflict if several begin with it."""
        return await self._read.call(tickets.ticket_id, ref)

    async def visible_ticket_id(self, ref: str, *, project_id: str | None) -> str:
        """The id of the ticket that a user of the API means by ``ref``, as `ticket_id` finds it; with a ``project_id``,
        there are no others. Raises NotFound, and Conflict if several begin with it."""
        return await self._read.call(tickets.visible_id, ref, project_id=project_id)

    async def visible_ticket(self, ref: str, *, project_id: str | None) -> TicketSummary:
        """The ticket of `visible_ticket_id`, without its long columns. Raises as that."""
        return await self._read.call(tickets.visible, ref, project_id=project_id)

    async def names(self, ids: Collection[str | None]) -> Mapping[str, str]:
        """name@version of those of these ids that are of registered agents and workflows."""
        return await self._read.call(tickets.names, sorted({id for id in ids if id}))

    async def tickets(
        self, *, states: Sequence[str] = (), project_id: str | None = None, limit: int = 50
    ) -> list[Ticket]:
        """Newest first."""
        return await self._read.call(tickets.tickets, states=tuple(states), project_id=project_id, limit=limit)

    async def ticket_summaries(self, **which: Any) -> list[TicketSummary]:
        """`tickets`, for lists: without inputs, outputs and other long columns."""
        return await self._read.call(tickets.summaries, **which)

    async def ticket_page(self, which: TicketFilter, *, after: str | None = None, limit: int = 50) -> TicketPage:
        """Newest first. ``after``: from the page before; raises UsageError if no page gave it."""
        return await self._read.call(pages.page, which, after=after, limit=limit)

    async def filtered_ids(
        self, which: TicketFilter, *, after: str | None = None, limit: int = 1000
    ) -> tuple[list[str], str | None]:
        """The ids of a page, and where the next one starts."""
        return await self._read.call(pages.ids, which, after=after, limit=limit)

    async def count_tickets(self, which: TicketFilter, *, after: str | None = None) -> Count:
        """Never reads more than some thousand tickets. ``after``: as of `ticket_page`."""
        return await self._read.call(pages.count, which, after=after)

    async def ticket_counts(self, which: TicketFilter) -> dict[str, Count]:
        """The same for each state, or for each of those that are asked for."""
        return await self._read.call(pages.counts, which)

    async def details(self, id: str) -> TicketDetails:
        """A ticket with its runs, steps and attempts. Raises NotFound."""
        return await self._read.call(details.details, id)

    async def recent_states(self, *, project_id: str | None = None) -> Mapping[str, Mapping[str, int]]:
        """Of some thousand of the newest tickets: how many in each state, by their agent's or workflow's id."""
        return await self._read.call(views.recent_states, project_id=project_id)

    async def runs(self, ticket_id: str) -> list[RunRow]:
        """Oldest first, like `steps` and `attempts`. Empty for a ticket that never ran."""
        return await self._read.call(tickets.runs, ticket_id)

    async def run_graph(self, run_id: str) -> RunGraph:
        """A run's workflow with the state of each step. Raises NotFound."""
        return await asyncio.to_thread(overview.graph, await self._read.call(overview.read, run_id))

    async def steps(self, ticket_id: str) -> list[StepRow]:
        return await self._read.call(tickets.steps, ticket_id)

    async def attempts(self, ticket_id: str) -> list[AttemptRow]:
        return await self._read.call(tickets.attempts, ticket_id)

    async def run_states(
        self, ticket_id: str, *, run_id: str | None = None, path: str = "", steps: bool = True
    ) -> RunStates:
        """The newest run of a ticket, or the one named, with its steps' states, unless ``steps`` is False; ``path``: of
        the run nested in it there, such as 'fix[0]/'. Raises NotFound."""
        return await self._read.call(views.states, ticket_id, run_id=run_id, path=path, steps=steps)

    async def step_details(self, ids: Sequence[str]) -> tuple[list[StepDetails], list[TryView]]:
        """Of some steps, with texts shortened, and their attempts."""
        return await self._read.call(views.details, tuple(ids))

    async def step_texts(self, ticket_id: str, *, run_id: str, step_id: str) -> tuple[str, str | None, str | None]:
        """The id of a step's row, its inputs and its outputs. Raises NotFound."""
        return await self._read.call(views.step, ticket_id, run_id=run_id, step_id=step_id)

    async def frozen_workflow(self, digest: str) -> str:
        """The text of a run's workflow. Raises NotFound."""
        return await self._read.call(views.frozen, digest)

    async def waiting_steps(self, *, project_id: str | None = None) -> tuple[list[WaitingStep], bool]:
        """The steps that wait for a person, longest first; and whether there are more."""
        return await self._read.call(views.waiting, project_id=project_id)

    async def count_waiting(self, *, project_id: str | None = None) -> int:
        """Tickets that wait for a person."""
        return await self._read.call(views.count_waiting, project_id=project_id)

    async def depends_on(self, ticket_id: str) -> list[str]:
        return await self._read.call(dependencies.depends_on, ticket_id)

    async def cancel(self, ticket_id: str, by: str) -> None:
        """A ticket that has not started never does; the worker of a running one learns it from its next `renew`. Does
        nothing when it is already cancelled. Raises NotFound, and Conflict when it is done or failed."""
        await self._write.call(tickets.cancel, ticket_id, by=by)

    async def ticket_states(self, ids: Sequence[str], *, project_id: str | None = None) -> dict[str, str]:
        """Of those of these tickets that exist, in the project if one is given."""
        return await self._read.call(tickets.states, tuple(ids), project_id=project_id)

    async def for_each(self, ids: Sequence[str], act: Callable[[Tx, str], None]) -> dict[str, str]:
        """``act``, such as `tickets.cancel`, on each of these tickets, in one transaction; why not, of those of which
        it was refused. Raises ChangeRefused when a trigger did: then nothing was done."""
        return await self._write.call(tickets.for_each, tuple(ids), act)

    async def make_ready(self, ticket_id: str, *, by: str = "hand") -> None:
        """draft → ready. Does nothing when it is ready. Raises NotFound, and Conflict in any other state."""
        await self._write.call(tickets.make_ready, ticket_id, by=by)

    async def remove_tickets(
        self, ids: Sequence[str], *, by: str, force: bool = False, project_id: str | None = None
    ) -> None:
        """Delete them, all or none; their runs and artifacts go too, an event `deleted` stays. Raises NotFound, and
        Conflict for one that runs or that a blocked ticket depends on; with ``force``, such a one is cancelled, and
        its worker learns that as from `cancel`. With a ``project_id``, nothing that is not of it may depend on them."""
        await self._write.call(tickets.remove, tuple(ids), force=force, by=by, project_id=project_id)

    async def retry(self, ticket_id: str, *, step: str | None = None, by: str = "hand") -> None:
        """failed or cancelled → ready, for a new run. Raises NotFound, and Conflict in any other state.

        ``step`` names a step of its workflow: the new run uses the same frozen workflow and keeps all completed steps
        of the last run except that step and those that depend on it. The ticket may then also be done. ``each[3]`` is
        one item of a for_each (items that failed or never started run again as well), ``again[3]`` is a repetition,
        which runs again with all later ones. Raises UsageError for an unknown step.
        """
        if step is None:
            await self._write.call(tickets.retry, ticket_id, by=by)
        else:
            request = retry_from.RetryRequest(ticket_id=ticket_id, step=step, by=by)
            await self._write.call(retry_from.retry_from, request)

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
        """Approve or reject the waiting step, and return its name. ``step`` is needed when several steps wait.

        ``budget``: the ticket's new budget, for a step that used up the old one. Raises NotFound, UsageError for a
        budget that is not larger than the present one, and Conflict when no step waits, when several wait and ``step``
        is None, or when ``budget`` is given but the step waits for something else.
        """
        request = approvals.AnswerRequest(
            ticket_id=ticket_id, step=step, approved=approved, by=by, why=why, budget=budget or Limit()
        )
        answered, undecided = await self._write.call(self._approvals.answer, request)
        self._planner.take_up(undecided)
        await self._planner.decided()
        return answered

    async def queue(self) -> QueueStatus:
        return await self._read.call(tickets.queue)

    async def elsewhere(self, ticket_id: str | None = None) -> list[Elsewhere]:
        """What hosts lack of which something waits for them: of all, or of a ticket."""
        if ticket_id is not None:
            return await self._read.call(places.of_ticket, ticket_id)
        return await self._read.call(places.elsewhere)

    async def due(self) -> Due:
        """Is there something to claim for an engine of this host? Else: what it waits for."""
        due = await self._read.call(tickets.due, host=await self.this_host(), place=self._place(self.vm_memory_mb))
        return self._queue.pace.due(self.isolation.paced(due))

    # --- attempts -----------------------------------------------------------------------------------------------------

    def claim(
        self,
        worker: str,
        *,
        limit: int = 1,
        lease_seconds: float,
        ticket_id: str | None = None,
        room: Room | None = None,
        held: Collection[str] = (),
        idle: bool = True,
        drain: bool = True,
        host: str | None = None,
        queue_timeout_seconds: float | None = None,
    ) -> Coroutine[Any, Any, list[Claim]]:
        """Up to ``limit`` attempts for this worker, each under a lease; an empty list when nothing can run now. The
        request is queued when this function is called, behind all earlier ones; await the result.

        A claim also sweeps expired leases, and fails bad rows with the reason in their `error`. With ``ticket_id``, it
        takes attempts of that ticket only. With ``room``, the agents' VMs must fit into that; the first that does not
        ends the claim, so that small ones can't overtake a large one for ever. One that can never fit fails its ticket.
        ``held`` are the attempts that this worker is executing: if their leases have run out (a clock that jumped),
        they are extended, not swept. ``idle``: it is executing none, so it may get a suspect, alone
        (`swarm.store.claims.suspects`); with ``drain``, it gets nothing more before a suspect that has waited for long.
        ``host``: where the worker is, by default this host; steps that start in forks of VMs are claimed where these
        were kept. A ticket that has waited longer than ``queue_timeout_seconds`` when its turn comes fails. When the
        caller is cancelled, the claimed attempts are handed back, and don't count as tries.
        """
        request = ClaimRequest(
            worker=worker,
            limit=limit,
            lease_seconds=lease_seconds,
            ticket_id=ticket_id,
            room=room,
            held=frozenset(held),
            idle=idle,
            drain=drain,
            host=host or self.here,
            labels=self.labels,
            queue_timeout_seconds=queue_timeout_seconds,
            host_timeout_seconds=self._host_timeout_seconds,
        )
        return self._claimed(request, self._write.submit_batch(self._queue.claim, request))

    async def _claimed(self, request: ClaimRequest, future: asyncio.Future[Claimed]) -> list[Claim]:
        while True:
            try:
                claimed: Claimed = await asyncio.shield(future)
            except asyncio.CancelledError:
                future.add_done_callback(self._hand_back)
                raise
            self._planner.take_up(claimed.undecided)
            self._looks.take_up()
            if claimed.claims or not claimed.more:
                return claimed.claims
            future = self._write.submit_batch(self._queue.claim, request)

    async def decided(self) -> bool:
        """Wait for the workflow decisions that this store makes in the background; False when there are none."""
        return await self._planner.decided()

    def _hand_back(self, future: asyncio.Future[Any]) -> None:
        if future.cancelled() or future.exception() is not None:
            return
        for claim in future.result().claims:
            request = finish.FinishRequest(
                attempt_id=claim.attempt_id, outcome=Interrupted(message="never begun"), timings={}, vm_time_ms=0.0
            )
            if not self._write.closed:
                self._write.submit_batch(self._finisher.finish, request).add_done_callback(_ignore)

    async def renew(self, attempt_ids: Sequence[str], *, lease_seconds: float) -> Renewal:
        """Extend leases to ``lease_seconds`` from now. Attempts named in the result must be stopped at once."""
        request = finish.RenewRequest(attempt_ids=tuple(attempt_ids), lease_seconds=lease_seconds)
        return await self._write.call_batch(self._finisher.renew, request)

    async def running(self, attempt_id: str, vm_id: int) -> None:
        """Record the VM of an attempt. Raises LeaseLost."""
        await self._write.call_batch(self._finisher.running, finish.RunningRequest(attempt_id=attempt_id, vm_id=vm_id))

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
        again: bool = False,
    ) -> None:
        """End an attempt, and with it its step, run and ticket, unless the retry policy allows another try.

        ``events`` are the attempt's last events, written before the transitions. ``in_workflow``, from the claim: its
        outputs are packed before the write lock is taken. ``queued`` is called once the request is queued; later
        requests run after it, or in its transaction. ``again``: it was tried before, with these events, and
        maybe written: then there is nothing to do.

        Raises LeaseLost, and changes nothing, when the attempt no longer owns its step. StoreError also when no process
        can be started for the packing.
        """
        packed = None
        outputs = outcome.outputs if isinstance(outcome, Succeeded | Failed) else None
        if in_workflow and outputs is not None and packing.worth_packing(outputs):
            try:
                async with self._packing:
                    packed = await finish_uninterrupted(asyncio.to_thread(self._packer.pack_text, outputs))
            except UsageError as error:
                why = Failed(reason=FailureReason.OUTPUT_INVALID, message=str(error))
                outcome = replace(outcome, outputs=None) if isinstance(outcome, Failed) else why
            except OSError as error:  # no descriptor, no process: the work is done, and can be stored later
                raise StoreError(f"can't pack the outputs of the attempt {attempt_id}: {error}") from error
        request = finish.FinishRequest(
            attempt_id=attempt_id,
            outcome=outcome,
            timings=timings,
            vm_time_ms=vm_time_ms,
            vm_id=vm_id,
            events=tuple(events),
            packed=packed,
            again=again,
        )
        with self._write.at_once():
            written = self._write.submit_batch(self._finisher.finish, request)
            queued()
        await written

    async def last_attempts(self, ticket_id: str, *, limit: int) -> list[AttemptRow]:
        """Of all steps of all its runs, oldest first."""
        return await self._read.call(tickets.last_attempts, ticket_id, limit=limit)

    async def questions(self, ticket_id: str, *, limit: int = 20) -> list[Question]:
        """Of the steps that wait for a person."""
        return await self._read.call(display.questions, ticket_id, limit=limit)

    async def next_steps(self, ticket_id: str, *, limit: int = 5) -> list[NextStep]:
        """Its steps that are ready, and what they wait for."""
        silent = workers.SILENT_AFTER_SECONDS
        return await self._read.call(display.next_steps, ticket_id, limit=limit, silent_seconds=silent)

    async def step_names(self, run_id: str, *, limit: int = 500) -> list[str]:
        return await self._read.call(display.step_names, run_id, limit=limit)

    async def running_attempts(self, *, project_id: str | None = None, limit: int = 100) -> list[RunningAttempt]:
        """Oldest first."""
        return await self._read.call(display.running, project_id=project_id, limit=limit)

    async def attempts_since(self, seconds: float) -> dict[str, int]:
        """How many attempts that began in the last ``seconds`` have ended, by outcome; of some thousand of them."""
        return await self._read.call(display.attempts_since, seconds)

    # --- sandboxes (docs/sandboxes.md) --------------------------------------------------------------------------------

    async def add_sandbox(self, sandbox: Sandbox, *, by: str) -> Sandbox:
        """An engine starts it, or makes it a fork of its ``snapshot_id``. With the id '', it gets one. Raises
        UsageError for one that could never run, Conflict when its id, or the name of a live one of its project, is
        taken, and NotFound for an unknown snapshot."""
        return (await self.add_sandboxes([sandbox], by=by))[0]

    async def add_sandboxes(self, some: Sequence[Sandbox], *, by: str) -> list[Sandbox]:
        """All or none."""
        return await self._write.call(sandboxes.add, [sandboxes.check(one) for one in some], by=by)

    async def sandbox(self, ref: str, *, project_id: str | None = None) -> Sandbox:
        """By id, name, or the beginning of a generated id. Of several with one name, the live one, else the newest.
        With a ``project_id``, here and below, there are no others. Raises NotFound, and Conflict if several are
        meant."""
        return await self._read.call(sandboxes.sandbox, ref, project_id=project_id)

    async def sandbox_page(self, which: SandboxFilter, *, after: str | None = None, limit: int = 50) -> SandboxPage:
        """Newest first. ``after``: from the page before; raises UsageError if no page gave it."""
        return await self._read.call(sandboxes.page, which, after=after, limit=limit)

    async def sandbox_counts(self) -> dict[str, int]:
        """Of those that have not ended, by state."""
        return await self._read.call(sandboxes.counts)

    async def want_sandbox(self, ref: str, wanted: str, *, by: str, project_id: str | None = None) -> Sandbox:
        """Ask for one to be 'running', 'paused' or 'ended', and return it. The engine that holds it learns it from its
        next renewal; one that nobody holds, and that is to end, has ended. Raises NotFound, and Conflict when it has
        ended, or is being ended."""
        return await self._write.call(sandboxes.want, ref, wanted, by=by, project_id=project_id)

    async def remove_sandbox(self, ref: str, *, by: str, project_id: str | None = None) -> Sandbox:
        """Delete the row of one that has ended. Raises NotFound, and Conflict while it has not."""
        return await self._write.call(sandboxes.remove, ref, by=by, project_id=project_id)

    async def sandbox_events(self, id: str, after: int = 0, limit: int = 1000) -> list[Event]:
        """Events with ``seq`` > ``after``, in order."""
        up_to = await self._settled.newest()
        return await self._read.call(events.of_sandbox, id, after=after, up_to=up_to, limit=limit)

    async def sandbox_history(self, id: str, *, limit: int = 200) -> list[Event]:
        """The newest events, newest first."""
        return await self._read.call(events.last_of_sandbox, id, limit=limit)

    async def sandbox_calls(self, id: str, *, limit: int = 200) -> list[ModelCall]:
        """Model calls, newest first."""
        return await self._read.call(display.sandbox_calls, id, limit=limit)

    async def sandboxes_due(self, host: str) -> Due:
        """Is there something to claim for an engine of this host? Else: when a lease or a time to live ends."""
        return await self._read.call(taking.due, host=host, place=self._place(self.vm_memory_mb))

    def _place(self, memory_mb: int | None) -> Places:
        return Places(labels=self.labels, memory_mb=memory_mb, patience_seconds=self._host_timeout_seconds)

    async def claim_sandboxes(
        self,
        worker: str,
        host: str,
        *,
        lease_seconds: float,
        limit: int,
        room: Room | None = None,
        held: Collection[str] = (),
        share: Share | None = None,
    ) -> list[SandboxClaim]:
        """Up to ``limit`` sandboxes for this worker, each under a lease: those that are to be started, and paused ones
        of this host that are wanted running. Each VM must fit into what is left of ``room``; the first that does not
        ends the claim.

        A claim also ends bad rows, with the reason in their `error`; those that nobody holds and that are wanted ended,
        or whose time to live is over; one that can never fit into ``room``. What ran under a lease that expired
        is lost; what was being started or resumed can be claimed again. ``held``: the holds of this worker, whose
        leases are extended if they have run out (a clock that jumped). ``share``: what one project may take; those who
        wait since theirs has it say so in their `error`. When the caller is cancelled, what was claimed goes back."""
        request = Taking(
            worker=worker,
            host=host,
            lease_seconds=lease_seconds,
            room=room,
            share=share,
            place=self._place(room.most_memory_mb if room is not None else None),
        )
        return await self._holders.claim(request, limit=limit, held=held)

    async def renew_sandboxes(
        self, hold_ids: Collection[str], *, lease_seconds: float, used: Collection[str] = ()
    ) -> SandboxRenewal:
        """Extend leases to ``lease_seconds`` from now. Returns (lost, wanted): the VMs of lost holds must go at once.
        ``wanted``: by hold, 'paused', 'ended' (also when its time to live is over), or 'running': somebody is about to
        use it. ``used``: holds of sandboxes that were used since the last renewal."""
        return await self._holders.renew(hold_ids, lease_seconds=lease_seconds, used=used)

    async def sandbox_used(self, hold_ids: Collection[str]) -> None:
        """They were used just now: for display. Holds that are lost are left out."""
        await self._write.call(holding.used, tuple(hold_ids))

    async def sandbox_running(self, hold_id: str, vm_id: int | None) -> None:
        """starting or paused → running. The snapshot of its pause is used up: its row goes. Raises LeaseLost."""
        await self._write.call(holding.running, hold_id, vm_id=vm_id)

    async def sandbox_paused(self, hold_id: str, snapshot: Snapshot, *, why: str | None = None) -> None:
        """running → paused, held by nobody; ``snapshot`` is added, as its pause. Raises LeaseLost."""
        await self._write.call(holding.paused, hold_id, snapshot, why=why)

    async def sandbox_ended(
        self,
        hold_id: str,
        state: SandboxState = SandboxState.ENDED,
        error: str | None = None,
        *,
        why: str | None = None,
    ) -> None:
        """``state``: ENDED, or LOST: then the error also tells of its last snapshot. ``why``: for the event. Raises
        LeaseLost."""
        await self._write.call(holding.ended, hold_id, state=SandboxState(state), error=error, why=why)

    async def sandbox_released(
        self, hold_id: str, *, why: str = "the engine stopped", error: str | None = None
    ) -> None:
        """Give one back that was not started, or not resumed: the next claim takes it; with an ``error``, only when it
        is wanted again. Raises LeaseLost."""
        await self._write.call(holding.released, hold_id, why=why, error=error)

    # --- snapshots ----------------------------------------------------------------------------------------------------

    async def add_snapshot(
        self, snapshot: Snapshot, *, keep_seconds: float | None = None, by: str | None = None
    ) -> Snapshot:
        """To be called once its files are sealed. ``keep_seconds``: it expires then; None: as its ``expires_at`` says.
        ``by``: who made it, for an event. Raises Conflict when one of its project has its name."""
        return await self._write.call(snapshots.add, snapshot, keep_seconds=keep_seconds, by=by)

    async def snapshot(self, ref: str, *, project_id: str | None = None) -> Snapshot:
        """By id, name (the newest), or the beginning of a generated id. Raises NotFound."""
        return await self._read.call(snapshots.snapshot, ref, project_id=project_id)

    async def snapshot_page(self, which: SnapshotFilter, *, after: str | None = None, limit: int = 50) -> SnapshotPage:
        """Of those that have not expired, newest first."""
        return await self._read.call(snapshots.page, which, after=after, limit=limit)

    async def remove_snapshot(self, ref: str, *, by: str, project_id: str | None = None) -> Snapshot:
        """It expires now. Raises NotFound, and Conflict while it is in use."""
        return await self._write.call(snapshots.remove, ref, by=by, project_id=project_id)

    async def expired_snapshots(self, host: str, *, limit: int = 100) -> list[Snapshot]:
        """Those of this host that nobody needs any more: remove their files, then `forget_snapshots`."""
        return await self._read.call(snapshots.expired, host=host, limit=limit)

    async def forget_snapshots(self, ids: Collection[str]) -> None:
        await self._write.call(snapshots.forget, tuple(ids))

    async def snapshot_ids(self, host: str | None) -> set[str]:
        """Of all whose files are to be on this host's disk. One that was just sealed may not be among them yet."""
        return await self._read.call(snapshots.of_host, host)

    # --- artifacts --------------------------------------------------------------------------------------------------

    async def resolve_references(self, text: str) -> str:
        """A step's inputs or outputs, with artifacts in place of references. Raises NotFound when an artifact is gone,
        UsageError when the result is too large."""
        if packing.MARK not in text:
            return text
        found = await self._read.call(artifacts.referred, text)
        async with self._packing:
            return await finish_uninterrupted(asyncio.to_thread(self._packer.resolve, text, found))

    async def artifact(self, digest: str) -> str:
        """The JSON text of the artifact whose digest starts with ``digest``. Raises NotFound."""
        return await self._read.call(artifacts.data, digest)

    async def artifact_of_project(self, digest: str, project_id: str) -> str:
        """The same, by its whole digest, if a ticket of this project uses it. Raises NotFound."""
        return await self._read.call(artifacts.of_project, digest, project_id)

    async def artifact_of(self, ticket_id: str, digest: str) -> str:
        """The text of an artifact, if this ticket uses it. Raises NotFound."""
        return await self._read.call(artifacts.of_ticket, ticket_id, digest)

    async def keep_artifacts(self, ticket_id: str, parts: Mapping[str, str]) -> None:
        """Keep texts by their digests, for as long as this ticket is there. It may be added afterwards."""
        await self._write.call(artifacts.keep, ticket_id, parts)

    async def files(self, ticket_id: str) -> list[LeftFiles]:
        """What its agents left, by step. Raises NotFound."""
        await self.ticket(ticket_id)
        return await self._read.call(events.files, ticket_id)

    async def artifacts(self, *, ticket_id: str | None = None, limit: int = 50) -> list[ArtifactRow]:
        """Those of one ticket, oldest first; without ``ticket_id``, the largest of all."""
        request = artifacts.ListRequest(ticket_id=ticket_id, limit=limit)
        if ticket_id is None:
            return await self._survey.call(artifacts.artifacts, request)
        return await self._read.call(artifacts.artifacts, request)

    # --- events -------------------------------------------------------------------------------------------------------

    async def append(self, new: Sequence[Event] | AppendRequest) -> None:
        """The database sets ``seq`` and ``at``. Events of tickets that don't exist are dropped. One request is written
        once, however often it is tried after a StoreError."""
        request = new if isinstance(new, AppendRequest) else AppendRequest(events=tuple(new))
        if request.events:
            await self._write.call_batch(self._finisher.append, request)

    async def events(self, ticket_id: str | None, after: int = 0, limit: int = 1000) -> list[Event]:
        """Events with ``seq`` > ``after``, in order. ``ticket_id`` None: of all tickets, including deleted ones."""
        up_to = await self._settled.newest()
        return await self._read.call(events.events, ticket_id, after=after, up_to=up_to, limit=limit)

    async def last_event(self, ticket_id: str) -> int:
        """The ``seq`` of its newest event; 0 if it has none."""
        return await self._read.call(events.last_event, ticket_id, up_to=await self._settled.newest())

    async def all_events(
        self, *, after: int, limit: int, project_id: str | None = None, kinds: Sequence[str] = ()
    ) -> tuple[list[Event], int]:
        """Some of the events with ``seq`` > ``after``, in order, and where the next ones begin: ``after`` at the end.
        ``project_id``: only of its tickets that exist. Never reads more than some thousand."""
        return await self._read.call(
            events.all_events,
            after=after,
            up_to=await self._settled.newest(),
            limit=limit,
            project_id=project_id,
            kinds=tuple(kinds),
        )

    async def tickets_with_events(self, after: int | None, *, limit: int) -> tuple[int, Collection[str] | None]:
        """The newest event's ``seq``, and the tickets of those after ``after``; None if it is None, or they are more
        than ``limit``."""
        up_to = await self._settled.newest()
        return await self._read.call(events.tickets_with_events, after=after, up_to=up_to, limit=limit)

    async def output(
        self, ticket_id: str, *, after: int | None = None, before: int | None = None, limit: int = 200
    ) -> tuple[list[Event], bool]:
        """Events of what its agents printed, in order: the first ones after a ``seq``, the last ones before one, or the
        last ones; and whether there are more in that direction."""
        return await self._read.call(display.output, ticket_id, after=after, before=before, limit=limit)

    async def history(self, ticket_id: str, *, limit: int = 200) -> list[Event]:
        """The newest events that are no output, newest first."""
        return await self._read.call(display.history, ticket_id, limit=limit)

    async def newest_event(self) -> int:
        """The ``seq`` of the newest event of all; 0 if there is none."""
        return await self._read.call(events.newest, up_to=await self._settled.newest())

    async def facts(self, *, after: int, limit: int) -> Facts:
        """What the next ``limit`` events say of tickets, attempts and model calls; output is not read."""
        return await self._read.call(facts.facts, after=after, up_to=await self._settled.newest(), limit=limit)

    async def traced(self, ticket_id: str, *, run_id: str | None, limit: int) -> Traced:
        """What a trace tells of a run: so many steps and attempts at most."""
        return await self._read.call(facts.traced, ticket_id, run_id=run_id, limit=limit)

    async def position(self, name: str) -> int:
        """Up to which event this follower is done. A new one begins with the next event."""
        if (found := await self._read.call(facts.position, name)) is None:
            await self._write.call(facts.begin, name)
            found = await self._read.call(facts.position, name)
        return found or 0

    async def set_position(self, name: str, seq: int) -> None:
        await self._write.call(facts.move, name, seq)

    async def backlog(self) -> Backlog:
        return await self._read.call(facts.backlog)

    def use(self) -> dict[str, dict[str, float]]:
        """What 'write' and 'read' have done so far: see `threads.Use`."""
        return {"write": self._write.use.numbers(), "read": self._read.use.numbers()}

    async def record(self, did: str, *, by: str, **details: Any) -> None:
        """An event of a change that is of no ticket, such as 'agent.add': who, and what else is to be known."""
        await self._write.call(events.record, did, by=by, **details)

    async def audit(self, judge: Callable[[audit.Audit], T], *, since: str = "") -> T:
        """The result of ``judge``, which runs on the reading thread, in one transaction. ``since``: ISO-8601."""
        return await self._read.call(lambda tx: judge(audit.Audit(tx, since)))

    async def prune(self, older_than_seconds: float) -> int:
        """Delete older events of tickets and sandboxes that have ended, and the rows of such sandboxes. Returns how
        many events."""
        removed, after = 0, 0
        while True:
            batch = await self._write.call(events.prune, older_than_seconds=older_than_seconds, after=after)
            removed += batch.removed
            if batch.after is None:
                await self._write.call(artifacts.sweep, None)
                await self._write.call(packages.sweep)
                while await self._write.call(sandboxes.prune, older_than_seconds=older_than_seconds):
                    pass
                return removed
            after = batch.after

    # --- model calls (swarm.ledger.Ledger) ----------------------------------------------------------------------------

    async def reserve(self, order: Order) -> Reservation:
        """Reserve what a model call may cost in every budget that it counts against. Raises NotFound and LeaseLost."""
        return await self._write.call(spending.reserve, order)

    async def book(self, bill: Bill) -> None:
        """Replace a reservation by the actual cost. A second call with the same bill changes nothing."""
        await self._write.call(spending.book, bill)

    async def costs(self, by: spending.By, *, since: str = "", limit: int = (1 << 63) - 1) -> list[spending.Costs]:
        """Sums of the model calls since then (ISO-8601): the ``limit`` dearest."""
        return await self._survey.call(spending.costs, by, since=since, limit=limit)

    async def sandbox_costs(self, id: str) -> spending.Costs | None:
        """Of one sandbox, over all its life; None if it has called no model."""
        return await self._read.call(spending.of_sandbox, id)

    async def recent_costs(self, *, since: str, before: str = "9", most: int) -> list[spending.Spent]:
        """Sums of the newest ``most`` model calls of a range."""
        return await self._read.call(spending.recent, since=since, before=before, most=most)

    async def estimates(self, ticket_id: str) -> tuple[int, float]:
        """How many of a ticket's model calls are estimates, and their USD."""
        return await self._read.call(spending.estimates, ticket_id)

    async def model_calls(self, ticket_id: str, *, limit: int = 200) -> list[ModelCall]:
        """Newest first."""
        return await self._read.call(display.calls, ticket_id, limit=limit)

    # --- secrets, sealed (swarm.admin.vault) --------------------------------------------------------------------------

    async def put_secret(self, secret: Sealed, *, by: str | None = None) -> None:
        await self._write.call(secrets.put, secret, by=by)

    async def secrets(self) -> list[SecretRow]:
        return await self._read.call(secrets.secrets)

    async def sealed_secrets(self, names: Sequence[str]) -> list[Sealed]:
        """Secrets with these names, in all scopes."""
        return await self._read.call(secrets.of_names, tuple(names))

    async def remove_secret(self, name: str, scope: str, *, by: str | None = None) -> None:
        """Raises NotFound."""
        await self._write.call(secrets.remove, name, scope, by=by)

    # --- who may call the API (swarm.api.auth) ------------------------------------------------------------------------

    async def add_token(
        self, token: str, actor: Actor, *, by: str, kind: str = "token", expires_seconds: float | None = None
    ) -> None:
        """``kind``: 'token', or 'link', which is worth one session. Raises Conflict if a token has this name."""
        await self._write.call(tokens.add, token, actor, kind=kind, by=by, expires_seconds=expires_seconds)

    async def token_holder(self, token: str) -> Actor | None:
        """Of a token or session that is known and has not expired."""
        found = await self._read.call(tokens.find, token)
        if found is None:
            return None
        actor, id, stale = found
        if stale and id not in self._tokens_used:  # nobody waits for that: reading needs no write lock, nor a free disk
            self._tokens_used.add(id)
            # Later: else what the request itself writes would wait behind this, for the lock of another program twice.
            asyncio.get_running_loop().call_later(_USED_AFTER_SECONDS, self._note_use, id)
        return actor

    def _note_use(self, id: str) -> None:
        if not self._write.closed:
            using = self._write.submit_batch(tokens.use, id)
            using.add_done_callback(lambda _: self._tokens_used.discard(id))
            using.add_done_callback(_ignore)

    async def may_log_in(self, given: str) -> Actor | None:
        """Whose a link or a token is, without using it up."""
        return await self._read.call(tokens.may_log_in, given)

    async def tokens(self) -> list[TokenRow]:
        return await self._read.call(tokens.tokens)

    async def revoke_token(self, ref: str, *, by: str) -> TokenRow:
        """By id: a token and the sessions that it began, or one session. By name: all of that name. Raises NotFound."""
        return await self._write.call(tokens.revoke, ref, by=by)

    async def open_session(self, given: str, session: str) -> Actor | None:
        """Make ``session`` valid, in exchange for a link, which is then worth nothing more, or a token. None if what
        was given is neither."""
        return await self._write.call(tokens.open_session, given, session)

    async def close_session(self, session: str) -> None:
        await self._write.call(tokens.close_session, session)

    # --- who is told (swarm.api.notices) ------------------------------------------------------------------------------

    async def add_notice(self, *, url: str, kinds: Sequence[NoticeKind], project_id: str | None, by: str) -> NoticeRow:
        """Of what happens from now on. Raises Conflict when there are too many."""
        row = await self._write.call(notices.add, url=url, kinds=kinds, project_id=project_id, by=by)
        await self.position(notices.position_of(row.id))
        return row

    async def notices(self) -> list[NoticeRow]:
        return await self._read.call(notices.notices)

    async def notice(self, ref: str) -> NoticeRow:
        """By id, or its beginning. Raises NotFound."""
        return await self._read.call(notices.notice, ref)

    async def remove_notice(self, ref: str, *, by: str) -> NoticeRow:
        """Raises NotFound."""
        return await self._write.call(notices.remove, ref, by=by)

    async def note_notice(self, id: str, error: str | None) -> None:
        """How the last try ended; None: it was taken."""
        await self._write.call(notices.note, id, error)

    # --- agents, workflows, workers -----------------------------------------------------------------------------------

    async def put_agent(
        self, agent: Agent, *, package: Package | None = None, replace: bool = False, by: str | None = None
    ) -> Agent:
        """Register. Raises Conflict when its name and version are registered with another id; with other content, too,
        unless it may ``replace`` that. ``package``: its files, for other hosts. ``by``, here and below: who changes it,
        for an event."""
        return await self._write.call(packages.add, agent, package, replace=replace, by=by)

    async def keep_package(self, name: str, package: Package) -> None:
        """The files of a registered agent, which is added on this host: ``name`` is that of their directory."""
        await self._write.call(packages.keep, name, package)

    async def packages(self) -> set[str]:
        """The names of those that are kept."""
        return await self._read.call(packages.names)

    async def package(self, name: str, number: int) -> str | None:
        """A part of an agent's files; None if there is none. Raises UsageError if others may have written it."""
        found = await self._read.call(packages.part, name, number)
        if found is not None and not await asyncio.to_thread(self._db.is_own):
            raise UsageError(
                f"its files are not on this host, and of those in {self._db.place} none are made, since other users "
                "may write there"
            )
        return found

    async def sweep_packages(self) -> None:
        """Delete files of agents that are not registered any more."""
        await self._write.call(packages.sweep)

    async def agent(self, ref: str) -> Agent:
        """By id, name, name@1 or name@1.0.0. Raises NotFound."""
        return await self._read.call(agents.agent, ref)

    async def agents(self, *, broken: bool = True) -> list[Agent]:
        """Raises StoreError for the first broken row; with ``broken`` False, broken rows are left out."""
        return await self._read.call(agents.agents, broken=broken)

    async def remove_agent(self, ref: str, *, by: str | None = None) -> Agent:
        """Unregister and return an agent. Raises NotFound, and Conflict while a ticket or sandbox that has not ended
        needs it."""
        return await self._write.call(packages.remove, ref, by=by)

    async def move_agents(self, old: Path, new: Path) -> None:
        """The agents' files are in another directory now."""
        await self._write.call(agents.move, old, new)

    async def put_workflow(self, workflow: Workflow, *, by: str | None = None) -> WorkflowRow:
        """Register. Raises Conflict when its name and version are registered with other content."""
        return await self._write.call(workflows.put_workflow, workflow, by=by)

    async def workflow(self, ref: str) -> WorkflowRow:
        """By id, name, name@1 or name@1.0.0. Raises NotFound."""
        return await self._read.call(workflows.workflow, ref)

    async def workflows(self) -> list[WorkflowRow]:
        return await self._read.call(workflows.workflows)

    async def remove_workflow(self, ref: str, *, by: str | None = None) -> WorkflowRow:
        """Unregister and return a workflow. Raises NotFound, and Conflict while a ticket that has not ended needs it,
        or a schedule starts it."""
        return await self._write.call(workflows.remove, ref, by=by)

    async def enable_workflow(self, ref: str, *, enabled: bool, by: str) -> WorkflowRow:
        """Raises NotFound."""
        return await self._write.call(workflows.enable, ref, enabled=enabled, by=by)

    async def schedules(self) -> list[ScheduleRow]:
        """Those of the newest version of each workflow."""
        return await self._read.call(schedules.schedules)

    async def due_schedules(self) -> DueSchedules:
        """The schedules that are due, and the time until the next one is. Outdated rows are synchronised first."""
        found = await self._read.call(schedules.due)
        if found.stale:
            try:
                await self._write.call(schedules.sync_schedules)
            except ChangeRefused:
                return found  # the others are due nevertheless
            found = await self._read.call(schedules.due)
        return found

    async def fire_schedule(self, request: FireRequest) -> bool:
        """Create its tickets and set its next time. False if it has changed, or another engine did it first."""
        return await self._write.call(schedules.fire, request)

    async def call_webhook(self, call: WebhookCall) -> WebhookAnswer:
        """Create the ticket of a request, or return the one that it created before. Raises Conflict for a key that was
        used with another body."""
        return await self._write.call(webhooks.call, call)

    async def this_host(self) -> str:
        """What rows say for this machine: the name that it was registered with. Nothing else knows it. Before an engine
        ran here: the operating system's."""
        if not self._host and self._host_id is not None:
            self._host = await self._read.call(hosts.name_of, self._host_id)
        return self.here

    @property
    def here(self) -> str:
        """The same, once it was asked for, or the host registered."""
        return self._host or socket.gethostname()

    async def register_host(self, machine: Machine) -> HostState:
        """Say that an engine starts on this machine. Raises Conflict if another one that is alive has its id; whether
        one is that was heard of a moment ago, or was this one before it booted, takes some seconds to tell."""
        first: Alive | None = None
        while isinstance(found := await self._write.call(hosts.register, machine), Alive):
            if first is not None and found.heard > first.heard:
                raise Conflict(
                    f"another machine that is alive has the id of this host, {found.name} ({machine.id}): if the disk "
                    "was cloned, remove the file host-id in the state directory of the clone, and start again"
                )
            first = first or found
            await asyncio.sleep(_HOST_LOOK_SECONDS)
        self._host_id, self._host, self._machine = machine.id, found.name, machine
        return found

    async def heartbeat(self, worker: str, *, host: str, pid: int, info: Mapping[str, Any]) -> HostState:
        """Record that a worker lives, and what it does: for display, leases decide. Returns what is wanted of its host,
        which is registered again if somebody removed it."""
        call = self._write.call(hosts.heartbeat, worker, host=host, pid=pid, info=info, machine=self._machine)
        found: HostState | None = await call
        if found is None and self._machine is not None:
            return await self.register_host(self._machine)
        return found or HostState(name=host)

    async def hosts(self) -> list[HostRow]:
        return await self._read.call(hosts.hosts)

    async def host(self, ref: str) -> HostRow:
        """By name, id, or how the id begins. Raises NotFound, Conflict."""
        return await self._read.call(hosts.host, ref)

    async def drain_host(self, ref: str, *, by: str, within_seconds: float | None = None) -> HostRow:
        """See `hosts.drain`. Raises NotFound, Conflict."""
        return await self._write.call(hosts.drain, ref, by=by, within_seconds=within_seconds)

    async def undrain_host(self, ref: str, *, by: str) -> HostRow:
        """Let its engines take work again. Raises NotFound, Conflict."""
        return await self._write.call(hosts.undrain, ref, by=by)

    async def host_holds(self, name: str) -> Holds:
        return await self._read.call(hosts.holds, name)

    async def remove_host(self, ref: str, *, by: str, force: bool = False) -> tuple[HostRow, Holds]:
        """See `hosts.remove`. Raises NotFound, Conflict."""
        return await self._write.call(hosts.remove, ref, by=by, force=force)

    async def announce_files(self, address: str, key: str, files: Sequence[HostFile]) -> None:
        """This host hands out these images and layers, and no others. ``key``: see `swarm.vm.image.elsewhere`."""
        await self._write.call(host_files.announce, await self.this_host(), address, key, files)

    async def withdraw_files(self) -> None:
        """This host hands out none."""
        host = await self.this_host()
        if await self._read.call(host_files.offered, host):
            await self._write.call(host_files.withdraw, host)

    async def offered_files(self, kind: str, wanted: str) -> list[Offer]:
        """What other hosts have of it: see `host_files.offers`. None if others may have written it."""
        found = await self._read.call(host_files.offers, kind, wanted, here=await self.this_host())
        return found if not found or await asyncio.to_thread(self._db.is_own) else []

    async def workers(self) -> list[WorkerRow]:
        return await self._read.call(workers.workers)

    async def bury_dead_workers(self) -> list[str]:
        """Take over from the workers of this host that have ended without a word: their leases end now. Returns their
        names."""
        if dead := await self._read.call(workers.dead):
            await self._write.call(workers.bury, tuple(dead))
        return dead

    async def forget_worker(self, worker: str) -> None:
        await self._write.call(workers.forget_worker, worker)


def _ignore(future: asyncio.Future[Any]) -> None:
    """Retrieve the exception, so that asyncio does not report it: the lease ends anyway."""
    _ = future.cancelled() or future.exception()
