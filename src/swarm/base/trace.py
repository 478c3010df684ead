"""W3C Trace Context (https://www.w3.org/TR/trace-context/). Ids of spans are made of the ids of what they are of: so an
agent, which gets its own as TRACEPARENT, and the exporter agree, and what is exported twice is the same span."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from typing import Final

HEADER: Final = "traceparent"
_FORM: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}")


def valid(text: str | None) -> bool:
    return text is not None and _FORM.fullmatch(text) is not None


def parent(trigger_data: str | None) -> tuple[str, str] | None:
    """Trace and span that a ticket was made in, if its maker said so."""
    with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
        if trigger_data and (found := _FORM.fullmatch(json.loads(trigger_data)[HEADER])):
            return found[1], found[2]
    return None


def trace_id(ticket_id: str, trigger_data: str | None) -> str:
    given = parent(trigger_data)
    return given[0] if given else _digest("trace", ticket_id)[:32]


def span_id(*of: str) -> str:
    return _digest("span", *of)[:16]


def traceparent(ticket_id: str, trigger_data: str | None, attempt_id: str) -> str:
    """What an agent's own spans belong under: its attempt."""
    return f"00-{trace_id(ticket_id, trigger_data)}-{span_id(attempt_id)}-01"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="replace")).hexdigest()
