"""When a cron expression is due, in zones whose clocks change, and what happens with times that have passed."""

from __future__ import annotations

import datetime
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.workflow import schedule
from swarm.workflow.definition import Schedule
from swarm.workflow.schedule import Before

PARIS = "Europe/Paris"  # 2026: on 29 March 02:00 becomes 03:00, on 25 October 03:00 becomes 02:00; each at 01:00 UTC


def utc(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC)


def times(cron: str, zone: str, after: str, count: int) -> list[str]:
    parsed, moment, found = schedule.parse(cron, zone), utc(after), []
    for _ in range(count):
        moment = parsed.after(moment)
        found.append(f"{moment:%Y-%m-%dT%H:%M}")
    return found


@pytest.mark.parametrize(
    ("cron", "zone", "after", "then"),
    [
        ("0 6 * * mon-fri", "UTC", "2026-01-02T07:00", "2026-01-05T06:00"),
        ("*/15 * * * *", "UTC", "2026-01-02T07:14:59", "2026-01-02T07:15"),
        ("*/15 * * * *", "UTC", "2026-01-02T07:15", "2026-01-02T07:30"),
        ("0 0 29 2 *", "UTC", "2026-01-01T00:00", "2028-02-29T00:00"),
        ("0 0 13 * fri", "UTC", "2026-01-03T00:00", "2026-01-09T00:00"),
        ("@yearly", "America/New_York", "2026-06-01T00:00", "2027-01-01T05:00"),
        ("5-10/2,20 0 1 jan *", "UTC", "2026-01-01T00:09", "2026-01-01T00:20"),
        ("0 12 * * 7", "UTC", "2026-01-02T00:00", "2026-01-04T12:00"),
        ("0 12 l * *", "UTC", "2026-02-02T00:00", "2026-02-28T12:00"),
        ("0 12 * * fri#2", "UTC", "2026-02-02T00:00", "2026-02-13T12:00"),
    ],
)
def test_when_it_is_due(cron: str, zone: str, after: str, then: str) -> None:
    assert times(cron, zone, after, 1) == [then]


def test_an_hour_that_is_skipped() -> None:
    before = "2026-03-28T12:00"
    assert times("30 2 * * *", PARIS, before, 2) == ["2026-03-29T01:00", "2026-03-30T00:30"]  # 03:00, once
    assert times("30 * * * *", PARIS, "2026-03-29T00:00", 2) == ["2026-03-29T00:30", "2026-03-29T01:30"]
    assert times("*/30 2 * * *", PARIS, before, 1) == ["2026-03-30T00:00"]  # that day has no such half hours
    assert times("0 3 * * *", PARIS, before, 1) == ["2026-03-29T01:00"]


def test_an_hour_that_comes_twice() -> None:
    assert times("30 2 * * *", PARIS, "2026-10-24T12:00", 2) == ["2026-10-25T00:30", "2026-10-26T01:30"]
    # Asked in the second of the two hours, with 02:30 ahead by the wall's clock: it has been.
    assert times("30 2 * * *", PARIS, "2026-10-25T01:10", 1) == ["2026-10-26T01:30"]
    every = times("*/20 * * * *", PARIS, "2026-10-24T23:59", 7)
    assert every == [f"2026-10-25T0{h}:{m}" for h in (0, 1) for m in ("00", "20", "40")] + ["2026-10-25T02:00"]


@pytest.mark.parametrize("cron", ["", "* * * *", "0 * * * * *", "60 * * * *", "* * 0 * *", "* * * 13 *", "a * * * *",
                                  "*/0 * * * *", "5-1 * * * *", "* * * * fry", "0 0 31 feb *", "١ * * * *",
                                  "@reboot"])  # fmt: skip
def test_invalid_schedules(cron: str) -> None:
    with pytest.raises(ValueError, match=r"isn't a |never occurs"):
        schedule.parse(cron)
    with pytest.raises(ValueError, match="isn't a time zone"):
        schedule.parse("@daily", "Mars/North")


# --- times that have passed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missed", "now", "run", "dropped"),
    [
        ("skip", "10:00:00", ["10:00"], 0),
        ("skip", "10:00:59", ["10:00"], 0),
        ("skip", "10:01:01", [], 1),
        ("skip", "12:30", [], 3),
        ("skip", "12:00:30", ["12:00"], 2),  # the newest is in time
        ("once", "10:00", ["10:00"], 0),
        ("once", "12:30", ["12:00"], 2),
        ("all", "12:30", ["10:00", "11:00", "12:00"], 0),
    ],
)
def test_policies(missed: str, now: str, run: list[str], dropped: int) -> None:
    one = Schedule(cron="0 * * * *", missed=missed)
    plan = schedule.plan(one, utc("2026-01-01T10:00"), utc(f"2026-01-01T{now}"))
    assert [f"{moment:%H:%M}" for moment in plan.run] == run
    assert plan.dropped == dropped
    assert plan.next == schedule.parse(one.cron).after(utc(f"2026-01-01T{now}"))


@pytest.mark.parametrize(
    ("overlap", "missed", "before", "run", "dropped"),
    [
        ("allow", "once", Before(running=True), ["12:00"], 2),
        ("skip", "once", Before(running=True), [], 3),
        ("skip", "once", Before(ended=utc("2026-01-01T11:30")), ["12:00"], 2),
        ("queue", "skip", Before(ended=utc("2026-01-01T12:25")), ["12:00"], 2),  # it was held, not missed
        ("queue", "skip", Before(ended=utc("2026-01-01T09:25")), [], 3),  # no engine ran
        ("queue", "once", Before(), ["12:00"], 2),
    ],
)
def test_overlap(overlap: str, missed: str, before: Before, run: list[str], dropped: int) -> None:
    one = Schedule(cron="0 * * * *", missed=missed, overlap=overlap)
    plan = schedule.plan(one, utc("2026-01-01T10:00"), utc("2026-01-01T12:30"), before)
    assert ([f"{moment:%H:%M}" for moment in plan.run], plan.dropped) == (run, dropped)
    assert schedule.is_held(one, before) == (overlap == "queue" and before.running)


def test_years_without_an_engine_cost_no_more_than_a_day() -> None:
    began = time.process_time()
    plan = schedule.plan(Schedule(cron="* * * * *", missed="all"), utc("2016-01-01T00:00"), utc("2026-01-01T00:00"))
    assert time.process_time() - began < 1  # five million minutes, walked, would take minutes
    assert (len(plan.run), plan.dropped) == (schedule.MAX_CAUGHT_UP, 1)
    assert (plan.run[-1], plan.next) == (utc("2026-01-01T00:00"), utc("2026-01-01T00:01"))
    plan = schedule.plan(Schedule(cron="@monthly", missed="all"), utc("2016-01-01T00:00"), utc("2026-01-01T00:00"))
    assert (len(plan.run), plan.dropped) == (100, 1)


@settings(max_examples=60, deadline=None)
@given(
    cron=st.sampled_from(["30 2 * * *", "*/20 * * * *", "0 */6 * * *", "15 1,2,3 * * sun", "59 23 l * *"]),
    first=st.datetimes(datetime.datetime(2026, 3, 27), datetime.datetime(2026, 10, 27)),
    hours=st.integers(0, 400),
)
def test_looking_back_finds_what_going_forward_does(cron: str, first: datetime.datetime, hours: int) -> None:
    parsed = schedule.parse(cron, PARIS)
    start = parsed.after(first.replace(microsecond=0, tzinfo=datetime.UTC))
    last, forward, moment = start + datetime.timedelta(hours=hours), [start], start
    while (moment := parsed.after(moment)) <= last:
        forward.append(moment)
    assert parsed.between(start, last, 30) == forward[-30:]
