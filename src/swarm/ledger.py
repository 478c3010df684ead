"""What model calls cost: values shared by the gateway, which makes the calls, and the store, which records them.

A call is *reserved* before it is made and *booked* when it has ended. Both are written to the database at once, so a
budget holds across retries, parallel steps, engines and crashes: a reservation whose owner died counts as spent in
full, since the real amount is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A budget; None: unlimited."""

    usd: float | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The owner of a call. The ids are those of the store; a one-off run has made-up ids, no ticket and no rows.
    ``agent_budget`` is used only for one-off runs; for others the agent's row is read.

    With a ``sandbox_id``, it is a sandbox, which has no ticket, run or step: ``attempt_id`` is the hold's id, and the
    budget is that of its row, or else of its agent's."""

    ticket_id: str | None
    run_id: str
    step_execution_id: str
    step_id: str
    attempt_id: str
    agent_id: str
    agent_name: str
    agent_budget: Limit = field(default_factory=Limit)
    sandbox_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """Tokens of all kinds together, and their price; ``usd`` is None when the model's price is not known."""

    tokens: int
    usd: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A call that is about to be made. ``most``: what it may cost at most; ``least``: with less it is not worth making.
    ``day``: what all calls of a day (UTC) may cost together. ``counts``: the tokens of ``most`` by kind, as in `Bill`.
    """

    id: str
    account: Account
    upstream: str
    model: str
    most: Spend
    least: Spend
    day: Limit = field(default_factory=Limit)
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """The call may spend up to this: what the budgets have left. The reservation is at most the order's ``most``.
    ``short``: which budget can't pay for all of ``most``, with the sums; '' if there is none, or only calls under way
    hold the rest."""

    usd: float | None
    tokens: int | None
    short: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """Calls under way have reserved the rest of the budget: try again when one of them has ended."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The budget does not allow the call. ``message`` has the amounts."""

    message: str


Reservation = Granted | Busy | Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """An ended call. ``status`` is the HTTP status, 0 without an answer. ``estimated``: the counts are estimates, since
    the answer was incomplete or had none. ``note`` says what went wrong, or why there is no price."""

    id: str
    account: Account
    upstream: str
    model: str
    status: int
    counts: Mapping[str, int]  # input, output, cache_read, cache_write: tokens
    cost_usd: float | None
    latency_ms: float
    first_byte_ms: float | None = None
    streamed: bool = False
    estimated: bool = False
    note: str = ""

    @property
    def tokens(self) -> int:
        return sum(self.counts.values())

    @property
    def failed(self) -> bool:
        """It was work for the gateway, and cost the agent nothing, or had no answer."""
        return not 200 <= self.status < 300 or not self.tokens


class Ledger(Protocol):
    """Where calls are reserved and booked: the store, or `Unbooked`."""

    async def reserve(self, order: Order) -> Reservation: ...

    async def book(self, bill: Bill) -> None: ...


class Unbooked:
    """For one-off runs on a host without a database: no budgets, and nothing is recorded."""

    async def reserve(self, order: Order) -> Reservation:
        return Granted(usd=None, tokens=None)

    async def book(self, bill: Bill) -> None:
        return
