"""Cron expressions in a time zone: when they are due, and which of the times that have passed are run.

Expressions, and what happens when clocks change, are as in Debian's cron (by cronsim): a fixed time that is skipped
(30 2 in spring) runs at the first moment after the gap, one that comes twice runs once; `*/10 * * * *` runs every ten
minutes of real time.
"""

from __future__ import annotations

import datetime
import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cronsim import CronSim, CronSimError

from swarm.workflow.definition import Schedule

# Of the times that passed while no engine ran, `missed: all` runs at most this many, the newest; others aren't counted.
MAX_CAUGHT_UP: Final = 100
# A time handled within this long isn't missed, even after a restart: cron expressions have no seconds.
IN_TIME: Final = datetime.timedelta(seconds=60)

_MACROS: Final = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_FIELDS: Final = {
    "minute": "0 to 59",
    "hour": "0 to 23",
    "day-of-month": "1 to 31, within the month, or L for its last",
    "month": "1 to 12, or jan to dec",
    "day-of-week": "0 to 7, or sun to sat",
}
_ANY_MOMENT: Final = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class Cron:
    """An expression with its zone. Made by `parse`."""

    fields: str
    zone: zoneinfo.ZoneInfo

    def after(self, moment: datetime.datetime) -> datetime.datetime:
        """The first time after ``moment`` (aware), in UTC. Raises ValueError if there is none."""
        return self._next(moment, moment)

    def between(self, first: datetime.datetime, last: datetime.datetime, newest: int) -> list[datetime.datetime]:
        """Up to ``newest`` of the last times from ``first`` to ``last``, both included; oldest first.

        Ten years take no longer than a day: it looks back in ever longer steps until it has enough.
        """
        back = datetime.timedelta(hours=1)
        while True:
            start = max(first, last - back)
            found: list[datetime.datetime] = []
            moment = start - datetime.timedelta(seconds=1)
            while (moment := self._next(moment, moment)) <= last:
                if moment >= start:
                    found.append(moment)
            if len(found) >= newest or start == first:
                return found[-newest:]
            back *= 4

    def _next(self, start: datetime.datetime, after: datetime.datetime) -> datetime.datetime:
        for local in CronSim(self.fields, start.astimezone(self.zone)):
            # In an hour that comes twice, cronsim may return a time of its first pass, which is not after ``after``.
            if (found := local.astimezone(datetime.UTC)) > after:
                return found
        raise ValueError(f"{self.fields!r} never occurs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do about a schedule that is due."""

    run: Sequence[datetime.datetime]  # UTC, oldest first
    dropped: int  # other times that passed and will not run
    next: datetime.datetime


def parse(text: str, time_zone: str = "UTC") -> Cron:
    """Raises ValueError with a sentence for people."""
    fields = _MACROS.get(text.strip().lower(), text)
    if len(fields.split()) != 5:
        raise ValueError(f"{text!r} isn't a cron expression: write five fields, such as '0 6 * * mon-fri'")
    cron = Cron(fields, zone(time_zone))
    try:
        cron.after(_ANY_MOMENT)
    except CronSimError as error:
        raise ValueError(_explain(fields, str(error))) from None
    except ValueError:
        raise ValueError(f"{text!r} never occurs") from None
    return cron


def _explain(fields: str, error: str) -> str:
    """cronsim's `Bad hour`, as a sentence that quotes the field."""
    for (name, values), given in zip(_FIELDS.items(), fields.split(), strict=True):
        if error.endswith(f" {name}"):
            return f"{given!r} isn't a {name.replace('-', ' ')}: use {values}"
    return f"{fields!r} isn't a cron expression: {error}"


class ZoneMissing(ValueError):
    """This host has no data of a time zone. That may pass: the package may be being upgraded."""


def zone(name: str) -> zoneinfo.ZoneInfo:
    """Raises ValueError."""
    why = f"{name!r} isn't a time zone; write one such as Europe/Paris, or UTC"
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, OSError):
        raise ZoneMissing(why) from None
    except ValueError:
        raise ValueError(why) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """The ticket of the previous time: is it running, or when did it end (aware; None: long ago, or no such ticket)?"""

    running: bool = False
    ended: datetime.datetime | None = None


def is_held(schedule: Schedule, before: Before) -> bool:
    """Must the next time wait until the ticket ``before`` has ended?"""
    return before.running and schedule.overlap == "queue"


def plan(schedule: Schedule, due: datetime.datetime, now: datetime.datetime, before: Before | None = None) -> Plan:
    """What to do ``now``, by the schedule's policies, about the time ``due`` (not in the future) and those since.

    A time handled `IN_TIME` never counts as missed. Raises ValueError.
    """
    before = before or Before()
    cron = parse(schedule.cron, schedule.time_zone)
    passed = cron.between(due, now, MAX_CAUGHT_UP + 1)
    was_held = schedule.overlap == "queue" and before.ended is not None and before.ended >= due
    if before.running and schedule.overlap == "skip":
        run: Sequence[datetime.datetime] = ()
    elif was_held:
        run = passed[-1:]
    elif schedule.missed == "all":
        run = passed[-MAX_CAUGHT_UP:]
    elif schedule.missed == "once":
        run = passed[-1:]
    else:
        run = [moment for moment in passed[-1:] if now - moment <= IN_TIME]
    return Plan(run=run, dropped=len(passed) - len(run), next=cron.after(now))
