"""What `swarm prove` checks of sandboxes: never two holders, every end once, no change of state without its event."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from swarm.model import SANDBOX_TRANSITIONS, TERMINAL_SANDBOX_STATES, SandboxState
from swarm.store.audit import LogEntry, SandboxFact


@dataclass(slots=True)
class _History:
    """One sandbox, by the log so far. ``seen``: its log is known from a holder on."""

    state: str = ""  # after the last transition
    hold: str | None = None  # who holds it
    seen: bool = False
    deleted: bool = False


@dataclass(slots=True)
class Histories:
    """Replayed, and then compared with the rows. What is wrong, by the sandbox's id; ``free``: how many ms ago the last
    hold of each ended, None for those that are held."""

    holds: int = 0
    twice: list[tuple[str, str]] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    unrecorded: list[tuple[str, str]] = field(default_factory=list)
    changed_by_others: list[tuple[str, str]] = field(default_factory=list)
    free: dict[str, float | None] = field(default_factory=dict)
    _holds: set[str] = field(default_factory=set)
    _known: dict[str, _History] = field(default_factory=dict)
    _with_row: set[str] = field(default_factory=set)

    def replay(self, entry: LogEntry) -> None:
        id = entry.sandbox_id or ""
        history = self._known.setdefault(id, _History())
        hold, at = entry.hold, f"(event {entry.seq})"
        if entry.kind == "deleted":
            self.free[id] = entry.age_ms
            self._known[id] = _History(deleted=True)
        elif entry.kind == "held":
            if history.hold is not None:
                self.twice.append((id, f"the hold {hold} began while {history.hold} had it {at}"))
            self.holds += 1
            history.hold, history.seen, history.deleted = hold, True, False
            if history.state in TERMINAL_SANDBOX_STATES:  # another program started it again
                history.state = str(SandboxState.STARTING)
            self.free[id] = None
            if hold is not None:
                self._holds.add(hold)
        elif entry.kind in ("released", "hold_lost"):
            self._write(id, history, entry)
            self.free[id] = entry.age_ms
            history.hold = None
            if entry.mended:
                self.changed_by_others.append((id, f"it was taken from the hold {hold} {at}"))
        elif entry.of == "sandbox":
            self._transition(id, history, entry)

    def _transition(self, id: str, history: _History, entry: LogEntry) -> None:
        self._write(id, history, entry)
        if history.state in TERMINAL_SANDBOX_STATES and entry.after in TERMINAL_SANDBOX_STATES:
            what = f"ended as {entry.after} (event {entry.seq}) after it had ended as {history.state}"
            self.twice.append((id, what))
        known = SANDBOX_TRANSITIONS.get(SandboxState(entry.before)) if entry.before in tuple(SandboxState) else None
        if known is not None and entry.after not in known and entry.before not in TERMINAL_SANDBOX_STATES:
            others = history.state not in ("", entry.before)  # then its row was changed before
            what = f"it went from {entry.before} to {entry.after} (event {entry.seq})"
            (self.changed_by_others if others else self.unrecorded).append((id, what))
        history.state, history.deleted = entry.after, False
        if entry.after != SandboxState.RUNNING:
            self.free[id] = entry.age_ms
            history.hold = None

    def _write(self, id: str, history: _History, entry: LogEntry) -> None:
        """Only who holds it writes as its holder."""
        if entry.hold is not None and history.seen and entry.hold != history.hold:
            what = f"the hold {entry.hold} wrote (event {entry.seq}) when it was over"
            others = entry.hold not in self._holds  # no hold that Swarm gave
            (self.changed_by_others if others else self.twice).append((id, what))

    def compare(self, fact: SandboxFact) -> None:
        """The row with its history."""
        self._with_row.add(fact.id)
        history = self._known.get(fact.id)
        if history is None or not history.state or history.deleted:
            return
        ended = fact.state in TERMINAL_SANDBOX_STATES
        if fact.state != history.state:
            others = (
                fact.state not in (SandboxState.RUNNING, SandboxState.PAUSED, *TERMINAL_SANDBOX_STATES)
                or (fact.state == SandboxState.RUNNING and fact.hold_id is None)
                or (ended and (not fact.has_end or fact.hold_id is not None))
                or (not ended and history.state in TERMINAL_SANDBOX_STATES)
            )
            what = f"it is {fact.state}, but the log has it {history.state}"
            (self.changed_by_others if others else self.unrecorded).append((fact.id, what))
        elif fact.hold_id != history.hold and history.seen and not ended:
            others = fact.hold_id is None or fact.hold_id not in self._holds
            what = f"its holder is {fact.hold_id or 'nobody'}, but the log has {history.hold or 'nobody'}"
            (self.changed_by_others if others else self.unrecorded).append((fact.id, what))

    def gone(self, *, traced: bool) -> None:
        """Rows that are not there. ``traced``: a deletion leaves an event."""
        for id in self._missing():
            what = "its row is gone, but the log has no deletion"
            (self.lost if traced else self.changed_by_others).append((id, what))

    def _missing(self) -> Iterable[str]:
        return (
            id
            for id, history in self._known.items()
            if id not in self._with_row and history.state and not history.deleted
        )
