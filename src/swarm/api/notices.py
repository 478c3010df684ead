"""Notices: signed POSTs to addresses of others when a ticket ends, a person is asked or a budget is used up.

At least once, in order for each receiver: the position moves on when it has taken one, or a day has passed. An address
is checked when it is connected to, so that nobody makes this server speak to its own network; redirects are not
followed, and the answer's body is not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from swarm.admin.vault import Vault
from swarm.api.feed import Feed
from swarm.api.webhooks import TIMESTAMP_HEADER, sign
from swarm.base.aio import cancel_all
from swarm.base.log import logger
from swarm.errors import NotFound, SwarmError, UsageError
from swarm.gateway.proxy import EgressRules
from swarm.gateway.resolver import Lookups
from swarm.model import Event, Ticket, TicketState
from swarm.store.registry.notices import NoticeKind, NoticeRow, position_of
from swarm.store.sql.rows import milliseconds
from swarm.store.store import Store
from swarm.store.tickets.facts import ended_as

log = logger(__name__)

SECRET: Final = "SIGNING_KEY"
TIMEOUT_SECONDS: Final = 15.0
GIVE_UP_SECONDS: Final = 86_400.0
_PAUSE_SECONDS: Final = (1.0, 600.0)
_AT_ONCE: Final = 8
_EVENTS_AT_ONCE: Final = 5000
_EVENTS_KEPT: Final = 10_000  # for notices whose receivers are slower than others
_SAVE_AFTER: Final = 500  # events that tell a notice nothing: a server that starts again reads so many again
_CHECK_SECONDS: Final = 30.0
_MAX_URL: Final = 2000


def scope(id: str) -> str:
    """Of its secret: no agent is given one of this scope."""
    return f"notice:{id}"


def check_url(url: str) -> str:
    """Raises UsageError."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        fits = False
    if not fits or len(url) > _MAX_URL or not url.isprintable() or not url.isascii() or " " in url or "@" in url:
        raise UsageError("a notice goes to an http or https URL, without a user's name in it")
    return url


async def add(
    store: Store, vault: Vault, *, url: str, kinds: Sequence[NoticeKind], project_id: str | None, by: str
) -> tuple[NoticeRow, str]:
    """The new notice, and the secret that its POSTs are signed with."""
    if not kinds:
        raise UsageError(f"a notice tells of something: give one or more of {', '.join(NoticeKind)}")
    row = await store.add_notice(url=check_url(url), kinds=list(dict.fromkeys(kinds)), project_id=project_id, by=by)
    value = secrets.token_hex(32)
    try:
        await vault.set(SECRET, value, scope=scope(row.id))
    except SwarmError:
        await store.remove_notice(row.id, by=by)
        raise
    return row, value


async def remove(store: Store, vault: Vault, ref: str, *, by: str) -> NoticeRow:
    row = await store.remove_notice(ref, by=by)
    with contextlib.suppress(NotFound):
        await vault.remove(SECRET, scope=scope(row.id))
    return row


def kinds_of(event: Event) -> set[NoticeKind]:
    data, found = event.data, set[NoticeKind]()
    if event.kind != "transition":
        return found
    if state := ended_as(event):
        found.add(NoticeKind.ENDED)
        if state == TicketState.FAILED:
            found.add(NoticeKind.FAILED)
    if data.get("of") == "step":
        if data.get("to") == "waiting":
            found.add(NoticeKind.APPROVAL)
        if data.get("why") == "over_budget":
            found.add(NoticeKind.BUDGET)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    store: Store
    vault: Vault
    rules: EgressRules

    async def send(self, row: NoticeRow, id: str, body: Mapping[str, Any]) -> str:
        """Why it was not taken; '' when it was."""
        try:
            key = await self.vault.get(SECRET, scope=scope(row.id))
            if key is None:
                return "its secret is gone: remove this notice, and add it again"
            async with asyncio.timeout(TIMEOUT_SECONDS):
                return await self._post(row.url, key, id, json.dumps(body, ensure_ascii=True).encode())
        except TimeoutError:
            return f"no answer within {TIMEOUT_SECONDS:g} s"
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
            return f"{type(error).__name__}: {error}"
        except SwarmError as error:
            return str(error)

    def never_sent(self, url: str) -> str:
        """Why nothing will be sent to this URL as things are; '' if that depends on what its name leads to then."""
        host = urlsplit(url).hostname or ""
        try:
            address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
        except ValueError:
            return ""
        why = self.rules.why_not(address)
        return _forbidden(host, why) if why else ""

    async def _post(self, url: str, key: str, id: str, body: bytes) -> str:
        parts = urlsplit(check_url(url))
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        lookups = Lookups(self.rules.resolve)
        try:
            found = await lookups.addresses(host, port)
        finally:
            await lookups.close()
        allowed = [one for one in found if not self.rules.why_not(one)]
        if not allowed:
            why = self.rules.why_not(found[0]) if found else "no address"
            return _forbidden(host, why)
        address = f"[{allowed[0]}]" if allowed[0].version == 6 else str(allowed[0])
        now = str(int(time.time()))
        headers = {
            "host": parts.netloc,
            "content-type": "application/json",
            "user-agent": "swarm-notices",
            "idempotency-key": id,
            TIMESTAMP_HEADER: now,
            "x-swarm-signature": sign(key.encode(), body, now),
        }
        target = parts._replace(netloc=f"{address}:{port}", fragment="").geturl()
        async with (
            httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_SECONDS) as client,
            client.stream("POST", target, content=body, headers=headers, extensions={"sni_hostname": host}) as answer,
        ):  # its body is not read
            return "" if 200 <= answer.status_code < 300 else f"it answered with status {answer.status_code}"

    async def test(self, row: NoticeRow) -> str:
        return await self.send(row, f"{row.id}-test-{secrets.token_hex(4)}", {"event": "test", "notice": row.id})

    # --- following ------------------------------------------------------------------------------------------------

    async def run(self, feed: Feed, *, at_once: int = _EVENTS_AT_ONCE) -> None:
        """Deliver what happens. Never ends by itself."""
        tasks: dict[str, asyncio.Task[None]] = {}
        turn, happened = asyncio.Semaphore(_AT_ONCE), _Happened(self.store, at_once)
        try:
            while True:
                since = feed.now()
                try:
                    rows = {row.id: row for row in await self.store.notices()}
                    for id in tasks.keys() - rows.keys():
                        tasks.pop(id).cancel()
                    for id, row in rows.items():
                        if id not in tasks or tasks[id].done():
                            tasks[id] = asyncio.create_task(self._follow(row, feed, happened, turn))
                except SwarmError as error:
                    log.warning("can't read the notices", error=str(error))
                await feed.changed(since, timeout_seconds=_CHECK_SECONDS)
                await asyncio.sleep(1.0)
        finally:
            await cancel_all(tasks.values())

    async def _follow(self, row: NoticeRow, feed: Feed, happened: _Happened, turn: asyncio.Semaphore) -> None:
        name, own = position_of(row.id), {NoticeKind(kind) for kind in row.kinds}
        after = saved = -1
        while True:
            since = feed.now()
            more = False
            try:
                if after < 0:
                    after = saved = await self.store.position(name)
                found, up_to, more = await happened.after(after, since)
                for event, kinds in found:
                    if wanted := kinds & own:
                        await self._deliver(row, event, wanted, turn)
                        await self.store.set_position(name, event.seq)
                        after = saved = event.seq
                after = up_to
                if after - saved >= _SAVE_AFTER:
                    await self.store.set_position(name, after)
                    saved = after
            except SwarmError as error:
                log.warning("can't follow what happens", notice=row.id, error=str(error))
            if not more:
                await feed.changed(since, timeout_seconds=_CHECK_SECONDS)
                await asyncio.sleep(1.0)

    async def _deliver(self, row: NoticeRow, event: Event, kinds: set[NoticeKind], turn: asyncio.Semaphore) -> None:
        try:
            ticket = await self.store.ticket(event.ticket_id)
        except NotFound:  # deleted meanwhile
            return
        if row.project_id is not None and ticket.project_id != row.project_id:
            return
        pause, most = _PAUSE_SECONDS
        began = milliseconds(event.at) or time.time() * 1000
        while True:
            async with turn:
                why = await self.send(row, f"{row.id}-{event.seq}", _body(row, event, kinds, ticket))
            await self.store.note_notice(row.id, why or None)
            if not why:
                return
            if time.time() - began / 1000 + pause > GIVE_UP_SECONDS:
                log.warning("a notice is given up after a day", notice=row.id, ticket=ticket.id, why=why)
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, most)


class _Happened:
    """What notices may tell of, read and parsed once for all that are up to date."""

    def __init__(self, store: Store, at_once: int) -> None:
        self._store, self._at_once = store, at_once
        self._found: deque[tuple[Event, set[NoticeKind]]] = deque()
        self._first = self._last = -1  # between these, all is in `_found`
        self._more = False
        self._since: asyncio.Event | None = None  # of the last read
        self._lock = asyncio.Lock()

    async def after(self, seq: int, since: asyncio.Event) -> tuple[list[tuple[Event, set[NoticeKind]]], int, bool]:
        """Of the events after that one, those that are told; up to which; and whether there are more at once."""
        async with self._lock:
            if not self._first <= seq <= self._last:
                found, up_to, more = await self._read(seq)
                if seq < self._first:  # its receiver took nothing for a while: it reads on its own
                    return found, up_to, more
                self._found, self._first = deque(found), seq
                self._last, self._more, self._since = up_to, more, since
            elif seq == self._last and (self._more or since is not self._since):
                found, self._last, self._more = await self._read(seq)
                self._found += found
                self._since = since
            wanted = list(takewhile(lambda one: one[0].seq > seq, reversed(self._found)))
            while len(self._found) > _EVENTS_KEPT:
                self._first = self._found.popleft()[0].seq
            return wanted[::-1], self._last, self._more

    async def _read(self, seq: int) -> tuple[list[tuple[Event, set[NoticeKind]]], int, bool]:
        facts = await self._store.facts(after=seq, limit=self._at_once)
        return [(event, kinds) for event in facts.events if (kinds := kinds_of(event))], facts.after, facts.more


def _forbidden(host: str, why: str) -> str:
    return f"{host} is {why}; SWARM_NOTICES_PRIVATE names networks that are allowed"


def _body(row: NoticeRow, event: Event, kinds: set[NoticeKind], ticket: Ticket) -> dict[str, Any]:
    first = next(kind for kind in reversed(NoticeKind) if kind in kinds)
    return {
        "id": f"{row.id}-{event.seq}",
        "event": str(first),
        "at": event.at,
        "ticket": {
            "id": ticket.id,
            "title": ticket.title[:500],
            "project_id": ticket.project_id,
            "state": event.data.get("to") if event.data.get("of") == "ticket" else ticket.state,
            "error": (ticket.error or "")[:1000] or None,
        },
        "step_id": event.step_id,
        "why": str(event.data["why"])[:500] if event.data.get("why") else None,
    }
