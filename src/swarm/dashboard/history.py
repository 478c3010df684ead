"""An event as a line for people. Other programs write events too: nothing of their data is taken for granted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from swarm.dashboard.text import duration, size, words
from swarm.model import Event

_WHY: Final = ("why", "reason", "error")
_CHARS: Final = 300


def told(event: Event) -> str:
    data = event.data
    if event.kind == "transition":
        before = words(data["from"]) if data.get("from") else "new"
        return _joined(
            f"{data.get('of', '')}: {before} → {words(data.get('to', ''))}", *(data.get(one) for one in _WHY)
        )
    if event.kind == "change":
        return f"{data.get('did', '')} by {data.get('by', '')}"
    if event.kind == "approval":
        verdict = "approved" if data.get("approved") is True else "rejected"
        return _joined(f"{verdict} by {data.get('by', '')}", data.get("why"))
    if event.kind == "model_call":
        status, took = data.get("status"), _ms(data, "latency_ms")
        return _joined(str(data.get("model") or data.get("upstream") or ""), f"status {status}", took, data.get("note"))
    if event.kind == "egress" and "host" in data:
        port = f":{data['port']}" if data.get("port") else ""
        return _joined(f"{data['host']}{port}", data.get("refused") or _ms(data, "ms"))
    if event.kind == "exec" and isinstance(data.get("argv"), list):
        return _joined(" ".join(map(str, data["argv"])), f"by {data.get('by', '')}")  # type: ignore[call-overload]
    if event.kind == "exit":
        end = "out of time" if data.get("timed_out") is True else ""
        status = next((f"{name} {data[name]}" for name in ("signal", "code") if data.get(name) is not None), "")
        return _joined(f"process {data.get('process', '')}", end or status, _ms(data, "ms"), data.get("error"))
    if event.kind == "files":
        to, moved = data.get("to"), data.get("bytes")
        return _joined(
            f"{words(data.get('op', ''))} {data.get('path', '')}" + (f" to {to}" if to else ""),
            size(moved) if isinstance(moved, int) else "",
            f"by {data.get('by', '')}" if data.get("by") else "",
            data.get("error"),
        )
    some = {name: value for name, value in data.items() if isinstance(value, str | int | float)}
    return _joined(*(f"{name} {_word(value)}" for name, value in some.items()))


def _word(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _ms(data: Mapping[str, object], name: str) -> str:
    value = data.get(name)
    return duration(value) if isinstance(value, int | float) else ""


def _joined(*parts: object) -> str:
    return ", ".join(str(one)[:_CHARS] for one in parts if one not in (None, ""))
