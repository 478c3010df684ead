"""Replays the event log and compares it with the rows: was anything lost, done twice or leaked?

The log has what happened in which order, the rows have the present state. Each violation names its ticket. Changes that
other programs may make in plain SQL (take a ticket back, end it, delete it) are not violations, and neither is anything
that would need events that were pruned or lie before ``since``. Where the log shows that another program changed rows
that only Swarm writes (the log has a step's end, say, and its row another one), it is told apart: `changed_by_others`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from swarm.admin.prove_sandboxes import Histories
from swarm.model import TERMINAL_TICKET_STATES, AttemptOutcome, RunStatus, SandboxState, StepStatus, TicketState
from swarm.store.audit import AttemptFact, LogEntry, SandboxFact, StepFact, TicketFact

# A worker that lost a lease learns of it within a second, and then kills its VM.
_KILL_MS = 15_000.0
# The next claim of any engine takes over an ended lease.
_TAKEOVER_MS = 60_000.0
_RUNNING = frozenset({TicketState.IN_PROGRESS, TicketState.WAITING})


class AuditSource(Protocol):
    """`swarm.store.audit.Audit`, or a test's history."""

    def log(self) -> Iterable[LogEntry]: ...
    def tickets(self) -> Iterable[TicketFact]: ...
    def attempts(self) -> Iterable[AttemptFact]: ...
    def running_steps(self) -> Iterable[StepFact]: ...
    def stalled(self) -> Iterable[str]: ...
    def sandboxes(self) -> Iterable[SandboxFact]: ...
    def loses_deletions(self, table: str) -> bool: ...
    def renamed(self) -> Iterable[str]: ...
    def without_artifacts(self) -> Iterable[tuple[str, int]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class VmFact:
    """A VM of this host that serves an attempt or a sandbox."""

    n: int
    attempt_id: str | None
    owner_alive: bool
    sandbox_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A broken guarantee. ``id``: the ticket's, 'sandbox …', or 'VM 1001'."""

    id: str
    what: str


@dataclass(slots=True, kw_only=True)
class Report:
    """Counts, and lists of violations, which must be empty."""

    tickets_seen: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    unfinished: int = 0
    deleted: int = 0
    attempts: int = 0
    most_attempts: int = 0  # of one ticket
    lost_leases: int = 0
    refused: int = 0  # writes that the fence refused
    sandboxes: int = 0
    sandboxes_lost: int = 0
    holds: int = 0  # of sandboxes
    waiting_for_an_engine: int = 0  # ended leases, while no engine runs that could take the step
    finished_twice: list[Violation] = field(default_factory=list)
    lost: list[Violation] = field(default_factory=list)
    unrecorded: list[Violation] = field(default_factory=list)
    slots_leaked: list[Violation] = field(default_factory=list)
    changed_by_others: list[Violation] = field(default_factory=list)  # no violations: other programs changed rows

    @property
    def violations(self) -> list[Violation]:
        return [*self.finished_twice, *self.lost, *self.unrecorded, *self.slots_leaked]

    @property
    def kept(self) -> bool:
        return not self.violations


@dataclass(slots=True)
class _History:
    """One ticket's state, by the log so far."""

    open: bool | None = None  # between its start and its end; None: not known
    state: str = ""  # after the last transition
    steps: dict[str, str] = field(default_factory=dict)  # step → the attempt that runs it
    completed: set[str] = field(default_factory=set)  # steps, since the last start of the ticket
    ended: dict[str, str] = field(default_factory=dict)  # attempt → the step's status that it left
    # an attempt that ran or ended twice, and what it did
    overlaps: list[tuple[str, str]] = field(default_factory=list)
    deleted: bool = False


def judge(facts: AuditSource, vms: Iterable[VmFact] = (), *, engine_alive: bool = False) -> Report:
    """Replay the log and compare it with the rows."""
    report = Report()
    sandboxes = Histories()
    histories = _replay(facts.log(), report, sandboxes)
    # Rows of `tickets` that are gone without a trace: by whom?
    others = dict.fromkeys(facts.renamed(), "it got another id")
    why = (
        "its row is gone; Swarm's trigger, which records deletions, is gone too, or a unique index let a REPLACE do it"
    )
    _check_tickets(facts.tickets(), histories, report, others, why if facts.loses_deletions("tickets") else "")
    ended = _check_attempts(facts.attempts(), histories, report, engine_alive=engine_alive)
    for id_, history in histories.items():
        for attempt, what in history.overlaps:
            # Swarm deletes no attempt of a ticket that it runs. One that never was, another program wrote.
            _add(report.finished_twice if attempt in ended else report.changed_by_others, id_, what)
    for step in facts.running_steps():
        if not step.attempt_alive:
            what = f"its step {step.step_id!r} is running, but no attempt runs it"
            known = histories.get(step.ticket_id or "", _History()).steps.get(step.step_id)
            # Swarm deletes no run without its steps.
            by_others = step.ticket_id is None or (step.ticket_ended and known is None)
            _add(report.changed_by_others if by_others else report.lost, step.ticket_id, what)
    for ticket_id in facts.stalled():
        _add(report.lost, ticket_id, "its workflow is running, but nothing will continue it")
    for ticket_id, gone in facts.without_artifacts():
        _add(report.lost, ticket_id, f"{gone} of its artifacts (files, large values) are gone from the database")
    _check_sandboxes(facts, sandboxes, report, engine_alive=engine_alive)
    report.slots_leaked += _leaked(vms, ended, sandboxes.free)
    return report


def _check_sandboxes(facts: AuditSource, sandboxes: Histories, report: Report, *, engine_alive: bool) -> None:
    report.holds = sandboxes.holds
    for fact in facts.sandboxes():
        report.sandboxes += 1
        report.sandboxes_lost += fact.state == SandboxState.LOST
        if fact.hold_id is not None and not engine_alive:
            report.waiting_for_an_engine += fact.expired_ms > 0
        elif fact.expired_ms > _TAKEOVER_MS:
            ago = f"{fact.expired_ms / 1000:.0f} s ago"
            _add(report.lost, f"sandbox {fact.id}", f"its lease ended {ago}, and no engine took over")
        sandboxes.compare(fact)
    sandboxes.gone(traced=not facts.loses_deletions("sandboxes"))
    for violations, found in (
        (report.finished_twice, sandboxes.twice),
        (report.lost, sandboxes.lost),
        (report.unrecorded, sandboxes.unrecorded),
        (report.changed_by_others, sandboxes.changed_by_others),
    ):
        for id_, what in found:
            _add(violations, f"sandbox {id_}", what)


def _replay(log: Iterable[LogEntry], report: Report, sandboxes: Histories) -> dict[str, _History]:
    histories: dict[str, _History] = {}
    begun: Counter[str] = Counter()  # attempts by ticket
    for entry in log:
        if entry.sandbox_id is not None:
            sandboxes.replay(entry)
            continue
        history = histories.setdefault(entry.ticket_id, _History())
        if entry.kind == "refused":
            report.refused += 1
        elif entry.kind == "deleted":
            report.deleted += 1
            histories[entry.ticket_id] = _History(deleted=True)
            begun.pop(entry.ticket_id, None)
        elif entry.of == "ticket":
            _ticket_moves(history, entry, report)
        elif entry.of == "step":
            begun[entry.ticket_id] += _step_moves(history, entry, report)
    report.attempts = sum(begun.values())
    report.most_attempts = max(begun.values(), default=0)
    report.tickets_seen = len(histories)
    return histories


def _ticket_moves(history: _History, entry: LogEntry, report: Report) -> None:
    if entry.before not in _RUNNING:  # else its end, in a transaction in which a trigger deleted (archived) it
        history.deleted = False
    if entry.after in TERMINAL_TICKET_STATES:
        if entry.before in _RUNNING and history.open is False and not entry.mended:
            what = f"ended as {entry.after} (event {entry.seq}) after it had ended as {history.state}"
            _add(report.finished_twice, entry.ticket_id, what)
        history.open = False
    elif entry.after == TicketState.IN_PROGRESS and entry.before != TicketState.WAITING:
        history.open = True
        history.completed.clear()
    history.state = entry.after


def _step_moves(history: _History, entry: LogEntry, report: Report) -> bool:
    """True when an attempt begins."""
    step, attempt = entry.step_id or "", entry.attempt_id or ""
    twice, at = report.finished_twice, f"(event {entry.seq})"
    if entry.after == StepStatus.RUNNING:
        if not attempt:
            return False  # other steps do its work
        if (other := history.steps.get(step)) is not None:
            history.overlaps.append((other, f"attempt {attempt} of step {step!r} began while {other} ran it {at}"))
        history.steps[step] = attempt
        return True
    if attempt and entry.before == StepStatus.RUNNING:
        if attempt in history.ended:
            history.overlaps.append((attempt, f"attempt {attempt} of step {step!r} ended twice {at}"))
        history.ended[attempt] = entry.after
        if history.steps.get(step) == attempt:
            del history.steps[step]
    if entry.after == StepStatus.COMPLETED:
        if step in history.completed:
            _add(twice, entry.ticket_id, f"step {step!r} completed twice {at}")
        history.completed.add(step)
    return False


def _check_tickets(
    tickets: Iterable[TicketFact],
    histories: dict[str, _History],
    report: Report,
    others: Mapping[str, str],
    untraced: str,
) -> None:
    """``others``: what other programs did to tickets; ``untraced``: how they may have removed any of them."""
    with_row: set[str] = set()
    for ticket in tickets:
        with_row.add(ticket.id)
        if ticket.state == TicketState.DONE:
            report.done += 1
        elif ticket.state == TicketState.FAILED:
            report.failed += 1
        elif ticket.state == TicketState.CANCELLED:
            report.cancelled += 1
        else:
            report.unfinished += 1
        history = histories.get(ticket.id, _History())
        for violations, what in _ticket_violations(ticket, history, report):
            _add(violations, ticket.id, what)
        if ticket.id not in histories:
            report.tickets_seen += 1
    for id_, history in histories.items():
        # With ``since``, unchanged rows are left out, but then their transitions are left out too.
        if id_ not in with_row and not history.deleted and history.state:
            if why := others.get(id_, untraced):
                _add(report.changed_by_others, id_, why)
            else:
                _add(report.lost, id_, "its row is gone, but the log has no deletion")


def _ticket_violations(ticket: TicketFact, history: _History, report: Report) -> Iterator[tuple[list[Violation], str]]:
    if ticket.state in _RUNNING:
        if ticket.run_status not in (RunStatus.RUNNING, RunStatus.WAITING):
            yield report.lost, f"it is {ticket.state}, but it has no active run"
        elif not ticket.live_steps:
            yield report.lost, f"it is {ticket.state}, but its run has no step left to run"
        elif history.open is False and history.state in TERMINAL_TICKET_STATES:
            yield report.lost, f"it is {ticket.state}, but the log has it {history.state}"
    elif ticket.state == TicketState.DONE and ticket.run_status is not None:
        if ticket.run_status in (RunStatus.RUNNING, RunStatus.WAITING):
            by_others = history.open is not False or ticket.run_ended
            what = "it is done, but its run is still active"
            yield report.changed_by_others if by_others else report.unrecorded, what
        elif ticket.run_status == RunStatus.COMPLETED and history.open:
            yield report.unrecorded, "it is done, but its end is not in the log"


def _check_attempts(
    attempts: Iterable[AttemptFact], histories: Mapping[str, _History], report: Report, *, engine_alive: bool
) -> dict[str, float | None]:
    """Attempts by id: how many ms ago each ended, None for those that run."""
    ended: dict[str, float | None] = {}
    succeeded: Counter[str] = Counter()
    for attempt in attempts:
        ended[attempt.id] = None if attempt.outcome is None else attempt.ended_ms
        if attempt.outcome is None:
            _check_live(attempt, report, engine_alive=engine_alive)
        elif attempt.outcome == AttemptOutcome.LOST:
            report.lost_leases += 1
        elif attempt.outcome == AttemptOutcome.SUCCEEDED:
            left = histories.get(attempt.ticket_id or "", _History()).ended.get(attempt.id)
            if left not in (None, StepStatus.COMPLETED):
                what = f"attempt {attempt.id} succeeded, but the log has its step {left}"
                _add(report.changed_by_others, attempt.ticket_id, what)
                continue
            succeeded[attempt.step_execution_id] += 1
            if succeeded[attempt.step_execution_id] == 2:
                _add(report.finished_twice, attempt.ticket_id, "two attempts of one step succeeded")
            if attempt.step_status not in (StepStatus.COMPLETED, None):
                what = f"attempt {attempt.id} succeeded, but its step is {attempt.step_status}"
                _add(report.changed_by_others if left else report.lost, attempt.ticket_id, what)
    return ended


def _check_live(attempt: AttemptFact, report: Report, *, engine_alive: bool) -> None:
    if attempt.expired_ms <= 0:
        return  # if its worker has lost the step, the next renewal tells it
    if not engine_alive:
        report.waiting_for_an_engine += 1
    elif attempt.expired_ms > _TAKEOVER_MS:
        ago = f"{attempt.expired_ms / 1000:.0f} s ago"
        _add(report.lost, attempt.ticket_id, f"the lease of {attempt.id} ended {ago}, and no engine took over")


def _leaked(
    vms: Iterable[VmFact], ended: Mapping[str, float | None], free: Mapping[str, float | None]
) -> Iterator[Violation]:
    for vm in vms:
        if not vm.owner_alive:
            yield Violation(id=f"VM {vm.n}", what="its owner is dead and it was not removed: run swarm-cleanup")
        elif (over_ms := ended.get(vm.attempt_id or "")) is not None and over_ms > _KILL_MS:
            yield Violation(id=f"VM {vm.n}", what=f"it runs, but its attempt {vm.attempt_id} has ended")
        elif (over_ms := free.get(vm.sandbox_id or "")) is not None and over_ms > _KILL_MS:
            yield Violation(id=f"VM {vm.n}", what=f"it runs, but nobody holds its sandbox {vm.sandbox_id}")


def _add(violations: list[Violation], ticket_id: str | None, what: str) -> None:
    violations.append(Violation(id=ticket_id or "?", what=what))
