"""Numbers and times as pages show them. Scripts put times into the viewer's zone; without scripts, they are in UTC."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from urllib.parse import quote

from swarm.base import jsontext

_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"))


def moment(text: object) -> datetime | None:
    """Of ISO-8601 text, in UTC; None for anything else: other programs write rows too."""
    try:
        found = datetime.fromisoformat(text) if isinstance(text, str) else None
        if found is None:
            return None
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def stamp(text: object) -> str:
    found = moment(text)
    return found.strftime("%Y-%m-%d %H:%M:%S UTC") if found is not None else ""


def duration(ms: float | None) -> str:
    """Two figures that matter: 340 ms, 4.2 s, 3 min 20 s, 5 h 2 min."""
    if ms is None:
        return ""
    if ms < 1000:
        return f"{ms:.0f} ms"
    seconds = ms / 1000
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds < 86_400:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds // 86_400:.0f} d {seconds % 86_400 // 3600:.0f} h"


def age(text: object, now: datetime | None = None) -> str:
    """How long ago, in one unit."""
    found = moment(text)
    if found is None:
        return ""
    seconds = max(0.0, ((now or datetime.now(UTC)) - found).total_seconds())
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def money(usd: float | None) -> str:
    if usd is None:
        return ""
    return f"${usd:,.2f}" if usd >= 0.1 or usd == 0 else f"${usd:.3f}" if usd >= 0.001 else f"${usd:.5f}"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def quoted(name: str) -> str:
    """A file's name in an address: it may have bytes that are no UTF-8."""
    return quote(name.encode("utf-8", "surrogateescape"), safe="/")


def words(name: object) -> str:
    """A name of a state or reason, for people: 'in_progress' is 'in progress'."""
    return str(name).replace("_", " ")


def pretty(text: str | None, *, limit: int = 20_000) -> tuple[str, bool]:
    """JSON text, indented, and whether that is all of it. Text that is long or no JSON stays as it is."""
    if not text:
        return "", True
    if len(text) > limit:
        return text[:limit], False
    try:
        shown = json.dumps(jsontext.loads(text), indent=2, ensure_ascii=False)
    except ValueError:
        shown = text
    return shown[:limit], len(shown) <= limit
