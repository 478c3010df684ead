"""Claim: one transaction that sweeps expired leases, turns ready tickets into runs and steps, fails bad rows, and makes
the first `limit` steps by priority and age attempts of one worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from swarm.errors import StoreError, SwarmError
from swarm.model import Agent, Claim, StepStatus, TicketState
from swarm.store.claims import kept, ready, suspects
from swarm.store.claims.finish import sweep
from swarm.store.claims.maintenance import AT_ONCE, Maintenance, fail_made_ready, fail_row, has_clean_id
from swarm.store.claims.pace import Pace
from swarm.store.claims.ready import Candidate
from swarm.store.claims.request import Claimed, ClaimRequest
from swarm.store.registry import workflows
from swarm.store.registry.agents import NAMES
from swarm.store.runs.workflow_engine import WorkflowEngine
from swarm.store.sql.conditions import UNKNOWN_STATE
from swarm.store.sql.database import HEAD, other_revision
from swarm.store.sql.dialect import Sql
from swarm.store.sql.reads import Read, chars
from swarm.store.sql.rows import READ_BYTES, flag, ids_in_order, iso, milliseconds
from swarm.store.sql.transaction import Row, Tx, one_row
from swarm.store.tickets import dependencies, elsewhere, validation
from swarm.store.tickets.changes import INSERT_ATTEMPT, Changes
from swarm.store.tickets.places import Places
from swarm.store.tickets.room import Room
from swarm.store.tickets.validation import BadRow, Work

BAD_ROWS: Final = 1000  # at most in one transaction; the next claim handles the others
HINTS: Final = 20
ASIDE: Final = 64  # kinds of VMs that are not waited for, in one claim
DELAYED: Final = Sql(
    "SELECT s.id, r.ticket_id FROM step_executions s JOIN workflow_runs r ON r.id = s.run_id "
    "WHERE s.status = 'ready' AND s.available_at IS NOT NULL AND s.available_at <= :now_ms"
)
RELEASE: Final = Sql("UPDATE step_executions SET available_at = NULL WHERE id = :id")
RELEASE_DELAYED: Final = Sql(
    "UPDATE step_executions SET available_at = NULL "
    "WHERE status = 'ready' AND available_at IS NOT NULL AND available_at <= :now_ms"
)
UNKNOWN_STATES: Final = Sql(f"SELECT id, state FROM tickets WHERE {UNKNOWN_STATE} LIMIT :limit")
INSERT_RUN: Final = one_row(
    "INSERT INTO workflow_runs (id, ticket_id, status, trigger_type, trigger_data, started_at) "
    "VALUES (:run_id, :ticket_id, 'running', :trigger_type, :trigger_data, :now)"
)
INSERT_STEP: Final = one_row(
    "INSERT INTO step_executions (id, run_id, step_id, agent_id, agent_name, agent_version, status, attempt_id, "
    "inputs, queued_at, started_at, max_attempts, timeout_seconds, priority, ticket_created_at) "
    "VALUES (:step_execution_id, :run_id, 'main', :agent_id, :agent_name, :agent_version, 'running', :attempt_id, "
    ":inputs, :queued_at, :now, :max_attempts, :timeout_seconds, :priority, :ticket_created_at)"
)
START_STEP: Final = one_row(
    "UPDATE step_executions SET status = 'running', attempt_id = :attempt_id, started_at = :now, error = NULL "
    "WHERE id = :step_execution_id"
)
START_TICKET: Final = one_row(
    "UPDATE tickets SET state = 'in_progress', run_id = :run_id, started_at = :now, completed_at = NULL, error = NULL, "
    "outputs = NULL, updated_at = :now WHERE id = :id"
)
_STARTED: Final[Mapping[str, Any]] = {"state": str(TicketState.IN_PROGRESS), "outputs": None, "error": None}
FAIL_STEP: Final = one_row(
    "UPDATE step_executions SET status = 'failed', error = :error, completed_at = :now, available_at = NULL "
    "WHERE id = :id"
)


class Claimer:
    """Claims for one process, on the writing thread. Its state is a cache, nothing more."""

    def __init__(self, workflows: WorkflowEngine) -> None:
        self.workflows = workflows
        self.maintenance = Maintenance()
        self.pace = Pace()
        self.last = list[str]()  # the workflow that began last, as its ticket named it: most likely the next one's too

    def claim(self, tx: Tx, requests: Sequence[ClaimRequest]) -> Sequence[Claimed | SwarmError]:
        return [self._one(tx, request) for request in requests]

    def _one(self, tx: Tx, request: ClaimRequest) -> Claimed | SwarmError:
        with self.workflows.isolation.of(tx) as changes:
            return _ClaimTransaction(self, tx, request, changes).run()


class _ClaimTransaction:
    """One claim, in one transaction."""

    def __init__(self, claimer: Claimer, tx: Tx, request: ClaimRequest, changes: Changes) -> None:
        self.claimer, self.tx, self.request, self.changes = claimer, tx, request, changes
        self.result, self.bad_rows = Claimed(), 0
        self.room = replace(request.room) if request.room is not None else Room()  # less what this claim takes
        self.deferred = 0  # workflows that begin once their first decision is made, outside the transaction
        # The next step in turn lacks room, or must run alone. Those behind it wait too, lest it be starved.
        self.full = False
        self.places = Places(
            labels=request.labels,
            memory_mb=self.room.most_memory_mb,
            patience_seconds=request.host_timeout_seconds,
        )
        self.aside = set[str]()  # kinds of VMs that others are not to wait for
        self.left_out: tuple[str, ...] = ()  # of the candidates that were read last
        self.cut = False  # rows are too long to read all of them in one transaction

    def run(self) -> Claimed | SwarmError:
        if self.tx.joined and self.tx.knows_time and self.request.ticket_id is None:
            self.tx.ahead(self._expected())
        probed = self.tx.first(ready.probe(self.tx.dialect))
        assert probed is not None
        if probed.revision != HEAD:
            return other_revision(probed.revision)
        if not self.tx.knows_time:
            self.tx.now_ms = probed.now_ms
        self.ids = ids_in_order(self.tx.now_ms)
        self.dependencies = bool(probed.dependencies)
        self.steps = bool(probed.steps or probed.expired or probed.due or probed.runs)
        if probed.expired:
            sweep(self.changes, self.claimer.maintenance, self.request.held, self.request.lease_seconds)
        if probed.due:
            self._release_delayed()
        if probed.runs:
            self.result.undecided += self.claimer.workflows.process_due(self.changes)
        self._advance()
        if probed.marked:
            elsewhere.read(self.changes, self.places)
        if probed.unknown_states:
            for row in self.changes.each(self.tx.all(UNKNOWN_STATES, limit=AT_ONCE), lambda row: row.id):
                fail_row(self.changes, row, validation.unknown_state(row.state))
        self._claim(probed.written_by_others)
        dependencies.release(self.changes)
        if self.places.marked:
            self.changes.flush()
            elsewhere.read(self.changes, self.places)  # from now on a host is waited for
        return self.result

    def _expected(self) -> Iterator[Read]:
        """What this claim will most likely read first: behind an end, no duty is due."""
        yield ready.probe(self.tx.dialect), {}
        for found in ready.reads(**self._asked(self._most(self.request.limit), steps=True)):
            yield from found

    def _release_delayed(self) -> None:
        if self.changes.isolating:
            for row in self.changes.each(self.tx.all(DELAYED, now_ms=self.tx.now_ms), lambda row: row.ticket_id):
                self.changes.add(RELEASE, id=row.id)
        else:
            self.tx.run(RELEASE_DELAYED, now_ms=self.tx.now_ms)

    def _claim(self, written_by_others: int) -> None:
        """Round by round, until the limit is reached or nothing is left; with maintenance when it is due."""
        maintenance, only_one = self.claimer.maintenance, self.request.ticket_id is not None
        maintained = self.tx.joined and not only_one  # upkeep needs an exact one: the ends before would run again
        if not maintained and maintenance.due(written_by_others, idle=False, required=False):
            maintenance.run(self.changes, written_by_others)  # reads much: not after the claims, under the lock
        while (missing := self.request.limit - len(self.result.claims) - self.deferred) > 0:
            if self.bad_rows >= BAD_ROWS:
                self.result.more = True
                break
            more = self._round(missing)
            if self.full:
                break
            if len(self.aside) > len(self.left_out):
                continue  # others are behind these
            if self.cut:
                self.result.more = True
                break
            if more:
                continue
            if self.result.claims and not only_one:
                return  # hand these out first; the next claim, which finds nothing, does the maintenance
            if maintained or not maintenance.due(written_by_others, idle=True, required=only_one):
                break
            maintained = True
            if not maintenance.run(self.changes, written_by_others, required=only_one):
                break

    def _advance(self) -> None:
        """Advance the workflows with ended steps, which may make other steps ready."""
        if self.changes.pending_runs:
            self.steps = True
            deferred = self.claimer.workflows.advance_workflows(self.changes, take_up=True)
            self.deferred += len(deferred)
            self.result.undecided += deferred

    def _round(self, missing: int) -> bool:
        """Claim from the next candidates; False when no others are behind them."""
        limit = self._most(missing)
        read = self._candidates(limit)
        candidates = self.changes.kept(read, Candidate.ticket_id)
        if not candidates:
            return False
        tickets = [one.row.id for one in read if not one.is_step]
        ids = [id for id in tickets if has_clean_id(id)] if self.dependencies else []
        waits = dependencies.check(self.tx, ids) if ids else {}
        works: list[tuple[Candidate, Work]] = []
        for candidate in self.changes.each(candidates, Candidate.ticket_id):
            row = candidate.row
            try:
                if candidate.is_step:
                    if (work := self._step(row)) is not None:
                        works.append((candidate, work))
                elif row.id in waits:
                    self._wait(row, waits[row.id])
                else:
                    if (patience := self.request.queue_timeout_seconds) is not None:
                        validation.check_age(row, self.tx.now_ms, patience)
                    works.append((candidate, candidate.work()))
            except BadRow as error:
                self._refuse(candidate, error)
        self._start(works, missing)
        self.changes.flush()
        pending_runs = bool(self.changes.pending_runs)
        self._advance()
        most = max(len(tickets), len(read) - len(tickets))
        return pending_runs or self.request.ticket_id is not None or most >= limit

    def _most(self, missing: int) -> int:
        return max(missing, min(self.bad_rows, AT_ONCE), BAD_ROWS if self.changes.isolating else 0)

    def _which(self) -> dict[str, Any]:
        since = iso(self.tx.now_ms - round(self.request.host_timeout_seconds * 1000))
        which = {"idle": self._idle, "drain": self.request.drain, "host": self.request.host}
        return which | {"patient_since": self._patient_since, "silent_since": since}

    def _asked(self, limit: int, *, steps: bool) -> dict[str, Any]:
        """Of `ready.first`. In isolation it looks behind those that it skips."""
        pace, marks = None if self.changes.isolating else self.claimer.pace, self.places.here + self.places.given_up
        which, but = self._which(), self.left_out
        return {"which": which, "limit": limit, "steps": steps, "pace": pace, "but": but, "marks": marks}

    def _candidates(self, limit: int) -> list[Candidate]:
        """Tickets, and steps of runs that have begun; suspects only if they can run, or no longer wait patiently."""
        if (one := self.request.ticket_id) is not None:
            steps = self.tx.all(ready.READY_STEP, id=one, limit=limit, **self._which()) if self.steps else []
            found = [Candidate(row, is_step=False) for row in self.tx.all(ready.READY_TICKET, id=one)]
            return sorted([*found, *(Candidate(row, is_step=True) for row in steps)], key=Candidate.turn)
        self.left_out = tuple(self.aside)
        expected = [] if self.tx.joined else [*map(workflows.by_id, self.claimer.last)]  # behind an end follow steps
        found, self.cut = ready.first(self.tx, **self._asked(limit, steps=self.steps), expected=expected)
        return found

    @property
    def _idle(self) -> bool:
        return self.request.idle and not self.result.claims

    @property
    def _patient_since(self) -> str:
        return iso(self.tx.now_ms - round(suspects.PATIENCE_SECONDS * 1000))

    def _step(self, row: Row) -> Work | None:
        """A ready step of a run that has begun; None if another tool took its ticket: then the step ends too."""
        if row.ticket is None:
            self.changes.delete_runs([row.run_id])
        elif row.state not in (TicketState.IN_PROGRESS, TicketState.WAITING) or row.ticket_run != row.root_run:
            self.changes.cancel_runs(self.changes.whole_runs([row]), error="the ticket was changed from outside")
        elif row.taken:
            fail_made_ready(self.changes, row)
        else:
            ticket = kept.checked(row, self.request.host, self.request.host_timeout_seconds)
            inputs = row.step_inputs or ("{}" if row.definition else validation.read_inputs(ticket.inputs))
            return Work(ticket=ticket, agent_id=row.step_agent_id or "", inputs=inputs)
        self.bad_rows, self.claimer.maintenance.has_more = self.bad_rows + 1, True
        return None

    def _wait(self, row: Row, error: str | None) -> None:
        self.bad_rows += 1
        if error is not None:
            fail_row(self.changes, row, error)
        else:
            self.changes.set_ticket(row.id, TicketState.READY, TicketState.BLOCKED)
            self.claimer.maintenance.has_more = True

    def _refuse(self, candidate: Candidate, error: BadRow) -> None:
        self.bad_rows += 1
        row = candidate.row
        if candidate.in_workflow:
            self._fail_step(row, str(error))
            return
        if candidate.is_step:
            self.changes.cancel_runs([row.run_id], error=str(error))
        else:
            self._end_former(row)
            self.claimer.pace.note(self.tx, max(ready.size(row), chars(row)))
        fail_row(self.changes, row, str(error))

    def _fail_step(self, row: Row, error: str) -> None:  # in a workflow: its run decides what follows
        self.tx.exact()  # its ticket is not locked
        self.changes.add(FAIL_STEP, id=row.step_execution_id, error=error, now=self.tx.now)
        step = {"ticket_id": row.ticket_id, "step_id": row.step_id}
        self.changes.transition("step", StepStatus.READY, StepStatus.FAILED, **step, error=error)
        self.changes.pending_runs.setdefault(row.run_id, []).append(row.step_id.removeprefix(row.path))

    def _start(self, works: Sequence[tuple[Candidate, Work]], missing: int) -> None:
        agents = self.claimer.workflows.agents.load(self.tx, {work.agent_id for _, work in works if work.agent_id})
        for candidate, work in self.changes.each(works, lambda one: one[0].ticket_id()):
            try:
                if not work.agent_id and not candidate.is_step:
                    if missing and not self.full:
                        self._begin(candidate.row, work)
                        missing -= 1
                    continue
                agent = self._agent(work, agents)
                if candidate.is_step and candidate.row.from_step is not None:
                    agent = kept.sized(agent, candidate.row)
                if self._is_for_another_host(candidate, work, agent):
                    continue
                if never := self.room.never(agent.memory_mb, agent.disk_mb):
                    raise validation.too_big(agent, never)
                if not_now := self.room.not_now(agent.disk_mb):
                    self._set_aside(candidate, work, agent, not_now)
                    continue
            except BadRow as error:
                self._refuse(candidate, error)
                continue
            suspect = candidate.is_step and candidate.row.losses >= suspects.SUSPECT_AFTER
            if suspect and not self._idle:
                self.full |= self.request.drain and str(candidate.row.queued_at) <= self._patient_since
                continue
            if not self.full and (lacks := self.room.lacks(agent.memory_mb, agent.disk_mb)):
                self.full = True
                if self.request.room is not None and not self.result.claims:
                    self.request.room.waits_for = lacks
            if missing and not self.full:
                missing -= 1
                self.room.take(agent.memory_mb, agent.disk_mb)
                self.result.claims.append(self._attempt(candidate, work, agent, alone=suspect))
                self.full |= suspect

    def _is_for_another_host(self, candidate: Candidate, work: Work, agent: Agent) -> bool:
        """It is marked with what it lacks here, and waits for a host that has it. Raises BadRow."""
        row, is_step = candidate.row, candidate.is_step
        requires = elsewhere.required(agent.requires, row.step_requires if is_step else None, work.ticket.requires)
        mark = elsewhere.mark(self.tx, requires, agent.memory_mb, self.places)
        if mark is None:
            return False
        if row.waits_for != mark:
            statement = elsewhere.MARK_STEP if is_step else elsewhere.MARK_TICKET
            self.changes.add(statement, id=row.step_execution_id if is_step else row.id, mark=mark)
            self.places.marked = True
        self.full |= self.request.ticket_id is not None
        return True

    def _set_aside(self, candidate: Candidate, work: Work, agent: Agent, why: str) -> None:
        """It waits, and nobody waits for it: other files fill the disk, and nobody knows for how long. Raises BadRow if
        too many kinds of VMs do so, or if no statement can leave it out."""
        kind = candidate.kind(work.agent_id)
        if kind in self.left_out or (kind not in self.aside and len(self.aside) >= ASIDE):
            raise validation.too_big(agent, why)
        self.aside.add(kind)
        self.full |= self.request.ticket_id is not None
        if self.request.room is not None:
            self.request.room.full_disk = f"disk: the next one {why}"

    def _begin(self, row: Row, work: Work) -> None:
        """The run of a workflow; its first steps are claimed in the next round, when it is their turn."""
        wanted, ticket = work.ticket.workflow_id or "", work.ticket
        self.claimer.last = [wanted]
        found = workflows.find(self.tx, wanted, once=True)
        if found is None:
            raise validation.unknown("workflow", wanted, self._names(workflows.NAMES))
        if not flag(found.enabled):
            raise validation.disabled_workflow(found.name, found.version)
        self._end_former(row)
        run_id = self.claimer.workflows.begin(self.changes, ticket, found)
        self._start_ticket(row, ticket.id, run_id)

    def _start_ticket(self, row: Row, ticket_id: str, run_id: str) -> None:
        self.claimer.pace.note(self.tx, ready.size(row))
        self.changes.add(START_TICKET, id=ticket_id, run_id=run_id, now=self.tx.now)
        self.changes.transition("ticket", TicketState.READY, TicketState.IN_PROGRESS, ticket_id=ticket_id)

    def _end_former(self, row: Row) -> None:
        if row.live_run is not None:
            self.changes.end_former(row.id, row.live_run)

    def _agent(self, work: Work, agents: Mapping[str, Agent | StoreError]) -> Agent:
        if (agent := agents.get(work.agent_id)) is None:
            raise validation.unknown("agent", work.agent_id, self._names(NAMES))
        if isinstance(agent, StoreError):
            raise BadRow(str(agent))
        return agent

    def _names(self, statement: Sql) -> list[str]:
        """For a hint; not for each of a thousand bad rows, under the write lock."""
        return [row.name for row in self.tx.all(statement)] if self.bad_rows < HINTS else []

    def _attempt(self, candidate: Candidate, work: Work, agent: Agent, *, alone: bool) -> Claim:
        row, ticket = candidate.row, work.ticket
        add, now, now_ms = self.changes.add, self.tx.now, self.tx.now_ms
        attempt_id = next(self.ids)
        if candidate.is_step:
            run_id, step_execution_id, step_id = row.run_id, row.step_execution_id, row.step_id
            number, queued_at = row.tries + 1, row.queued_at
            timeout_seconds = row.step_timeout_seconds or validation.timeout_of(ticket, agent)
            add(START_STEP, attempt_id=attempt_id, now=now, step_execution_id=step_execution_id)
        else:
            self._end_former(row)
            run_id, step_execution_id, step_id, number = next(self.ids), next(self.ids), "main", 1
            queued_at = max(ticket.created_at or "", ticket.updated_at or "") or now
            timeout_seconds = validation.timeout_of(ticket, agent)
            trigger = {"trigger_type": ticket.trigger_type or "ticket", "trigger_data": ticket.trigger_data}
            add(INSERT_RUN, run_id=run_id, ticket_id=ticket.id, **trigger, now=now)
            add(
                INSERT_STEP,
                step_execution_id=step_execution_id,
                run_id=run_id,
                agent_id=agent.id,
                agent_name=agent.name,
                agent_version=agent.version,
                attempt_id=attempt_id,
                inputs=work.inputs if len(work.inputs) <= READ_BYTES else None,  # else the ticket has them
                queued_at=queued_at,
                now=now,
                max_attempts=validation.max_attempts_of(ticket, agent),
                timeout_seconds=timeout_seconds,
                priority=ticket.priority,
                ticket_created_at=ticket.created_at,
            )
            self._start_ticket(row, ticket.id, run_id)
        tried = {"number": number, "worker": self.request.worker}
        add(
            INSERT_ATTEMPT,
            id=attempt_id,
            step_execution_id=step_execution_id,
            **tried,
            lease_until=now_ms + round(self.request.lease_seconds * 1000),
            reason=suspects.ALONE if alone else None,
            now=now,
        )
        ids = {"ticket_id": ticket.id, "step_id": step_id, "attempt_id": attempt_id}
        self.changes.transition("step", StepStatus.READY, StepStatus.RUNNING, **ids, **tried, alone=alone or None)
        since = milliseconds(queued_at)
        return Claim(
            attempt_id=attempt_id,
            attempt_number=number,
            step_execution_id=step_execution_id,
            step_id=step_id,
            run_id=run_id,
            ticket=replace(ticket, **_STARTED, run_id=run_id, started_at=now),
            agent=agent,
            inputs=work.inputs,
            timeout_seconds=timeout_seconds,
            queued_ms=float(max(0, now_ms - since)) if since is not None else 0.0,
            in_workflow=candidate.in_workflow,
            alone=alone,
            **kept.of(row if candidate.is_step else None, ticket, agent),
        )
