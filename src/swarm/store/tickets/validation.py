"""Checks whether a row of `tickets` can run. Any tool may have written it, so everything in it may be wrong.

A `BadRow` becomes the ticket's `error`: it says which column is wrong, what is in it, and what to put there instead.
Pure: rows in, values out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from swarm.base import jsontext, versions
from swarm.model import BOUNDS, Agent, BudgetPolicy, ExecutionMode, KeepVm, Ticket, TicketState
from swarm.store.sql.rows import READ_BYTES, TICKET_FIELDS, lenient, milliseconds
from swarm.store.tickets import places

KIB: Final = 1024
MIB: Final = 1024 * KIB
MAX_ID_BYTES: Final = 512
MAX_BYTES: Final[Mapping[str, int]] = {
    "id": MAX_ID_BYTES,
    # Each transition of a ticket writes its whole row again, under the write lock: about a second for 30 MB.
    "description": 2 * MIB,
    "inputs": 16 * MIB,
    "trigger_data": 2 * MIB,  # a webhook's body of 1 MiB, with headers
}
MAX_OTHER_BYTES: Final = 64 * KIB  # of every other text column
_ID_COLUMNS: Final = ("id", "agent_id", "assignee_id", "workflow_id", "assignee_type", "execution_mode")
# Columns that Swarm itself writes: wrong values are no reason to refuse the ticket.
_WRITTEN_BY_SWARM: Final = frozenset(
    {"outputs", "error", "run_id", "created_at", "updated_at", "started_at", "completed_at"}
)


class BadRow(ValueError):
    """Why a ticket can't run, and what to do about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A ticket whose own row allows it to run."""

    ticket: Ticket
    agent_id: str
    inputs: str  # JSON text of an object


def read(row: Any) -> Work:
    """Check a row of tickets. Raises BadRow."""
    ticket = strict_ticket(row)
    mode = ticket.execution_mode or ExecutionMode.AGENT
    if mode not in tuple(ExecutionMode):
        raise BadRow(f"execution_mode {shown(mode)} is unknown; use 'agent' or 'workflow'")
    if ticket.workflow_id and not _agent_of(ticket):  # 'agent' is only the column's default
        mode = ExecutionMode.WORKFLOW
    inputs = read_inputs(ticket.inputs)
    if mode == ExecutionMode.WORKFLOW:
        if not ticket.workflow_id:
            raise BadRow("execution_mode is 'workflow' but workflow_id is empty; set it to a workflow's name or id")
        _read_object("trigger_data", ticket.trigger_data)
        return Work(ticket=ticket, agent_id="", inputs=inputs)
    return Work(ticket=ticket, agent_id=_agent_id(ticket), inputs=inputs)


def strict_ticket(row: Any) -> Ticket:
    """``row``: anything with a ticket's fields as attributes, and maybe `too_long`. Raises BadRow."""
    check_length(row)
    values: dict[str, Any] = {}
    for name in TICKET_FIELDS:
        value = getattr(row, name)
        if name in _WRITTEN_BY_SWARM:
            values[name] = lenient(value)
        elif name in _NUMBERS:
            values[name] = strict_number(name, value)
        else:
            values[name] = strict_text(name, value)
    for name in _ID_COLUMNS:
        if "\0" in (values[name] or ""):
            raise BadRow(f"{name} {shown(values[name])} contains a NUL character; remove it")
    if not values["id"].strip():
        raise BadRow("id is empty; give the ticket an id")
    values["over_budget"] = values["over_budget"] or None
    if values["over_budget"] not in (None, *BudgetPolicy):
        raise BadRow(f"over_budget {shown(values['over_budget'])} is unknown; use 'fail' or 'wait', or NULL")
    values["keep_vm"] = values["keep_vm"] or None
    if values["keep_vm"] not in (None, *KeepVm):
        raise BadRow(
            f"keep_vm {shown(values['keep_vm'])} is unknown; use {', '.join(map(repr, map(str, KeepVm)))}, or NULL"
        )
    values["requires"] = strict_requires(values["requires"])
    return Ticket(**values)


def strict_requires(text: str | None) -> str | None:
    """Raises BadRow."""
    try:
        return text if text and places.parsed(text) else None
    except ValueError as error:
        raise BadRow(f"requires {shown(text)} can't be used: {error}") from None


def strict_text(name: str, value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        if name == "id":  # statements that compare with text would not find it
            raise BadRow("id is a BLOB; give the ticket an id that is text")
        try:
            value = value.decode()  # e.g. the shell's readfile()
        except UnicodeDecodeError:
            raise BadRow(f"{name} is a BLOB that is not UTF-8 text; store text") from None
    text = value if isinstance(value, str) else str(value)
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        raise BadRow(f"{name} is not valid UTF-8: {shown(text)}; store it again as UTF-8 text") from None
    if size > limit_of(name):
        raise _too_long(name, size)
    return text


def limit_of(name: str) -> int:
    """Bytes of a text column."""
    return MAX_BYTES.get(name, MAX_OTHER_BYTES)


def check_length(row: Any) -> None:
    """Raises BadRow if a text was not read, since it is too long (`bounded.too_long`)."""
    if found := getattr(row, "too_long", None):
        name, _, size = str(found).partition(" ")
        raise _too_long(name, int(size))


def _too_long(name: str, size: int) -> BadRow:
    limit = limit_of(name)
    return BadRow(f"{name} has {size:,} bytes, the limit is {limit:,}; put large data where the agent can fetch it")


def strict_number(name: str, value: object) -> Any:
    """``name``: the column; None for what is empty. Raises BadRow."""
    least, most = BOUNDS[name]
    if value is None or value == "":  # an empty field of a CSV file
        return 0 if name == "priority" else None
    integral = isinstance(least, int)
    if isinstance(value, int | float) and math.isfinite(value) and least <= value <= most:
        if not integral:
            return float(value)
        if value == int(value):
            return int(value)
    kind = "a whole number" if integral else "a number"
    raise BadRow(f"{name} is {shown(value)}; it must be {kind} from {least:g} to {most:g}, or NULL")


_NUMBERS: Final = ("priority", "max_attempts", "timeout_seconds", "budget_usd", "budget_tokens", "keep_vm_seconds")
# Of the texts that are read for a claim. An id is read at any length: its row is found by it.
LIMITS: Final = {name: limit_of(name) for name in TICKET_FIELDS if name not in ("id", *_NUMBERS)}
REFUSED: Final = {name: limit for name, limit in LIMITS.items() if name not in _WRITTEN_BY_SWARM}


def check_age(row: Any, now_ms: int, limit_seconds: float) -> None:
    """Raises BadRow for one that has waited for longer."""
    times = [ms for ms in (milliseconds(row.created_at), milliseconds(row.updated_at)) if ms is not None]
    if times and now_ms - max(times) > limit_seconds * 1000:
        why = f"it waited for longer than the queue timeout of {limit_seconds:g} s"
        raise BadRow(f"{why}; `swarm ticket retry` queues it again")


def check_budget(name: str, value: object) -> None:
    """``name``: the column. Raises BadRow."""
    strict_number(name, value)


def _agent_of(ticket: Ticket) -> str | None:
    if ticket.agent_id or (ticket.assignee_type or "agent") != "agent":
        return ticket.agent_id
    return ticket.assignee_id


def _agent_id(ticket: Ticket) -> str:
    if agent := _agent_of(ticket):
        return agent
    if ticket.assignee_id:
        raise BadRow(
            f"the ticket is assigned to {shown(ticket.assignee_id)}, a {shown(ticket.assignee_type)} and not an agent; "
            "set agent_id (`swarm agent list` shows the agents)"
        )
    raise BadRow("no agent: set agent_id to the name or id of a registered agent (`swarm agent list` shows them)")


def read_inputs(text: str | None) -> str:
    """Raises BadRow."""
    return _read_object("inputs", text)


def parsed_inputs(text: str) -> dict[str, Any]:
    """What `read_inputs` takes, of any length. Raises BadRow."""
    return _parsed_object("inputs", text) if text.strip() else {}


def _read_object(name: str, text: str | None) -> str:
    if text is None or not text.strip():
        return "{}"
    # A large one is read in a confined process: here, all others would wait for the write lock.
    if len(text) <= READ_BYTES:
        _parsed_object(name, text)
    return text


def _parsed_object(name: str, text: str) -> dict[str, Any]:
    if text.count("{") + text.count("[") > jsontext.MAX_CONTAINERS:
        raise BadRow(f"{name} has more than {jsontext.MAX_CONTAINERS:,} objects and lists; put large data in a file")
    try:
        value = jsontext.loads(text)
    except jsontext.TooDeep as error:
        raise BadRow(f"{name} is {error}; flatten it") from None
    except ValueError as error:
        raise BadRow(f"{name} is not valid JSON: {error}; it must be a JSON object, for example {{}}") from None
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
        raise BadRow(f'{name} is {kind}; it must be a JSON object, for example {{"value": …}}')
    return value


def unknown(what: str, ref: str, names: Sequence[str]) -> BadRow:
    """``what``: agent or workflow. ``names``: of those that there are."""
    hint = versions.did_you_mean(ref, names) or f"; `swarm {what} list` shows all"
    return BadRow(f"no {what} has the id or name {shown(ref)}{hint}")


def disabled_workflow(name: str, version: str) -> BadRow:
    return BadRow(f"the workflow {name}@{version} is disabled; `swarm workflow enable {name}@{version}` enables it")


def too_big(agent: Agent, never: str) -> BadRow:
    return BadRow(f"agent {agent.name} {agent.version} {never}, or run the ticket on a host with more")


def no_host(requires: str, seconds: float) -> BadRow:
    return BadRow(
        f"it requires a host with {requires}, and for {seconds:g} s no known host has had that "
        "(SWARM_HOST_TIMEOUT_SECONDS; `swarm host list` shows the labels)"
    )


def unknown_state(value: object) -> str:
    guess = str(lenient(value)).strip().lower().replace("-", "_").replace(" ", "_")
    meant = guess if guess in tuple(TicketState) else TicketState.READY
    others = ", ".join(s for s in TicketState if s not in (TicketState.IN_PROGRESS, TicketState.WAITING))
    return f"state {shown(value)} is unknown; set it to '{meant}' (states that you can set: {others})"


def storable(text: str) -> bool:
    """True if a database can store this text. It can't with lone surrogates (from a command line that is not UTF-8)."""
    return text.isascii() or text == lenient(text)


def shown(value: object) -> str:
    """A hostile value for use in a message: quoted, short, printable."""
    text = value if isinstance(value, int | float) else str(lenient(value))
    quoted = ascii(text)
    return quoted if len(quoted) <= 80 else f"{quoted[:76]}…{quoted[-1]}"


def timeout_of(ticket: Ticket, agent: Agent) -> float:
    return ticket.timeout_seconds or agent.timeout_seconds


def max_attempts_of(ticket: Ticket, agent: Agent) -> int:
    return ticket.max_attempts or agent.retry.max_attempts
