"""Sums of model calls by hour. Each hour that is over is read once and kept, so that a page over a month of a million
calls sums only the last hours anew; until all are read, each request reads some more of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final

from swarm.store.spending import Spent
from swarm.store.store import Store

MOST_CALLS: Final = 7_500  # that one read sums: some 12 ms, and a request may do two
_OPEN_HOURS: Final = 3  # a call is booked within an hour; of older hours, nothing changes
_KEPT: Final = 50_000  # sums
_OLDEST: Final = timedelta(days=32)  # that any page asks for


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """``since``: no call after this time is missing. Not ``complete``: there may be older ones. ``more``: the next
    request will have some of them."""

    rows: Sequence[Spent]
    since: str
    complete: bool
    more: bool = False


class Hours:
    def __init__(self, most: int = _KEPT) -> None:
        self._known: dict[str, Sequence[Spent]] = {}  # by hour, '2026-01-31T17'
        self._days: dict[str, Sequence[Spent]] = {}  # of which all hours are known
        self._kept, self._most = 0, most
        self._lock = asyncio.Lock()

    async def since(self, store: Store, first: datetime, *, now: datetime | None = None) -> Sums:
        """From the hour of ``first`` on, until ``now``."""
        now = now or datetime.now(UTC)
        count = int((now - first).total_seconds() // 3600) + 1
        hours = [_name(first + timedelta(hours=number)) for number in range(count + 1) if first <= now]
        hours = [hour for hour in hours if hour <= _name(now)]
        over, recent = hours[:-_OPEN_HOURS], hours[-_OPEN_HOURS:]
        async with self._lock:
            fresh = await store.recent_costs(since=recent[0], most=MOST_CALLS)
            whole = sum(row.calls for row in fresh) < MOST_CALLS
            missing = [hour for hour in over if hour not in self._known]
            more = False
            self._forget(_name(now - _OLDEST), missing)
            if whole and missing and self._kept < self._most:
                more = await self._read(store, missing, recent[0])
        rows, since = list(fresh), recent[0] if whole else min((row.first for row in fresh), default=recent[0])
        left = len(over) if whole else 0
        while left:
            hour = over[left - 1]
            if left >= 24 and over[left - 24] == f"{hour[:10]}T00" and (day := self._day(over[left - 24 : left])):
                rows += day
                left -= 24
            elif hour in self._known:
                rows += self._known[hour]
                left -= 1
            else:
                return Sums(rows=rows, since=_time(since), complete=False, more=more)
            since = over[left]
        return Sums(rows=rows, since=_time(since), complete=whole)

    def _forget(self, oldest: str, missing: Sequence[str]) -> None:
        """What no page asks for any more; and, when too much is kept, old hours in favour of new ones."""
        for hour in sorted(self._known):
            if hour >= oldest and (self._kept < self._most or not missing or hour > missing[-1]):
                return
            self._kept -= len(self._known.pop(hour))
            self._days.pop(hour[:10], None)

    def _day(self, hours: Sequence[str]) -> Sequence[Spent]:
        """The sums of a day's 24 hours; empty if they are not known, or if there are none."""
        name = hours[0][:10]
        if name not in self._days:
            if any(hour not in self._known for hour in hours):
                return ()
            self._days[name] = _joined(row for hour in hours for row in self._known[hour])
        return self._days[name]

    async def _read(self, store: Store, missing: Sequence[str], end: str) -> bool:
        """The newest hours that are missing, as far as one read goes; False if that is not even one hour."""
        before = next((hour for hour in sorted(self._known) if hour > missing[-1]), end)
        rows = await store.recent_costs(since=missing[0], before=before, most=MOST_CALLS)
        if sum(row.calls for row in rows) >= MOST_CALLS:  # of the oldest hour, some calls may be missing
            oldest = min(row.hour for row in rows)
            if any(row.hour > oldest for row in rows):
                rows = [row for row in rows if row.hour > oldest]
                missing = [hour for hour in missing if hour > oldest]
            else:
                return False
        for hour in missing:
            self._known[hour] = [row for row in rows if row.hour == hour]
        self._kept += len(rows)
        return True


def _joined(rows: Iterable[Spent]) -> list[Spent]:
    """Of the same agent, workflow and model: one sum."""
    found: dict[tuple[str | None, ...], list[Spent]] = {}
    for row in rows:
        found.setdefault((row.agent, row.workflow, row.model), []).append(row)
    return [
        replace(
            some[0],
            calls=sum(row.calls for row in some),
            tokens=sum(row.tokens for row in some),
            cost_usd=sum(row.cost_usd for row in some),
            unpriced=sum(row.unpriced for row in some),
            under_way=sum(row.under_way for row in some),
        )
        for some in found.values()
    ]


def _time(hour: str) -> str:
    return f"{hour}:00:00Z" if len(hour) == len("2026-01-31T17") else hour


def _name(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H")
