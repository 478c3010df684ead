"""Lists of tickets for people: a page at a time, by filters, newest first. What one page reads is bounded, however many
tickets there are and however few of them match."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from swarm.errors import UsageError
from swarm.model import TERMINAL_TICKET_STATES
from swarm.store.sql import rows
from swarm.store.sql.database import Tx
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import SUMMARY_COLUMNS, TicketSummary

SCANNED: Final = 10_000  # tickets that one page may look at
COUNTED: Final = 10_000  # "more than that" is all that a person needs to know

_FILTERED: Final = "t.id, t.created_at, t.state, t.project_id, t.agent_id, t.workflow_id"
_SUMMARIES: Final = Sql(f"SELECT {SUMMARY_COLUMNS} FROM tickets t WHERE t.id IN :ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketFilter:
    """Which tickets. ``agent_ids`` and ``workflow_ids``: of any of these; ``text``: in the title or the error, or at
    the beginning of the id; ``since`` and ``before``: when they were made, ISO-8601."""

    states: tuple[str, ...] = ()
    project_id: str | None = None
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
    found, more = _matching(tx, which, after=after, limit=limit)
    whole = {row.id: row for row in tx.all_in(_SUMMARIES, [row.id for row in found])}
    return TicketPage(tickets=[rows.ticket_summary(whole[row.id]) for row in found], after=more)


def ids(tx: Tx, which: TicketFilter, *, after: str | None, limit: int) -> tuple[list[str], str | None]:
    """The ids of a page, and where the next one starts."""
    found, more = _matching(tx, which, after=after, limit=limit)
    return [row.id for row in found], more


def count(tx: Tx, which: TicketFilter) -> Count:
    """At most `COUNTED`."""
    found, more = _matching(tx, which, after=None, limit=COUNTED)
    return Count(number=len(found), exact=more is None)


def _matching(tx: Tx, which: TicketFilter, *, after: str | None, limit: int) -> tuple[list[Any], str | None]:
    """Rows of `_FILTERED`, and where the rest begins. Ended tickets of one state come from an index of their own; all
    others are looked for among those made last."""
    sources = _sources(which.states)
    found, end = list[Any](), list[Any]()
    for states, indexed in sources:
        some, last = _from(tx, which, states, indexed, after=after, limit=limit)
        found += some
        end += [last] if last is not None else []
    found.sort(key=lambda row: (row.created_at or "", row.id), reverse=True)
    # A source that was not read to its end may have more before its last row: nothing older than that is shown yet.
    edge = max(((row.created_at or "", row.id) for row in end), default=None)
    if edge is not None:
        found = [row for row in found if (row.created_at or "", row.id) >= edge]
    if len(found) > limit:
        found = found[:limit]
        edge = (found[-1].created_at or "", found[-1].id)
    return found, None if edge is None else _cursor(*edge)


def _sources(states: Sequence[str]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Groups of states, and whether they are read by the index of ended tickets."""
    for state in dict.fromkeys(states):
        if state in TERMINAL_TICKET_STATES:
            yield (state,), True
    if others := tuple(state for state in dict.fromkeys(states) if state not in TERMINAL_TICKET_STATES):
        yield others, False
    if not states:
        yield (), False


def _from(
    tx: Tx, which: TicketFilter, states: tuple[str, ...], indexed: bool, *, after: str | None, limit: int
) -> tuple[list[Any], Any]:
    """The first matching rows of one source, and the last row looked at if there may be more."""
    values: dict[str, Any] = {"scanned": SCANNED, "limit": limit}
    window = ["t.created_at >= :since"] if which.since else []
    if which.since:
        values["since"] = which.since
    if which.before:
        window.append("t.created_at < :before")
        values["before"] = which.before
    if after is not None:
        values["created"], values["id"] = _read_cursor(after)
        window.append("(t.created_at < :created OR t.created_at = :created AND t.id < :id)")
        window.append("t.created_at <= :created")  # the index starts there
    if indexed:
        values["state"] = states[0]
        window.append("t.state = :state AND t.state IN ('done', 'failed', 'cancelled')")
    where, named = _conditions(which, () if indexed else states)
    values |= named
    in_window = f"FROM tickets t WHERE {' AND '.join(window) or '1 = 1'} ORDER BY t.created_at DESC, t.id DESC"
    text = ", substr(t.title, 1, 500) AS title, substr(t.error, 1, 500) AS error" if which.text else ""
    found = tx.all(
        Sql(
            f"SELECT t.id, t.created_at FROM (SELECT {_FILTERED}{text} {in_window} LIMIT :scanned) t "
            f"WHERE {where} ORDER BY t.created_at DESC, t.id DESC LIMIT :limit"
        ),
        **values,
    )
    if len(found) == limit:
        return found, found[-1]
    last = tx.all(Sql(f"SELECT t.id, t.created_at {in_window} LIMIT 1 OFFSET {SCANNED - 1}"), **_without(values))
    return found, last[0] if last else None


def _without(values: dict[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in values.items() if name in ("since", "before", "created", "id", "state")}


def _conditions(which: TicketFilter, states: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    terms, values = ["1 = 1"], dict[str, Any]()
    for name, some in (("state", states), ("agent_id", which.agent_ids), ("workflow_id", which.workflow_ids)):
        if some:
            names = {f"{name}_{number}": str(one) for number, one in enumerate(some)}
            terms.append(f"t.{name} IN ({', '.join(':' + one for one in names)})")
            values |= names
    if which.project_id is not None:
        terms.append("t.project_id = :project_id")
        values["project_id"] = which.project_id
    if which.text:
        terms.append(
            "(lower(t.title) LIKE :text ESCAPE '!' OR lower(t.error) LIKE :text ESCAPE '!' "
            "OR t.id LIKE :id_text ESCAPE '!')"
        )
        escaped = "".join(f"!{c}" if c in "!%_" else c for c in which.text.lower())
        values |= {"text": f"%{escaped}%", "id_text": f"{escaped}%"}
    return " AND ".join(terms), values


def _cursor(created_at: str, id: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([created_at, id]).encode()).decode().rstrip("=")


def _read_cursor(text: str) -> tuple[str, str]:
    try:
        created_at, id = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        if isinstance(created_at, str) and isinstance(id, str):
            return created_at, id
    except ValueError:
        pass
    raise UsageError("`after` must be what the page before gave")
