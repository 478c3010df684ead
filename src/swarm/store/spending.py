"""The accounts of model calls: reserved before a call, booked after it, summed for display. See `swarm.ledger`.

Booking is not fenced, since the money is spent in any case; a call stays in the accounts when its ticket is deleted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

from swarm.errors import LeaseLost, NotFound
from swarm.ledger import Account, Bill, Busy, Granted, Limit, Order, Refused, Reservation
from swarm.model import Event
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import event_values, iso, message, whole
from swarm.store.sql.transaction import Row, Tx
from swarm.store.tickets.changes import INSERT_EVENT
from swarm.store.tickets.events import APPEND_OF_SANDBOX

# Sums over the calls of one scope: what was spent, and what calls under way hold. Nobody will book a reservation of an
# attempt that has ended or was deleted: it counts as spent. A one-off run has no attempt row, so its age decides.
_LIVE: Final = "(a.id IS NOT NULL AND a.outcome IS NULL OR c.ticket_id IS NULL AND c.at >= :recent)"


def _amount(column: str) -> str:
    """Without what is no amount, where another program wrote it: a sum would overflow, or be infinite, for all."""
    return f"CASE WHEN {column} BETWEEN 0 AND 1000000000000000 THEN {column} END"


_USD: Final = _amount("c.cost_usd")
_TOKENS: Final = _amount("c.tokens")
_RESERVED_USD: Final = _amount("c.reserved_usd")
_RESERVED_TOKENS: Final = _amount("c.reserved_tokens")
_SUMS: Final = f"""
SELECT
  COALESCE(SUM(CASE WHEN c.status IS NOT NULL THEN {_USD} WHEN {_LIVE} THEN 0 ELSE {_RESERVED_USD} END), 0)
    AS spent_usd,
  COALESCE(SUM(CASE WHEN c.status IS NOT NULL THEN {_TOKENS} WHEN {_LIVE} THEN 0 ELSE {_RESERVED_TOKENS} END), 0)
    AS spent_tokens,
  COALESCE(SUM(CASE WHEN c.status IS NULL AND {_LIVE} THEN {_RESERVED_USD} END), 0) AS held_usd,
  COALESCE(SUM(CASE WHEN c.status IS NULL AND {_LIVE} THEN {_RESERVED_TOKENS} END), 0) AS held_tokens
FROM model_calls c LEFT JOIN attempts a ON a.id = c.attempt_id AND c.status IS NULL
"""
# A sandbox's: the engine that holds it will book them.
_HELD: Final = "EXISTS (SELECT 1 FROM sandboxes b WHERE b.id = c.sandbox_id AND b.hold_id = c.attempt_id)"
_OF_SANDBOX: Final = Sql(_SUMS.replace(_LIVE, _HELD) + "WHERE c.sandbox_id = :sandbox_id")
_ONE_OFF_MAX_MS: Final = 3_600_000  # a call of a one-off run that is older no longer counts as under way
# By run, not by ticket id: a new ticket with the id of a deleted one starts with nothing spent.
_OF_TICKET: Final = Sql(_SUMS + "WHERE c.run_id IN (SELECT id FROM workflow_runs WHERE ticket_id = :ticket_id)")
_OF_RUN: Final = Sql(_SUMS + "WHERE c.run_id = :run_id")
_OF_STEP: Final = Sql(_SUMS + "WHERE c.step_execution_id = :step_execution_id")
_OF_DAY: Final = Sql(_SUMS + "WHERE c.at >= :day")
_LIMITS: Final = Sql(
    "SELECT t.id, t.budget_usd, t.budget_tokens, a.budget_usd AS agent_usd, a.budget_tokens AS agent_tokens, "
    "w.budget_usd AS workflow_usd, w.budget_tokens AS workflow_tokens, w.name AS workflow, x.outcome "
    "FROM workflow_runs r JOIN tickets t ON t.id = r.ticket_id JOIN attempts x ON x.id = :attempt_id "
    "LEFT JOIN workflows w ON w.id = r.workflow_id "
    "LEFT JOIN agents a ON a.id = :agent_id WHERE r.id = :run_id"
)
_SANDBOX_LIMITS: Final = Sql(
    "SELECT b.state, b.hold_id, b.budget_usd, b.budget_tokens, a.budget_usd AS agent_usd, "
    "a.budget_tokens AS agent_tokens FROM sandboxes b LEFT JOIN agents a ON a.id = :agent_id WHERE b.id = :sandbox_id"
)
_RESERVE: Final = Sql(
    "INSERT INTO model_calls (id, at, ticket_id, run_id, step_execution_id, attempt_id, sandbox_id, agent, workflow, "
    "upstream, model, reserved_usd, reserved_tokens) VALUES (:id, :now, :ticket_id, :run_id, :step_execution_id, "
    ":attempt_id, :sandbox_id, :agent, :workflow, :upstream, :model, :usd, :tokens)"
)
_BOOK: Final = Sql(
    "UPDATE model_calls SET model = :model, status = :status, input_tokens = :input, output_tokens = :output, "
    "cache_read_tokens = :cache_read, cache_write_tokens = :cache_write, tokens = :tokens, cost_usd = :cost_usd, "
    "latency_ms = :latency_ms, note = :note WHERE id = :id AND status IS NULL RETURNING id"
)
_ADD_TO_ATTEMPT: Final = Sql(
    "UPDATE attempts SET api_tokens_used = api_tokens_used + :tokens, cost_usd = cost_usd + :usd WHERE id = :id"
)
_ADD_TO_STEP: Final = Sql("UPDATE step_executions SET api_tokens_used = api_tokens_used + :tokens WHERE id = :id")
_ADD_TO_RUN: Final = Sql(
    "UPDATE workflow_runs SET total_api_tokens = total_api_tokens + :tokens, total_cost_usd = total_cost_usd + :usd "
    "WHERE id = :id"
)
_TICKET: Final = Sql("SELECT id FROM tickets WHERE id = :id")

# How a row's note begins when its tokens and cost are an estimate.
_ESTIMATED: Final = "estimated: "
_IS_ESTIMATE: Final = f"note LIKE '{_ESTIMATED}%'"

By = Literal["ticket", "sandbox", "agent", "workflow", "model", "day"]
_GROUPS: Final[dict[By, str]] = {
    "ticket": "CASE WHEN c.sandbox_id IS NULL THEN COALESCE(c.ticket_id, '(one-off runs)') ELSE '(sandboxes)' END",
    "sandbox": "COALESCE(c.sandbox_id, '(tickets and one-off runs)')",
    "agent": "c.agent",
    "workflow": "COALESCE(c.workflow, '(none)')",
    "model": "c.model",
    "day": "substr(c.at, 1, 10)",
}
_COSTS: Final = f"""
SELECT {{group}} AS name, count(*) AS calls, COALESCE(SUM({_amount("c.input_tokens")}), 0) AS input_tokens,
  COALESCE(SUM({_amount("c.output_tokens")}), 0) AS output_tokens,
  COALESCE(SUM({_amount("c.cache_read_tokens")}), 0) AS cache_read_tokens,
  COALESCE(SUM({_amount("c.cache_write_tokens")}), 0) AS cache_write_tokens, COALESCE(SUM({_USD}), 0) AS cost_usd,
  SUM(CASE WHEN c.status IS NOT NULL AND c.cost_usd IS NULL AND c.tokens > 0 THEN 1 ELSE 0 END) AS unpriced_calls,
  SUM(CASE WHEN c.status IS NULL THEN 1 ELSE 0 END) AS open_calls,
  SUM(CASE WHEN c.{{is_estimate}} THEN 1 ELSE 0 END) AS estimated_calls,
  COALESCE(SUM(CASE WHEN c.{{is_estimate}} THEN {_USD} END), 0) AS estimated_usd
FROM model_calls c WHERE {{which}} GROUP BY {{group}} ORDER BY cost_usd DESC, name LIMIT :limit
"""

# The newest calls of a range by all that they can be summed by: one read, of a bounded length, for all pictures.
_RECENT: Final = Sql(
    f"SELECT c.hour, c.agent, c.workflow, c.model, count(*) AS calls, COALESCE(SUM({_TOKENS}), 0) AS tokens, "
    f"COALESCE(SUM({_USD}), 0) AS cost_usd, min(c.at) AS first, "
    "SUM(CASE WHEN c.status IS NOT NULL AND c.cost_usd IS NULL AND c.tokens > 0 THEN 1 ELSE 0 END) AS unpriced, "
    "SUM(CASE WHEN c.status IS NULL THEN 1 ELSE 0 END) AS under_way FROM "
    "(SELECT at, substr(at, 1, 13) AS hour, agent, workflow, model, status, tokens, cost_usd FROM model_calls "
    "WHERE at >= :since AND at < :before ORDER BY at DESC LIMIT :most) c "
    "GROUP BY c.hour, c.agent, c.workflow, c.model"
)
_ESTIMATES: Final = Sql(
    f"SELECT count(*) AS calls, COALESCE(SUM({_USD}), 0) AS usd FROM model_calls c "
    f"WHERE {_IS_ESTIMATE} AND run_id IN (SELECT id FROM workflow_runs WHERE ticket_id = :ticket_id)"
)


def reserve(tx: Tx, order: Order) -> Reservation:
    """Check every budget that this call counts against, and reserve its cost, in one transaction.

    Reads the budgets each time, so a raised budget applies at once. Raises NotFound when the ticket is deleted, and
    LeaseLost when the attempt has ended, which its worker may not know yet.
    """
    account = order.account
    of_agent = f"the budget of agent {account.agent_name} for a step"
    of_step = {"step_execution_id": account.step_execution_id}
    scopes: list[tuple[str, Limit, Sql, dict[str, Any]]]
    if account.sandbox_id is not None:
        workflow = None
        own, of_its_agent = _sandbox_limits(tx, account.sandbox_id, account)
        of_sandbox = {"sandbox_id": account.sandbox_id}
        scopes = [
            ("the sandbox's budget", own, _OF_SANDBOX, of_sandbox),
            (f"the budget of agent {account.agent_name} for a sandbox", of_its_agent, _OF_SANDBOX, of_sandbox),
        ]
    elif account.ticket_id is None:
        workflow = None
        scopes = [(of_agent, account.agent_budget, _OF_STEP, of_step)]
    else:
        row = tx.first(_LIMITS, run_id=account.run_id, agent_id=account.agent_id, attempt_id=account.attempt_id)
        if row is None:
            raise NotFound(f"the ticket {account.ticket_id} was deleted, so its agent can no longer call a model")
        if row.outcome is not None:
            raise LeaseLost(f"this attempt has ended ({row.outcome}) and can no longer call a model")
        workflow, of_run = row.workflow, {"run_id": account.run_id}
        limits = _limit(row.workflow_usd, row.workflow_tokens)
        scopes = [
            ("the ticket's budget", _limit(row.budget_usd, row.budget_tokens), _OF_TICKET, {"ticket_id": row.id}),
            (of_agent, _limit(row.agent_usd, row.agent_tokens), _OF_STEP, of_step),
            (f"the budget of workflow {workflow} for a run", limits, _OF_RUN, of_run),
        ]
    scopes.append(("this installation's budget for today (UTC)", order.day, _OF_DAY, {"day": tx.now[:10]}))
    recent = iso(tx.now_ms - _ONE_OFF_MAX_MS)
    usd, tokens = order.most.usd, order.most.tokens
    # A stream ends at what is left of the budget, not at its own reservation: it may cost more than estimated.
    left_usd: float | None = None
    left_tokens: int | None = None
    busy = short = ""
    for name, limit, statement, values in scopes:
        if limit.usd is None and limit.tokens is None:
            continue
        [sums] = tx.all(statement, recent=recent, **values)
        refusal = _refusal(name, limit, sums, order)
        if refusal:
            return Refused(message=refusal)
        if limit.usd is not None and usd is not None:
            left = limit.usd - sums.spent_usd - sums.held_usd
            if limit.usd - sums.spent_usd < (order.most.usd or 0):
                short = short or f"{name} is {_usd(limit.usd)}, and {_usd(sums.spent_usd)} of it was spent before"
            left_usd, usd = min(left, left if left_usd is None else left_usd), min(usd, left)
            busy = busy or (f"calls under way have reserved the rest of {name}" if usd < (order.least.usd or 0) else "")
        if limit.tokens is not None:
            rest = limit.tokens - sums.spent_tokens - sums.held_tokens
            if limit.tokens - sums.spent_tokens < order.most.tokens:
                short = short or f"{name} is {limit.tokens:,} tokens, and {sums.spent_tokens:,} were spent before"
            left_tokens, tokens = min(rest, rest if left_tokens is None else left_tokens), min(tokens, rest)
            busy = busy or (f"calls under way have reserved the rest of {name}" if tokens < order.least.tokens else "")
    if busy:
        return Busy(message=busy)
    tx.run(
        _RESERVE,
        id=order.id,
        now=tx.now,
        ticket_id=account.ticket_id,
        run_id=account.run_id or None,
        step_execution_id=account.step_execution_id or None,
        attempt_id=account.attempt_id,
        sandbox_id=account.sandbox_id,
        agent=account.agent_name,
        workflow=workflow,
        upstream=order.upstream,
        model=message(order.model),
        usd=usd,
        tokens=tokens,
    )
    return Granted(usd=left_usd, tokens=left_tokens, short=short)


def _sandbox_limits(tx: Tx, id: str, account: Account) -> tuple[Limit, Limit]:
    """The sandbox's own budget, and its agent's where it has none. Raises NotFound and LeaseLost."""
    row = tx.first(_SANDBOX_LIMITS, sandbox_id=id, agent_id=account.agent_id)
    if row is None:
        raise NotFound(f"the sandbox {id} was deleted, so it can no longer call a model")
    if row.hold_id != account.attempt_id:
        raise LeaseLost(f"this engine no longer holds the sandbox {id}, which is {row.state}: it can't call a model")
    own, of_agent = _limit(row.budget_usd, row.budget_tokens), _limit(row.agent_usd, row.agent_tokens)
    return own, Limit(
        usd=of_agent.usd if own.usd is None else None, tokens=of_agent.tokens if own.tokens is None else None
    )


def _limit(usd: object, tokens: object) -> Limit:
    """A budget from a row that any tool may have written; a value that is not a number counts as 0. So does a NaN, with
    which every sum would do."""
    is_number = isinstance(usd, int | float) and not math.isnan(usd)
    return Limit(
        usd=None if usd in (None, "") else float(usd) if is_number else 0.0,  # type: ignore[arg-type]
        tokens=None if tokens in (None, "") else whole(tokens) or 0,
    )


def _refusal(name: str, limit: Limit, sums: Row, order: Order) -> str:
    """Why the call can't be made even after all calls under way have ended, with the sums; '' if it can."""
    if limit.usd is not None:
        if order.least.usd is None:
            return (
                f"the price of model {order.model!r} is unknown, so {name} ({_usd(limit.usd)}) can't be enforced; "
                "add the model to the price list (docs/claude.md), or set the budget in tokens"
            )
        if sums.spent_usd + order.least.usd > limit.usd:
            return (
                f"over budget: {name} is {_usd(limit.usd)}, {_usd(sums.spent_usd)} of it is spent, and the next call "
                f"of {order.model} needs at least {_usd(order.least.usd)}"
            )
    if limit.tokens is not None and sums.spent_tokens + order.least.tokens > limit.tokens:
        return (
            f"over budget: {name} is {limit.tokens:,} tokens, {sums.spent_tokens:,} of them are spent, and the next "
            f"call of {order.model} needs at least {order.least.tokens:,}"
        )
    return ""


def _usd(amount: float) -> str:
    return f"${amount:.6f}".rstrip("0").rstrip(".") if amount >= 0.000001 or amount == 0 else f"${amount:.2g}"


def book(tx: Tx, bill: Bill) -> None:
    """Replaces the reservation; called again with the same bill, it changes nothing."""
    counts = {kind: bill.counts.get(kind, 0) for kind in ("input", "output", "cache_read", "cache_write")}
    booked = tx.first(
        _BOOK,
        id=bill.id,
        model=message(bill.model),
        status=bill.status,
        tokens=bill.tokens,
        cost_usd=bill.cost_usd,
        latency_ms=round(bill.latency_ms, 3),
        note=message(f"{_ESTIMATED}{bill.note}" if bill.estimated else bill.note) or None,
        **counts,
    )
    if booked is None:
        return
    account, usd = bill.account, bill.cost_usd or 0.0
    if bill.tokens:
        tx.run(_ADD_TO_ATTEMPT, id=account.attempt_id, tokens=bill.tokens, usd=usd)
        tx.run(_ADD_TO_STEP, id=account.step_execution_id, tokens=bill.tokens)
        tx.run(_ADD_TO_RUN, id=account.run_id, tokens=bill.tokens, usd=usd)
    event = _event(bill, counts)
    if account.sandbox_id is not None:
        tx.run(APPEND_OF_SANDBOX, **event_values(event, tx.now))
    elif account.ticket_id is not None and tx.first(_TICKET, id=account.ticket_id) is not None:
        tx.run(INSERT_EVENT, **event_values(event, tx.now))


def _event(bill: Bill, counts: dict[str, int]) -> Event:
    data: dict[str, object] = {
        "call": bill.id,
        "upstream": bill.upstream,
        "model": bill.model,
        "status": bill.status,
        **{f"{kind}_tokens": count for kind, count in counts.items()},
        "cost_usd": bill.cost_usd,
        "latency_ms": round(bill.latency_ms, 3),
        "first_byte_ms": None if bill.first_byte_ms is None else round(bill.first_byte_ms, 3),
        "streamed": bill.streamed,
    }
    if bill.estimated:
        data["estimated"] = True
    if bill.note:
        data["note"] = bill.note
    account = bill.account
    if account.sandbox_id is not None:
        return Event(ticket_id="", sandbox_id=account.sandbox_id, kind="model_call", data=data)
    return Event(
        ticket_id=account.ticket_id or "",
        step_id=account.step_id,
        attempt_id=account.attempt_id,
        kind="model_call",
        data=data,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Calls of a ticket, sandbox, agent, workflow, model or day. ``cost_usd`` leaves out ``unpriced_calls``, whose
    model has no price, and ``open_calls``, which still run or were cut off when their engine died. Of it,
    ``estimated_usd`` are estimates: those of ``estimated_calls``, whose answers didn't say what they cost."""

    name: str
    calls: int
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    cost_usd: float
    unpriced_calls: int
    open_calls: int
    estimated_calls: int
    estimated_usd: float


def costs(tx: Tx, by: By, *, since: str, limit: int) -> list[Costs]:
    """Most expensive first; days in order."""
    sql = Sql(_COSTS.format(group=_GROUPS[by], is_estimate=_IS_ESTIMATE, which="c.at >= :since"))
    rows = tx.all(sql, since=since, limit=limit)
    found = [Costs(**row._asdict()) for row in rows]
    return sorted(found, key=lambda c: c.name) if by == "day" else found


_COSTS_OF_SANDBOX: Final = Sql(
    _COSTS.format(group="c.sandbox_id", is_estimate=_IS_ESTIMATE, which="c.sandbox_id = :name")
)


def of_sandbox(tx: Tx, id: str) -> Costs | None:
    """None if it has called no model."""
    row = tx.first(_COSTS_OF_SANDBOX, name=id, limit=1)
    return Costs(**row._asdict()) if row is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Calls of one hour ('2026-01-31T17'), agent, workflow and model. ``unpriced`` and ``under_way`` ones are not in
    ``cost_usd``; ``first``: the time of the oldest of them."""

    hour: str
    agent: str | None
    workflow: str | None
    model: str | None
    calls: int
    tokens: int
    cost_usd: float
    first: str
    unpriced: int
    under_way: int


def recent(tx: Tx, *, since: str, before: str, most: int) -> list[Spent]:
    """The newest ``most`` calls of a range. If there are so many in the result, there may be older ones."""
    return [Spent(**row._asdict()) for row in tx.all(_RECENT, since=since, before=before, most=most)]


def estimates(tx: Tx, ticket_id: str) -> tuple[int, float]:
    """How many of a ticket's calls are estimates, and their USD."""
    row = tx.first(_ESTIMATES, ticket_id=ticket_id)
    return (row.calls, row.usd) if row is not None else (0, 0.0)
