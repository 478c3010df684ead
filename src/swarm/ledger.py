"""What model calls cost, as values between the gateway, which makes the calls, and the store, which keeps the books.

A call is *reserved* before it is made and *booked* when it has ended. Both are rows of the database at once, so a
budget holds over retries, over the steps of a run that go on side by side, over engines, and over the death of one:
a reservation whose owner died counts as spent in full, since nobody knows what was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A budget; None: as much as one likes."""

    usd: float | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Whose call it is. All ids are the store's, but those of a one-off run: it has no ticket, and no rows.
    ``agent_budget`` holds then; else the agent's row is asked."""

    ticket_id: str | None
    run_id: str
    step_execution_id: str
    step_id: str
    attempt_id: str
    agent_id: str
    agent_name: str
    agent_budget: Limit = field(default_factory=Limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """Tokens of every kind together, and their price; ``usd`` is None when the model's price is not known."""

    tokens: int
    usd: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A call that is about to be made. ``most``: what it may cost; ``least``: less than this is of no use to it.
    ``day``: what all calls of a day (UTC) may cost together."""

    id: str
    account: Account
    upstream: str
    model: str
    most: Spend
    least: Spend
    day: Limit = field(default_factory=Limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """Go on, and spend no more than this: what the budgets have left. Reserved of it is at most the order's."""

    usd: float | None
    tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """Calls under way hold what is left of the budget: ask again when one of them has ended."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The budget does not allow it. ``message`` has the sums."""

    message: str


Reservation = Granted | Busy | Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """A call that has ended. ``status`` is HTTP's, 0 when there was no answer. ``estimated``: the answer did not come
    to its end, so its output was counted from what came. ``note`` says what went wrong, or why there is no price."""

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


class Ledger(Protocol):
    """Where calls are reserved and booked: the store, or nowhere where there is none."""

    async def reserve(self, order: Order) -> Reservation: ...

    async def book(self, bill: Bill) -> None: ...


class Unbooked:
    """For one-off runs on a host without a database: there is no budget, and nothing is kept."""

    async def reserve(self, order: Order) -> Reservation:
        return Granted(usd=None, tokens=None)

    async def book(self, bill: Bill) -> None:
        return
