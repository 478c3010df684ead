"""Cron expressions: five fields (minute, hour, day of month, month, day of week), and when they come true next."""

from __future__ import annotations

import datetime
import zoneinfo
from dataclasses import dataclass
from typing import Final

_FIELDS: Final = (("minute", 0, 59), ("hour", 0, 23), ("day of month", 1, 31), ("month", 1, 12), ("day of week", 0, 7))
_MONTHS: Final = {
    "jan": 1, "feb": 2, "mar": 3, "apr": 4, "may": 5, "jun": 6,
    "jul": 7, "aug": 8, "sep": 9, "oct": 10, "nov": 11, "dec": 12,
}  # fmt: skip
_DAYS: Final = {name: i for i, name in enumerate(["sun", "mon", "tue", "wed", "thu", "fri", "sat"])}
_MACROS: Final = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
}
_SEARCHED_DAYS: Final = 366 * 8 + 8  # 29 February can be eight years away (1896-1904, 2096-2104)


@dataclass(frozen=True, slots=True)
class Cron:
    """The values at which each field matches. Days of week count from Sunday, 0."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either_day: bool  # both day fields are restricted: then one of them is enough, as in every cron

    def matches(self, day: datetime.date) -> bool:
        by_month, by_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return day.month in self.months and (by_month or by_week if self.either_day else by_month and by_week)


def parse(text: str) -> Cron:
    """Raises ValueError that names the field."""
    parts = _MACROS.get(text.strip(), text).split()
    if len(parts) != 5:
        raise ValueError(f"{text!r} is no cron expression: five fields are wanted, such as '0 6 * * mon-fri'")
    values = [_field(part, *bounds) for part, bounds in zip(parts, _FIELDS, strict=True)]
    weekdays = frozenset(day % 7 for day in values[4])
    cron = Cron(
        values[0],
        values[1],
        values[2],
        values[3],
        weekdays,
        not parts[2].startswith("*") and not parts[4].startswith("*"),
    )
    longest = max({2: 29, 4: 30, 6: 30, 9: 30, 11: 30}.get(month, 31) for month in cron.months)
    if not cron.either_day and min(cron.days) > longest:
        raise ValueError(f"{text!r} never comes true: no such day in such a month")
    return cron


def _field(text: str, name: str, low: int, high: int) -> frozenset[int]:
    found: set[int] = set()
    for one in text.split(","):
        span, slash, step_text = one.partition("/")
        first, dash, last = span.partition("-")
        try:
            start, end = (low, high) if span == "*" else (_value(first, name), _value(last if dash else first, name))
            step = int(step_text) if slash else 1
        except ValueError:
            raise ValueError(f"{one!r} is no {name}") from None
        if slash and not dash and span != "*":
            end = high
        if not (low <= start <= end <= high and 1 <= step <= high + 1):
            raise ValueError(f"{one!r} is no {name}: {low} to {high}")
        found.update(range(start, end + 1, step))
    return frozenset(found)


def _value(text: str, name: str) -> int:
    names = _MONTHS if name == "month" else _DAYS if name == "day of week" else {}
    if not text.isascii() or len(text) > 3:
        raise ValueError(text)
    return names[text.lower()] if text.lower() in names else int(text)


def zone(name: str) -> zoneinfo.ZoneInfo:
    """Raises ValueError."""
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{name!r} is no time zone; write one such as Europe/Paris, or UTC") from None


def next_after(cron: Cron, zone: zoneinfo.ZoneInfo, moment: datetime.datetime) -> datetime.datetime:
    """The first time after ``moment`` (aware) at which it comes true, in UTC.

    A local time that the clock skips is taken at the moment after the gap; one that it shows twice counts once.
    """
    moment = moment.astimezone(datetime.UTC)
    day = moment.astimezone(zone).date()
    for _ in range(_SEARCHED_DAYS):
        if cron.matches(day):
            for hour in sorted(cron.hours):
                for minute in sorted(cron.minutes):
                    local = datetime.datetime.combine(day, datetime.time(hour, minute), zone)
                    when = local.astimezone(datetime.UTC)
                    if when > moment:
                        return when
        day += datetime.timedelta(days=1)
    raise ValueError("never comes true")
