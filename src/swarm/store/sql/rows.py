"""Converts rows to values and back: times, ids, JSON, and text that may be invalid because another tool wrote it."""

from __future__ import annotations

import itertools
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any, Final, TypeVar

from swarm.base import jsontext
from swarm.base.clock import iso as iso
from swarm.model import Event, Ticket
from swarm.store.sql.bounded import texts

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Value = TypeVar("Value", bound="DataclassInstance")
Kind = TypeVar("Kind")

MAX_ERROR_CHARS: Final = 16 * 1024
LONGEST_MS: Final = 1e11  # of a phase: three years
SUMMARY_CHARS: Final = 500
READ_BYTES: Final = 64 << 10  # JSON up to this length is read, and stored twice, while others wait for the lock


def milliseconds(text: object) -> int | None:
    """The inverse of `iso`, for any ISO-8601 text; UTC if it has no zone. None for anything else."""
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def flag(value: object) -> bool:
    """A yes or no that another tool may have written: SQLite keeps 'false' in a BOOLEAN column, a text like any other.
    What is no plain yes is a no."""
    return value in (1, "true", "TRUE", "True")


def new_id(now_ms: int) -> str:
    """A UUIDv7 (RFC 9562): rows created together are next to each other in the index."""
    random = int.from_bytes(os.urandom(10))
    value = (now_ms & 0xFFFFFFFFFFFF) << 80 | random
    return str(uuid.UUID(int=value & ~(0xF000 << 64 | 0xC000 << 48) | 0x7000 << 64 | 0x8000 << 48))


def ids_in_order(now_ms: int) -> Iterator[str]:
    """An endless series of such ids, each greater than the last: the rows sort in the order of their creation."""
    first = uuid.UUID(new_id(now_ms)).int
    return (str(uuid.UUID(int=first + number)) for number in itertools.count())


def lenient(value: object) -> str | None:
    """Any value of a TEXT column as text that can be shown and stored: for display, never for decisions."""
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    text = str(value)
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode(errors="replace")


def message(text: str | None) -> str | None:
    """A message of Swarm or of a guest, as every database can store it: no NUL, no lone surrogates, shortened."""
    if text is None:
        return None
    if len(text) > MAX_ERROR_CHARS:
        text = f"{text[:512]} […] {text[-(MAX_ERROR_CHARS - 520) :]}"
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()


def shallow(value: DataclassInstance) -> dict[str, Any]:
    """A dataclass as a dict; unlike `dataclasses.asdict`, it doesn't copy the values."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def parsed(text: object, kind: type[Kind]) -> Kind | None:
    """A value of JSON text that another program may have written; None if it is none, or of another kind."""
    try:
        found = jsontext.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return found if isinstance(found, kind) else None


def timings(text: object) -> dict[str, float]:
    """How long each phase of an attempt took, ms."""
    known = (parsed(text, dict) or {}).items()
    return {name: float(ms) for name, ms in known if type(ms) in (int, float) and 0 <= ms < LONGEST_MS}


_encode: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode


def dump(value: object) -> str:
    """JSON text that every database can store."""
    text = _encode(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), default=str)
    return text


def storable_json(text: str) -> str:
    """JSON text unchanged if it can be stored, else the same value with escapes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(json.loads(text))
    return text


def whole(value: object) -> int | None:
    """A number of a row as a whole one; None for anything else."""
    return int(value) if isinstance(value, int | float) and value == value and abs(value) < 2**63 else None


def real(value: object) -> float | None:
    """A number of a row; None for anything else, as for the infinite, which JSON doesn't have."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


_TICKET_READERS: Final[Mapping[str, Any]] = {
    "priority": lambda value: whole(value) or 0,
    "max_attempts": whole,
    "timeout_seconds": real,
    "budget_usd": real,
    "budget_tokens": whole,
    "keep_vm_seconds": real,
}
TICKET_FIELDS: Final = tuple(field.name for field in fields(Ticket))
LONG: Final = ("description", "inputs", "outputs", "trigger_data")
# For display: far more than what Swarm itself takes or writes.
_SHOWN_BYTES: Final = {
    name: (64 if name in LONG else 1) << 20 for name in TICKET_FIELDS if name not in ("id", "state", *_TICKET_READERS)
}
TICKET_COLUMNS: Final = texts("t", TICKET_FIELDS, _SHOWN_BYTES, told=True)


# By the field's type: SQLite keeps any value in any column.
_READERS: Final[Mapping[Any, Callable[[object], Any]]] = {
    "str": lambda value: lenient(value) or "",
    "str | None": lambda value: lenient(value),
    "int": lambda value: whole(value) or 0,
    "int | None": lambda value: whole(value),
    "float": lambda value: real(value) or 0.0,
    "float | None": lambda value: real(value),
}


@cache
def _readers(kind: type[DataclassInstance]) -> Mapping[str, Callable[[object], Any]]:
    return {field.name: _READERS.get(field.type, lambda value: value) for field in fields(kind)}


def value(kind: type[Value], row: Any, **computed: Any) -> Value:
    """A dataclass from the columns of the same names, but for the ``computed`` fields; for display, never for
    decisions."""
    read = {name: reader(getattr(row, name)) for name, reader in _readers(kind).items() if name not in computed}
    return kind(**read, **computed)


def columns(kind: type[DataclassInstance], alias: str, *computed: str) -> str:
    """For `value`, by name: a user's own columns may have any name, and a row's attributes must be identifiers."""
    return ", ".join(f"{alias}.{field.name}" for field in fields(kind) if field.name not in computed)


def ticket(row: Any) -> Ticket:
    """A ticket for display: values of a wrong type are converted where possible."""
    return Ticket(**{name: _TICKET_READERS.get(name, lenient)(getattr(row, name)) for name in TICKET_FIELDS})


def event(row: Any) -> Event:
    data = parsed(row.data, dict)
    return Event(
        ticket_id=lenient(row.ticket_id) or "",
        kind=row.kind,
        data=data if data is not None else {"text": lenient(row.data)},
        step_id=row.step_id,
        attempt_id=row.attempt_id,
        sandbox_id=lenient(row.sandbox_id),
        seq=row.seq,
        at=row.at,
    )


def event_values(event: Event, now: str) -> dict[str, Any]:
    return {
        "ticket_id": event.ticket_id,
        "step_id": event.step_id,
        "attempt_id": event.attempt_id,
        "sandbox_id": event.sandbox_id,
        "at": now,
        "kind": event.kind,
        "data": dump(dict(event.data)),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One execution of a ticket, or of a workflow within it."""

    id: str
    ticket_id: str
    workflow_id: str | None
    workflow_version: str | None
    root_run_id: str | None  # None for the ticket's own run
    path: str  # '' for the ticket's own run; 'fix[0]/' for the run within its step fix[0]
    status: str
    trigger_type: str
    trigger_data: str | None  # JSON text of an object
    started_at: str | None
    completed_at: str | None
    error: str | None
    error_step: str | None
    total_vm_time_ms: float
    total_api_tokens: int
    total_cost_usd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One step of a run. ``retry_count``: tries that failed, and were followed by another."""

    id: str
    run_id: str
    step_id: str
    agent_id: str | None
    agent_name: str | None
    agent_version: str | None
    status: str
    vm_id: int | None
    inputs: str | None
    outputs: str | None
    queued_at: str | None
    started_at: str | None
    completed_at: str | None
    duration_ms: float | None
    error: str | None
    retry_count: int
    max_attempts: int
    available_at: int | None  # ms by the database's clock; None: immediately
    question: str | None  # of an approval
    verdict: str | None  # the answer, JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRow:
    """One try of a step. ``outcome`` is None while it runs; ``timings``: how long each phase took, in ms."""

    id: str
    step_execution_id: str
    step_id: str
    number: int
    worker: str
    vm_id: int | None
    outcome: str | None
    reason: str | None
    error: str | None
    exit_code: int | None
    timings: Mapping[str, float]
    api_tokens_used: int
    cost_usd: float
    started_at: str | None
    ended_at: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketSummary:
    """A ticket in a list: the columns of `Ticket` without its long ones, and texts shortened to `SUMMARY_CHARS`."""

    id: str
    title: str
    state: str
    project_id: str | None
    agent_id: str | None
    assignee_id: str | None
    assignee_type: str | None
    execution_mode: str | None
    workflow_id: str | None
    error: str | None
    priority: int
    timeout_seconds: float | None
    max_attempts: int | None
    budget_usd: float | None
    budget_tokens: int | None
    over_budget: str | None
    trigger_type: str | None
    run_id: str | None
    created_at: str | None
    updated_at: str | None
    started_at: str | None
    completed_at: str | None


SUMMARY_FIELDS: Final = tuple(field.name for field in fields(TicketSummary))
# Cut by the database: a row may hold anything, and its caller needs one line of it.
SUMMARY_COLUMNS: Final = ", ".join(
    f"t.{name}" if name in ("id", "state", *_TICKET_READERS) else f"substr(t.{name}, 1, {SUMMARY_CHARS}) AS {name}"
    for name in SUMMARY_FIELDS
)


def ticket_summary(row: Any) -> TicketSummary:
    return TicketSummary(**{name: _TICKET_READERS.get(name, lenient)(getattr(row, name)) for name in SUMMARY_FIELDS})


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRow:
    id: str
    host: str
    pid: int | None
    started_at: str
    seen_at: str
    seen_ms_ago: float  # by the database's clock
    info: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRow:
    """``put_back_seconds``: until what runs on a host that is drained is put back; None: never."""

    id: str
    name: str
    labels: Mapping[str, Any]
    capacity: Mapping[str, Any]
    versions: Mapping[str, Any]
    generation: int
    seen_ms_ago: float
    draining: bool
    put_back_seconds: float | None
    drained_by: str | None
    drained_at: str | None
    created_at: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """Ids of attempts. ``lost``: another attempt has the step, or it has ended. ``cancelled``: the ticket has ended
    or was deleted."""

    lost: frozenset[str]
    cancelled: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStatus:
    """``ready``: tickets and steps that a claim would return immediately."""

    ready: int
    running: int
    delayed: int  # steps in back-off
    blocked: int
    waiting: int
    oldest_ready_ms: float | None  # age of the oldest ready ticket
    next_due_ms: float | None  # time until the next back-off or lease ends; 0 when one has


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """What an idle worker waits for. ``ready``: something can be claimed now. ``next_ms``: time until the next back-off
    or lease ends, which no commit announces; None if there is neither."""

    ready: bool
    next_ms: float | None
