"""Lists of tickets for people: a page at a time, by filters, newest first. What one page reads is bounded, however many
tickets there are and however few of them match."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from swarm.errors import UsageError
from swarm.model import TERMINAL_TICKET_STATES, TicketState
from swarm.store.sql import rows
from swarm.store.sql.conditions import ENDED, UNFINISHED
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import SUMMARY_COLUMNS, TicketSummary
from swarm.store.sql.transaction import Tx
from swarm.store.tickets import validation

SCANNED: Final = 10_000  # tickets that one page or count may look at
COUNTED: Final = 10_000  # "more than that" is all that a person needs to know
_RARE: Final = 1000  # so many tickets in live states are read all, and then sorted

_FILTERED: Final = "t.id, t.created_at, t.state, t.project_id, t.agent_id, t.workflow_id"
_SEARCHED: Final = ", substr(t.title, 1, 500) AS title, substr(t.error, 1, 500) AS error"
_SUMMARIES: Final = Sql(f"SELECT {SUMMARY_COLUMNS} FROM tickets t WHERE t.id IN :ids")
# The states of tickets that live and have an index, and its condition.
_LIVE: Final[Mapping[str, str]] = {
    TicketState.READY: "t.state = 'ready'",
    **{
        state: f"t.state = '{state}' AND t.{UNFINISHED}"
        for state in (TicketState.IN_PROGRESS, TicketState.WAITING, TicketState.BLOCKED)
    },
}
_NUMBER: Final = {
    state: Sql(f"SELECT count(*) AS number FROM (SELECT 1 FROM tickets t WHERE {where} LIMIT :limit)")
    for state, where in _LIVE.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketFilter:
    """Which tickets. ``ids``, ``agent_ids`` and ``workflow_ids``: of any of these; ``text``: in the title or the error,
    or at the beginning of the id; ``since`` and ``before``: when they were made, ISO-8601."""

    states: tuple[str, ...] = ()
    project_id: str | None = None
    ids: tuple[str, ...] = ()
    agent_ids: tuple[str, ...] = ()
    workflow_ids: tuple[str, ...] = ()
    text: str = ""
    since: str = ""
    before: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketPage:
    """``after``: where the next page starts; None at the end. A page may have fewer tickets than asked for, or none,
    and still not be the last."""

    tickets: list[TicketSummary]
    after: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Not ``exact``: there are that many or more."""

    number: int
    exact: bool = True


def page(tx: Tx, which: TicketFilter, *, after: str | None, limit: int) -> TicketPage:
    """Raises UsageError for an ``after`` that no page gave."""
    found, more = ids(tx, which, after=after, limit=limit)
    whole = {row.id: row for row in tx.all_in(_SUMMARIES, found)}
    return TicketPage(tickets=[rows.ticket_summary(whole[id]) for id in found], after=more)


def ids(
    tx: Tx, which: TicketFilter, *, after: str | None, limit: int, scanned: int = SCANNED, rare: int = _RARE
) -> tuple[list[str], str | None]:
    """The ids of a page, and where the next one starts. It looks at most at ``scanned`` tickets, and sorts at most
    ``rare`` of a state."""
    found, end = list[Any](), list[Any]()
    sources = _sources(tx, which, rare=rare)
    for source in sources:
        some, last = _from(tx, which, source, after=after, limit=limit, scanned=max(1, scanned // len(sources)))
        found += some
        end += [last] if last is not None else []
    found.sort(key=_place, reverse=True)
    # A source that was not read to its end may have more before its last row: nothing older than that is shown yet.
    edge = max(map(_place, end), default=None)
    if edge is not None:
        found = [row for row in found if _place(row) >= edge]
    if len(found) > limit:
        found = found[:limit]
        edge = _place(found[-1])
    return [row.id for row in found if _has_address(row.id)], None if edge is None else cursor(*edge)


def count(tx: Tx, which: TicketFilter, *, after: str | None = None, scanned: int = SCANNED) -> Count:
    """At most `COUNTED`; not exact either if there is more to look at than ``scanned`` tickets."""
    sources = _sources(tx, which, rare=None)
    counted, exact = 0, True
    for source in sources:
        read = _Read(which, source, after=after)
        most = scanned // len(sources) if read.conditions else COUNTED
        (row,) = tx.all(
            Sql(
                f"SELECT count(CASE WHEN {read.matches} THEN 1 END) AS number, count(*) AS seen "
                f"FROM ({read.all} LIMIT :scanned) t"
            ),
            scanned=most + 1,
            **read.values,
        )
        counted += min(row.number, most)
        exact = exact and row.seen <= most
    return Count(number=min(counted, COUNTED), exact=exact and counted <= COUNTED)


def counts(tx: Tx, which: TicketFilter) -> dict[str, Count]:
    """Of each state, or of each of the filter's: all of them together look at some `SCANNED` tickets."""
    states = which.states or tuple(TicketState)
    return {
        str(state): count(tx, replace(which, states=(str(state),)), scanned=SCANNED // min(len(states), 4))
        for state in states
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Tickets that an index finds by ``where``. ``states``: only these of them. Not ``newest_first``: in no order."""

    where: str
    states: tuple[str, ...] = ()
    newest_first: bool = True


def _sources(tx: Tx, which: TicketFilter, *, rare: int | None) -> list[_Source]:
    """Ended tickets of one state come from an index of their own; those in a live state too, while they are at
    most ``rare`` (None: any number); all others are looked for among those made last."""
    if which.ids:
        return [_Source(where=f"t.id IN {_in('id', which.ids)}", states=which.states, newest_first=False)]
    if not which.states:
        return [_Source(where="1 = 1")]
    found, others = list[_Source](), list[str]()
    for state in dict.fromkeys(which.states):
        if state in TERMINAL_TICKET_STATES:
            found.append(_Source(where=f"t.state = '{TicketState(state)}' AND t.{ENDED}"))
        elif state in _LIVE and (rare is None or tx.all(_NUMBER[state], limit=rare + 1)[0].number <= rare):
            found.append(_Source(where=_LIVE[state], newest_first=False))
        else:
            others.append(state)
    if others:
        found.append(_Source(where="1 = 1", states=tuple(others)))
    return found


class _Read:
    """SQL that reads a source, in the order of its index: ``all``, the rows to look at; ``keys``, the same by the index
    alone; ``matches``: what is wanted of them."""

    def __init__(self, which: TicketFilter, source: _Source, *, after: str | None) -> None:
        window, self.values = _window(which, after)
        self.conditions, named = _conditions(which, source.states)
        self.values |= named
        self.matches = " AND ".join([*self.conditions, *window]) or "1 = 1"
        inside = " AND ".join([source.where, *(window if source.newest_first else [])])
        order = " ORDER BY t.created_at DESC, t.id DESC" if source.newest_first else ""
        columns = f"{_FILTERED}{_SEARCHED if which.text else ''}" if self.conditions else "t.id, t.created_at"
        self.all = f"SELECT {columns} FROM tickets t WHERE {inside}{order}"
        self.keys = f"SELECT t.id, t.created_at FROM tickets t WHERE {inside}{order}"


def _from(
    tx: Tx, which: TicketFilter, source: _Source, *, after: str | None, limit: int, scanned: int
) -> tuple[list[Any], Any]:
    """The first matching rows of one source, and the last row looked at if there may be more."""
    read = _Read(which, source, after=after)
    found = tx.all(
        Sql(
            f"SELECT t.id, t.created_at FROM ({read.all}{' LIMIT :scanned' if source.newest_first else ''}) t "
            f"WHERE {read.matches} ORDER BY t.created_at DESC, t.id DESC LIMIT :limit"
        ),
        limit=limit,
        **read.values,
        **({"scanned": scanned} if source.newest_first else {}),
    )
    if len(found) == limit:
        return found, found[-1]
    if not source.newest_first:
        return found, None
    return found, tx.first(Sql(f"{read.keys} LIMIT 1 OFFSET :skipped"), skipped=scanned - 1, **read.values)


def _window(which: TicketFilter, after: str | None) -> tuple[list[str], dict[str, Any]]:
    terms, values = list[str](), dict[str, Any]()
    if which.since:
        terms, values = ["t.created_at >= :since"], {"since": which.since}
    if which.before:
        terms.append("t.created_at < :before")
        values["before"] = which.before
    if after is not None:
        values["created"], values["after_id"] = read_cursor(after)
        terms.append("(t.created_at < :created OR t.created_at = :created AND t.id < :after_id)")
        terms.append("t.created_at <= :created")  # the index starts there
    return terms, values


def _conditions(which: TicketFilter, states: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    terms, values = list[str](), dict[str, Any]()
    values |= _named("id", which.ids)
    for name, some in (("state", states), ("agent_id", which.agent_ids), ("workflow_id", which.workflow_ids)):
        if some:
            terms.append(f"t.{name} IN {_in(name, some)}")
            values |= _named(name, some)
    if which.project_id is not None:
        terms.append("t.project_id = :project_id")
        values["project_id"] = which.project_id
    if "\0" in which.text:  # which no text has; LIKE would end there
        terms.append("1 = 0")
    elif which.text:
        escaped = "".join(f"!{c}" if c in "!%_" else c for c in which.text)
        # SQLite lowers ASCII letters only: others are looked for in each case that people write.
        cases = dict.fromkeys(_ascii_lower(one) for one in (escaped.lower(), escaped, escaped.upper(), escaped.title()))
        names = [f"text_{number}" for number in range(len(cases))]
        found = [f"lower(t.{column}) LIKE :{name} ESCAPE '!'" for column in ("title", "error") for name in names]
        terms.append(f"({' OR '.join(found)} OR t.id LIKE :id_text ESCAPE '!')")
        values |= {name: f"%{one}%" for name, one in zip(names, cases, strict=True)} | {"id_text": f"{escaped}%"}
    return terms, values


def _ascii_lower(text: str) -> str:
    return "".join(c.lower() if c.isascii() else c for c in text)


def _named(name: str, some: Sequence[str]) -> dict[str, str]:
    return {f"{name}_{number}": str(one) for number, one in enumerate(some)}


def _in(name: str, some: Sequence[str]) -> str:
    return f"({', '.join(':' + one for one in _named(name, some))})"


def _place(row: Any) -> tuple[str, str]:
    """Where a row stands in the order. Other programs may have written bytes, which the database has above all text."""
    created_at, id = (
        f"\U0010ffff{each!r}" if isinstance(each, bytes) else each or "" for each in (row.created_at, row.id)
    )
    return created_at, id


def _has_address(id: object) -> bool:
    return isinstance(id, str) and validation.storable(id)


def cursor(created_at: object, id: object) -> str:
    return (
        base64.urlsafe_b64encode(json.dumps([rows.lenient(created_at), rows.lenient(id)]).encode()).decode().rstrip("=")
    )


def read_cursor(text: str) -> tuple[str, str]:
    """What `cursor` made. Raises UsageError for anything else."""
    try:
        created_at, id = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        if isinstance(created_at, str) and isinstance(id, str):
            return created_at, id
    except ValueError:
        pass
    raise UsageError("`after` must be what the page before gave")
