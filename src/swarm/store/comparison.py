"""Two attempts side by side: how they ended, what they cost, whom they talked to, and the files that they left."""

from __future__ import annotations

import asyncio
import difflib
import json
import os
import stat
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from swarm.base import trees
from swarm.base.trees import Contents
from swarm.errors import NotFound, UsageError
from swarm.store.sql.rows import AttemptRow, milliseconds
from swarm.store.store import Store

STREAMS: Final = ("stdout", "stderr")
# What is compared line by line, and how much of that is shown.
_TEXT_BYTES: Final = 256 << 10
_TEXT_LINES: Final = 5_000
_DIFF_CHARS: Final = 64 << 10
_EVENTS: Final = 1000  # of one read
# Of the commands that an attempt ran.
_MOST_COMMANDS: Final = 2000
_COMMAND_CHARS: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two. ``number``: of the tries of this step, from 1. ``printed_bytes``: of its output. ``connections``
    and ``model_calls``: how many there were to each host, and to each model. ``commands``: the first lines of those
    that the agent printed as ``$ COMMAND``, as ours do before they run one; None if it printed none."""

    ticket_id: str
    step_id: str
    number: int
    attempt: AttemptRow
    outputs: str | None
    duration_ms: float | None
    printed_bytes: int = 0
    connections: Mapping[str, int] = field(default_factory=dict)
    model_calls: Mapping[str, int] = field(default_factory=dict)
    commands: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """``change``: added, removed or changed; sizes and modes are None where the file is not. ``diff``: of texts, as
    `diff -u` has it; None if one is none, or too long."""

    name: str
    change: str
    bytes: tuple[int | None, int | None]
    mode: tuple[str | None, str | None]
    diff: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    a: Side
    b: Side
    files: list[Change]
    outputs: str  # their diff; '' if they are the same
    commands: str = ""  # likewise


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """``read``: all of its contents, of a link its target."""

    mode: int
    size: int
    read: Callable[[], Awaitable[bytes]]


async def compare(store: Store, a: str, b: str, *, project_id: str | None = None) -> Comparison:
    """``a``, ``b``: see `find`. Raises NotFound, UsageError."""
    one, of_one = await _told(store, await find(store, a, project_id=project_id))
    other, of_other = await _told(store, await find(store, b, project_id=project_id))
    return Comparison(
        a=one,
        b=other,
        files=await changes(await _left(store, one, of_one), await _left(store, other, of_other)),
        outputs=await asyncio.to_thread(_diff, _pretty(one.outputs), _pretty(other.outputs), "outputs"),
        commands=await asyncio.to_thread(_diff, _listed(one.commands), _listed(other.commands), "commands"),
    )


def _listed(commands: Sequence[str] | None) -> str:
    return "".join(f"{command}\n" for command in commands or ())


async def find(store: Store, ref: str, *, project_id: str | None = None) -> Side:
    """An attempt, as ``TICKET[:STEP][:NUMBER]``: by default the last one. With a ``project_id``, there are no tickets
    of others. Raises NotFound, UsageError."""
    ticket_id, step, number = await parsed(store, ref, project_id=project_id)
    attempts = await store.attempts(ticket_id)
    ran = dict.fromkeys(one.step_id for one in attempts)
    if not attempts:
        raise NotFound(f"the ticket {ticket_id} has no attempt yet")
    if step is None and len(ran) > 1:
        raise UsageError(f"{ref}: which step? Name one, such as {ticket_id}:{next(iter(ran))}; it ran {_named(ran)}")
    if step is not None and step not in ran:
        raise NotFound(f"the ticket {ticket_id} has no attempt of a step {step!r}; it ran {_named(ran)}")
    tries = [one for one in attempts if step in (None, one.step_id)]
    if number is not None and not 0 < number <= len(tries):
        raise NotFound(f"{ref}: there are the attempts 1 to {len(tries)}")
    number = number or len(tries)
    found = tries[number - 1]
    rows = {row.id: row.outputs for row in await store.steps(ticket_id)}
    outputs = rows.get(found.step_execution_id) if found.outcome == "succeeded" else None
    if outputs is None and found.outcome == "succeeded":  # a large one of a plain ticket is in the ticket alone
        outputs = (await store.ticket(ticket_id)).outputs
    began, ended = milliseconds(found.started_at), milliseconds(found.ended_at)
    return Side(
        ticket_id=ticket_id,
        step_id=found.step_id,
        number=number,
        attempt=found,
        outputs=outputs,
        duration_ms=float(ended - began) if began is not None and ended is not None else None,
    )


async def parsed(store: Store, ref: str, *, project_id: str | None = None) -> tuple[str, str | None, int | None]:
    """The ticket, step and number that ``TICKET[:STEP][:NUMBER]`` names. Raises NotFound."""
    step: str | None = None
    number: int | None = None
    rest = ref
    while True:  # an id may hold colons itself: the longest one that is there counts
        try:
            return await store.visible_ticket_id(rest, project_id=project_id), step, number
        except NotFound:
            rest, colon, last = rest.rpartition(":")
            if not colon or step is not None:
                raise NotFound(f"no ticket {ref!r}; write TICKET, TICKET:STEP or TICKET:STEP:NUMBER") from None
            if last.isdecimal() and len(last) < 10 and number is None:
                number = int(last)
            else:
                step = last


def _named(names: Mapping[str, None]) -> str:
    some = list(names)[:12]
    return ", ".join(some) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


async def _told(store: Store, side: Side) -> tuple[Side, str | None]:
    """With what its events say; and the digest of the files that it left."""
    printed, after, digest = 0, 0, None
    said: dict[object, _Commands] = {}
    commands: list[str] = []
    connections, calls = Counter[str](), Counter[str]()
    while found := await store.events(side.ticket_id, after=after, limit=_EVENTS):
        for event in found:
            after = event.seq
            if event.attempt_id != side.attempt.id:
                continue
            if event.kind == "output":
                text, stream = str(event.data.get("text", "")), event.data.get("stream")
                printed += len(text.encode(errors="replace"))
                if stream in STREAMS:
                    said.setdefault(stream, _Commands(commands)).hear(text)
            elif event.kind == "files" and isinstance(placed := event.data.get("trees"), dict):
                digest = str(next(iter(placed.values()), "")) or None
            elif event.kind == "model_call":
                calls[str(event.data.get("model") or event.data.get("upstream") or "unknown")] += 1
            elif event.kind == "egress" and "host" in event.data:
                port = f":{event.data['port']}" if event.data.get("port") else ""
                refused = " (refused)" if event.data.get("refused") else ""
                connections[f"{event.data['host']}{port}{refused}"] += 1
    for one in said.values():
        one.hear("\n")
    told = replace(
        side,
        printed_bytes=printed,
        connections=dict(connections),
        model_calls=dict(calls),
        commands=tuple(commands) or None,
    )
    return told, digest


class _Commands:
    """Finds the commands in a stream of output, which comes in pieces of any size."""

    def __init__(self, found: list[str]) -> None:
        self._found = found
        self._line = ""  # the beginning of the one that is not yet whole

    def hear(self, text: str) -> None:
        *whole, rest = text.split("\n")
        for line in whole:
            line = (self._line + line[:_COMMAND_CHARS])[: _COMMAND_CHARS + 2].rstrip("\r")
            self._line = ""
            if line.startswith("$ ") and len(self._found) < _MOST_COMMANDS:
                self._found.append(line[2:])
        self._line = (self._line + rest[:_COMMAND_CHARS])[: _COMMAND_CHARS + 2]


# --- files ------------------------------------------------------------------------------------------------------------


async def _left(store: Store, side: Side, digest: str | None) -> dict[str, File]:
    """What it left in /work/out, by name."""
    if digest is None:
        return {}

    async def load(digest: str) -> str:
        return await store.artifact_of(side.ticket_id, digest)

    tree = await asyncio.to_thread(trees.manifest, await load(digest))
    contents = Contents(tree.parts, load)

    def reader(offset: int, size: int) -> Callable[[], Awaitable[bytes]]:
        async def read() -> bytes:
            return b"".join([chunk async for chunk in contents.chunks(offset, size)])

        return read

    return {
        entry.name: File(mode=entry.mode, size=entry.size, read=reader(offset, entry.size))
        for entry, offset in tree.offsets()
    }


def files_below(top: Path) -> dict[str, File]:
    """Those of a directory of this host, by name."""

    def file(path: Path) -> File:
        status = path.lstat()

        async def read() -> bytes:
            return os.fsencode(path.readlink()) if path.is_symlink() else await asyncio.to_thread(path.read_bytes)

        return File(mode=status.st_mode, size=status.st_size, read=read)

    found = {}
    for here, dirs, names in os.walk(top):
        for name in (*names, *dirs):
            path = Path(here) / name
            if path.is_symlink() or not path.is_dir():
                found[path.relative_to(top).as_posix()] = file(path)
    return found


async def changes(a: Mapping[str, File], b: Mapping[str, File]) -> list[Change]:
    """What was added to ``a``, removed from it, or changed in it, to make ``b``; by name."""
    found, room = [], _DIFF_CHARS * 16
    for name in sorted(a.keys() | b.keys()):
        one, other = a.get(name), b.get(name)
        if one is not None and other is not None and await _same(one, other):
            continue
        diff = await _file_diff(name, one, other) if room > 0 else None
        room -= len(diff or "")
        found.append(
            Change(
                name=name,
                change="added" if one is None else "removed" if other is None else "changed",
                bytes=(one.size if one else None, other.size if other else None),
                mode=(stat.filemode(one.mode) if one else None, stat.filemode(other.mode) if other else None),
                diff=diff,
            )
        )
    return found


async def _same(a: File, b: File) -> bool:
    return (a.mode, a.size) == (b.mode, b.size) and (a.size == 0 or await a.read() == await b.read())


async def _file_diff(name: str, a: File | None, b: File | None) -> str | None:
    texts = []
    for one in (a, b):
        if one is not None and (one.size > _TEXT_BYTES or stat.S_ISDIR(one.mode)):
            return None
        data = await one.read() if one is not None else b""
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return None
        if "\0" in text or text.count("\n") > _TEXT_LINES:
            return None
        texts.append(text)
    return await asyncio.to_thread(_diff, texts[0], texts[1], name)


def _diff(a: str, b: str, name: str) -> str:
    """As `diff -u` has it, without the names' times; '' if both are the same."""
    if len(a) + len(b) > 2 * _TEXT_BYTES or max(a.count("\n"), b.count("\n")) > _TEXT_LINES:
        return "" if a == b else f"{name}: {len(a):,} and {len(b):,} characters, too many to compare line by line\n"
    lines = difflib.unified_diff(a.splitlines(), b.splitlines(), f"a/{name}", f"b/{name}", lineterm="")
    text = "".join(f"{line}\n" for line in lines)
    return (
        text if len(text) <= _DIFF_CHARS else f"{text[:_DIFF_CHARS]}\n… {len(text) - _DIFF_CHARS:,} characters more\n"
    )


def _pretty(outputs: str | None) -> str:
    if outputs is None or len(outputs) > _TEXT_BYTES:
        return outputs or ""
    try:
        return json.dumps(json.loads(outputs), indent=2, ensure_ascii=False, sort_keys=True)
    except (ValueError, RecursionError):
        return outputs
