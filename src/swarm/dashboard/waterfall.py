"""Where a ticket's time went: attempts below each other on one time line, each with its phases, model calls and
connections, as bars in SVG. Names stand beside the bars, as text that keeps its size on narrow screens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from swarm.base.clock import PHASES
from swarm.dashboard.text import duration, moment
from swarm.model import Event
from swarm.store.sql.rows import AttemptRow
from swarm.store.tickets.display import ModelCall

WIDTH: Final = 1000.0
_LEAST: Final = 1.5  # a bar that is shorter could not be seen
_BARS: Final = 300  # of one lane
SHOWN: Final = 40  # attempts, the last ones
_TICKS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    x: float
    width: float
    kind: str  # a class: 'p-agent'
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    name: str
    note: str
    bars: list[Bar]
    small: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """``ticks``: times since the beginning, at equal distances."""

    lanes: list[Lane]
    ticks: list[str]
    left_out: int


def chart(attempts: Sequence[AttemptRow], calls: Sequence[ModelCall], events: Iterable[Event]) -> Chart | None:
    """None if nothing has run."""
    shown = [one for one in attempts if moment(one.started_at) is not None][-SHOWN:]
    if not shown:
        return None
    spans = {one.id: _span(one) for one in shown}
    begin = min(_ms(one.started_at) - one.timings.get("queue", 0.0) for one in shown)
    end = max(begin + 1.0, *(last for _, last in spans.values()))
    scale = WIDTH / (end - begin)
    egress = [event for event in events if event.kind == "egress"]
    lanes = []
    for one in shown:
        lanes.append(
            Lane(
                name=f"{one.step_id} #{one.number}",
                note=duration(spans[one.id][1] - spans[one.id][0]),
                bars=_phases(one, begin, scale, spans[one.id][1]),
            )
        )
        used = _calls([call for call in calls if call.attempt_id == one.id], begin, end, scale)
        used += _egress([event for event in egress if event.attempt_id == one.id], begin, scale)
        if used:
            lanes.append(Lane(name="calls", note=str(len(used)), bars=used[:_BARS], small=True))
    ticks = [duration((end - begin) * number / _TICKS) for number in range(_TICKS + 1)]
    return Chart(lanes=lanes, ticks=ticks, left_out=len(attempts) - len(shown))


def _ms(text: str | None) -> float:
    found = moment(text)
    return found.timestamp() * 1000 if found is not None else 0.0


def _span(one: AttemptRow) -> tuple[float, float]:
    begin = _ms(one.started_at)
    end = _ms(one.ended_at) if one.ended_at else datetime.now(UTC).timestamp() * 1000
    return begin, max(begin, end)


def _bar(x: float, length: float, scale: float, kind: str, title: str) -> Bar:
    width = max(_LEAST, length * scale)
    return Bar(x=round(min(max(0.0, x * scale), WIDTH - width), 2), width=round(width, 2), kind=kind, title=title)


def _phases(one: AttemptRow, begin: float, scale: float, end: float) -> list[Bar]:
    started = _ms(one.started_at) - begin
    timings: Mapping[str, float] = one.timings
    bars, at = [], started - timings.get("queue", 0.0)
    for phase in PHASES:
        if ms := timings.get(phase):
            bars.append(_bar(at, ms, scale, f"p-{phase}", f"{phase}: {duration(ms)}"))
            at += ms
    if one.outcome is None:
        bars.append(
            _bar(started, end - begin - started, scale, "p-running", f"runs: {duration(end - begin - started)}")
        )
    elif not bars:
        bars.append(_bar(started, end - begin - started, scale, "p-failed", one.outcome))
    return bars


def _calls(calls: Sequence[ModelCall], begin: float, end: float, scale: float) -> list[Bar]:
    found = []
    for call in reversed(calls):
        at = _ms(call.at) - begin
        ms = call.latency_ms if call.latency_ms is not None else end - begin - at
        kind = "p-call" if call.status is None or call.status < 400 else "p-failed"
        how = "runs" if call.status is None else str(call.status)
        found.append(_bar(at, ms, scale, kind, f"{call.model or call.upstream or 'model'}: {how}, {duration(ms)}"))
    return found


def _egress(events: Sequence[Event], begin: float, scale: float) -> list[Bar]:
    """An event is written when its connection has ended."""
    found = []
    for event in events:
        data = event.data
        ms = data.get("ms", data.get("duration_ms", 0.0))
        ms = float(ms) if isinstance(ms, int | float) else 0.0
        kind = "p-failed" if "refused" in data else "p-egress"
        what = str(data.get("host") or data.get("refused") or data.get("via") or "connection")[:200]
        found.append(_bar(_ms(event.at) - ms - begin, ms, scale, kind, what))
    return found
