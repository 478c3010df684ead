"""Rows of `sandboxes` and `snapshots` as values: for display, leniently; for use, checked. Any tool may have written a
sandbox, so everything in it may be wrong: a `BadRow` says which column is, and what to put there instead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

from swarm.base import jsontext
from swarm.fields import IN_WORDS, VARIABLE
from swarm.model import Agent, Sandbox, SandboxState, Snapshot
from swarm.store.sql.bounded import texts, too_long
from swarm.store.sql.rows import lenient, parsed, real, whole
from swarm.store.tickets.validation import (
    BadRow,
    check_length,
    limit_of,
    shown,
    strict_number,
    strict_requires,
    strict_text,
)

SANDBOX_FIELDS: Final = tuple(field.name for field in fields(Sandbox))
SNAPSHOT_FIELDS: Final = tuple(field.name for field in fields(Snapshot))
SNAPSHOT_COLUMNS: Final = ", ".join(f"n.{name}" for name in SNAPSHOT_FIELDS)
WANTED: Final = (SandboxState.RUNNING, SandboxState.PAUSED, SandboxState.ENDED)

_WHOLE: Final = ("memory_mb", "vcpus", "disk_mb", "budget_tokens", "vm_id", "ends_at", "size_bytes", "expires_at")
_REAL: Final = ("ttl_seconds", "idle_timeout_seconds", "budget_usd")
_NUMBERS: Final = (
    *("memory_mb", "vcpus", "disk_mb", "ttl_seconds", "idle_timeout_seconds", "budget_usd", "budget_tokens"),
)
_TEXTS: Final = ("id", "name", "project_id", "agent_id", "image", "snapshot_id", "parent_id", "network")
_LIMITS: Final = {name: limit_of(name) for name in (*_TEXTS, "secrets", "env", "labels", "requires") if name != "id"}
_OTHERS: Final = {name: limit_of(name) for name in ("error", "created_by", "started_at", "used_at", "ended_at")}
SANDBOX_COLUMNS: Final = f"{texts('b', SANDBOX_FIELDS, _LIMITS | _OTHERS)}, {too_long('b', _LIMITS)} AS too_long"
_NO: Final = (0, "0", "false", "False", "FALSE")  # what is no plain no counts as a yes: it may hold secrets
NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
NAME_IN_WORDS: Final = "letters, digits and . _ -, at most 63, with a letter or a digit first"
_MOST_ITEMS: Final = 256
_MOST_CHARS: Final = 4096


def sandbox(row: Any) -> Sandbox:
    """For display: values of a wrong type are converted where possible."""
    return Sandbox(**_lenient(row, SANDBOX_FIELDS) | {"secret": _secret(row.secret)})


def snapshot(row: Any) -> Snapshot:
    values = _lenient(row, SNAPSHOT_FIELDS)
    values |= {
        "secrets": row.secrets not in _NO,
        "spec": values["spec"] or "{}",
        "digest": values["digest"] or "",
        "size_bytes": values["size_bytes"] or 0,
    }
    return Snapshot(**values)


def slept_in(row: Any) -> str:
    """Why nothing else can start from this snapshot; '' if it can. A sandbox that is resumed writes into the files that
    it was paused to."""
    if row.kind != "pause":
        return ""
    return f"the sandbox {shown(row.sandbox_id)} sleeps in the snapshot {shown(row.id)}: fork or snapshot that sandbox"


def _lenient(row: Any, names: tuple[str, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in names:
        value = getattr(row, name)
        if name in _WHOLE:
            values[name] = whole(value)
        elif name in _REAL:
            values[name] = real(value)
        else:
            values[name] = lenient(value)
    for name in ("id", "state", "kind", "host"):
        if name in values and not (name == "host" and "state" in values):
            values[name] = values[name] or ""
    return values


def check(row: Any) -> Sandbox:
    """``row``: anything with a sandbox's fields as attributes. What its holder needs of it is right. Raises BadRow."""
    check_length(row)
    values = _lenient(row, SANDBOX_FIELDS)
    for name in _TEXTS:
        values[name] = text = strict_text(name, getattr(row, name))
        if text and "\0" in text:
            raise BadRow(f"{name} {shown(text)} contains a NUL character; remove it")
        if name != "id":
            values[name] = text or None
    if not values["id"].strip():
        raise BadRow("id is empty; give the sandbox an id, or none: it gets one by itself")
    if values["name"] is not None and not re.fullmatch(NAME, values["name"]):
        raise BadRow(f"name is {shown(values['name'])}; it must be {NAME_IN_WORDS}")
    for name in _NUMBERS:
        values[name] = strict_number(name, getattr(row, name))
    _check_secrets(strict_text("secrets", row.secrets))
    _check_texts("env", strict_text("env", row.env), VARIABLE.removesuffix("$"), IN_WORDS[VARIABLE])
    _check_texts("labels", strict_text("labels", row.labels), r"[^\x00-\x1f]{1,64}", "1 to 64 printable characters")
    for name in ("secrets", "env", "labels"):
        if _parsed(name, values[name]) is None:  # blank, or null
            values[name] = None
    values["requires"] = strict_requires(strict_text("requires", row.requires))
    if values["requires"] and values["snapshot_id"]:
        raise BadRow(
            "it has a snapshot_id, and starts on the host of that: it can't have requires; leave one of them out"
        )
    values["wanted"] = wanted(row.wanted)
    values["secret"] = _secret(row.secret)
    return Sandbox(**values)


def _secret(value: object) -> bool | None:
    return None if value is None else value not in _NO


def holds_secrets(one: Sandbox, agent: Agent | None, start: Snapshot | None) -> bool:
    """May its memory hold secrets: its own, its agent's, or those of what it starts from? It is decided while that is
    known: a snapshot expires, and an agent changes, but what was in memory may still be there."""
    own = (one.secrets or "").strip() not in ("", "[]", "null")
    return own or bool(agent is not None and agent.secrets) or bool(start is not None and start.secrets)


def wanted(value: object) -> str | None:
    """Raises BadRow."""
    if value is None or value == "":
        return None
    if value not in WANTED:
        raise BadRow(f"wanted is {shown(value)}; it must be 'running', 'paused' or 'ended', or NULL")
    return str(value)


def unknown_state(value: object) -> str:
    guess = str(lenient(value)).strip().lower()
    meant = guess if guess in (SandboxState.STARTING, SandboxState.ENDED) else SandboxState.STARTING
    return f"state {shown(value)} is unknown; a new sandbox has the state '{meant}'"


def _check_secrets(text: str | None) -> None:
    names = _parsed("secrets", text)
    if names is None:
        return
    if not isinstance(names, list) or len(names) > _MOST_ITEMS:
        raise BadRow(f"secrets is {shown(text)}; it must be a JSON list of at most {_MOST_ITEMS} names, or NULL")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(VARIABLE.removesuffix("$"), name):
            raise BadRow(f"secrets has {shown(name)}; the name of a secret has {IN_WORDS[VARIABLE]}")


def _check_texts(column: str, text: str | None, pattern: str, in_words: str) -> None:
    found = _parsed(column, text)
    if found is None:
        return
    if not isinstance(found, Mapping) or len(found) > _MOST_ITEMS:
        raise BadRow(f"{column} is {shown(text)}; it must be a JSON object of at most {_MOST_ITEMS} texts, or NULL")
    for name, value in found.items():
        if not re.fullmatch(pattern, name):
            raise BadRow(f"{column} has {shown(name)}; a name in it has {in_words}")
        if not isinstance(value, str) or "\0" in value or len(value) > _MOST_CHARS:
            raise BadRow(f"{column}.{name} must be text of at most {_MOST_CHARS} characters, without NUL")


def _parsed(column: str, text: str | None) -> Any:
    if text is None or not text.strip():
        return None
    try:
        return jsontext.loads(text)
    except ValueError as error:
        raise BadRow(f"{column} is not valid JSON: {error}") from None


def labels(one: Sandbox) -> Mapping[str, str]:
    """For display: empty if another program wrote what is none."""
    return {name: str(text) for name, text in (parsed(one.labels, dict) or {}).items()}


def memory_mb(spec: str) -> int | None:
    """What the VM of a snapshot takes, by its spec; None if it does not say."""
    return _of_spec(spec, "memory_mb")


def disk_mb(spec: str) -> int | None:
    return _of_spec(spec, "disk_mb")


def secrets(spec: str) -> list[tuple[str, str]]:
    """Names of the secrets that may be in the memory of a snapshot, each with the agent (or '') that was given it."""
    try:
        found = (parsed(spec, dict) or {})["secrets"]
        return [(name, agent) for name, agent in found if {type(name), type(agent)} == {str}]
    except (ValueError, TypeError, LookupError):  # it says nothing of them, or another program wrote it
        return []


def _of_spec(spec: str, name: str) -> int | None:
    value = (parsed(spec, dict) or {}).get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31 else None
