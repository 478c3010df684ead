"""Cron expressions in a time zone: when they come true, and which of the times that have passed are to be run.

The expressions are those of Debian's cron, and so is what happens when clocks change, for cronsim knows both: a fixed
time that is skipped (30 2 in spring) is taken at the first moment after the gap, one that comes twice is taken once;
`*/10 * * * *` goes on every ten minutes of real time.
"""

from __future__ import annotations

import datetime
import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cronsim import CronSim, CronSimError

from swarm.workflow.definition import Schedule

# Of times that passed while no engine ran, `missed: all` runs the newest so many, and no more are counted.
MAX_CAUGHT_UP: Final = 100
# Whoever gets to a time within this long was there in time, also after a restart: a cron knows no seconds.
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
    """An expression that comes true now and then, in a zone. Made by `parse`."""

    fields: str
    zone: zoneinfo.ZoneInfo

    def after(self, moment: datetime.datetime) -> datetime.datetime:
        """The first time after ``moment`` (aware) at which it comes true, in UTC. Raises ValueError if none does."""
        return self._next(moment, moment)

    def between(self, first: datetime.datetime, last: datetime.datetime, newest: int) -> list[datetime.datetime]:
        """The newest times, at most so many, from ``first`` to ``last``, both included; oldest first.

        Takes as long for ten years as for a day: it looks back by ever longer steps until it has enough.
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
            # An hour that comes twice has no second 02:30 for it, so that it may answer with the first one.
            if (found := local.astimezone(datetime.UTC)) > after:
                return found
        raise ValueError(f"{self.fields!r} never comes true")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be done about a schedule whose time has come."""

    run: Sequence[datetime.datetime]  # UTC, oldest first
    dropped: int  # other times that passed, which nobody will run
    next: datetime.datetime


def parse(text: str, time_zone: str = "UTC") -> Cron:
    """Raises ValueError that says what is wrong."""
    fields = _MACROS.get(text.strip().lower(), text)
    if len(fields.split()) != 5:
        raise ValueError(f"{text!r} is no cron expression: five fields are wanted, such as '0 6 * * mon-fri'")
    where = zone(time_zone)
    try:
        CronSim(fields, _ANY_MOMENT)
        cron = Cron(fields, where)
        cron.after(_ANY_MOMENT)
    except CronSimError as error:
        raise ValueError(_which(fields, str(error))) from None
    except ValueError:
        raise ValueError(f"{text!r} never comes true") from None
    return cron


def _which(fields: str, complaint: str) -> str:
    """`Bad hour`, as a sentence that quotes the field."""
    for (name, values), given in zip(_FIELDS.items(), fields.split(), strict=True):
        if complaint.endswith(f" {name}"):
            return f"{given!r} is no {name.replace('-', ' ')}: {values}"
    return f"{fields!r} is no cron expression: {complaint}"


def zone(name: str) -> zoneinfo.ZoneInfo:
    """Raises ValueError."""
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{name!r} is no time zone; write one such as Europe/Paris, or UTC") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """The ticket of the time before: does it still run, or when did it end (aware; None: long ago, or never was)?"""

    running: bool = False
    ended: datetime.datetime | None = None


def is_held(schedule: Schedule, before: Before) -> bool:
    """Must it wait until the ticket ``before`` has ended?"""
    return before.running and schedule.overlap == "queue"


def plan(schedule: Schedule, due: datetime.datetime, now: datetime.datetime, before: Before | None = None) -> Plan:
    """By the schedule's policies, what to do ``now`` about the time ``due`` (passed, or just now) and those since.

    A time that somebody gets to `IN_TIME` is never missed; that policy is for the others. Raises ValueError.
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
