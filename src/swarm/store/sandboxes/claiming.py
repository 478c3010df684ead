"""Gives sandboxes to an engine, one transaction each: what another program added may refuse one, and stops no other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from swarm.base.log import logger
from swarm.errors import ChangeRefused, SwarmError
from swarm.model import SandboxClaim
from swarm.store.sandboxes import holding, taking
from swarm.store.sandboxes.holding import SandboxRenewal
from swarm.store.sandboxes.taking import Taken, Taking
from swarm.store.sql.rows import lenient
from swarm.store.sql.threads import ConnectionThread
from swarm.store.sql.transaction import Tx
from swarm.store.tickets import places
from swarm.store.tickets.isolation import IsolatingThread

log = logger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
_SAID: Final = 1000


class SandboxClaimer:
    """For one store."""

    def __init__(self, read: ConnectionThread, write: IsolatingThread) -> None:
        self._read, self._write = read, write
        self._said = set[tuple[str, str]]()
        self._tasks = set[asyncio.Future[Any]]()

    async def claim(self, request: Taking, *, limit: int, held: Collection[str]) -> list[SandboxClaim]:
        """When the caller is cancelled, what was claimed goes back."""
        claiming = asyncio.ensure_future(self._claim(request, limit=limit, held=held))
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            claiming.add_done_callback(self._hand_back)
            raise

    async def _claim(self, request: Taking, *, limit: int, held: Collection[str]) -> list[SandboxClaim]:
        for id, hold_id in await self._read.call(holding.expired):
            await self._try(id, holding.give_up, id, hold_id, held=frozenset(held), until_seconds=request.lease_seconds)
        if await self._read.call(taking.any_marked):
            await self._try("unmet", places.read, request.place, of=places.SANDBOXES)
        claims, share = list[SandboxClaim](), request.share
        over = {one: why for one in share.taken if (why := share.refuses(one))} if share is not None else {}
        known = -1
        while known < len(over):  # a project that has its share hides nobody else's
            known = len(over)
            waits = await self._take(request, claims, over, limit=limit)
        if share is not None:
            share.others_wait, share.over = waits, await self._told(over, request.host)
        if request.place.marked:  # from now on it is known since when
            await self._try("unmet", places.read, request.place, of=places.SANDBOXES)
        return claims

    async def _take(self, request: Taking, claims: list[SandboxClaim], over: dict[str, str], *, limit: int) -> bool:
        """Add to ``claims`` what there is room for, and to ``over`` who has their share; does somebody wait who has
        not?"""
        full = waits = False
        marks = (*request.place.here, *request.place.given_up)
        found = await self._read.call(taking.candidates, host=request.host, limit=limit, but=tuple(over), marks=marks)
        for id, ends, project in found:
            if not ends and (project in over or full or len(claims) >= limit):
                waits |= project not in over
                continue
            taken: Taken | None = await self._try(id, taking.take, id, request)
            if taken is None:
                continue
            full |= taken.full  # those behind it wait too, so that a large one isn't starved
            waits |= taken.full
            if taken.over:
                over[str(project)] = taken.over
            if taken.claim is not None:
                claims.append(taken.claim)
                if request.share is not None:
                    request.share.add(taken.claim)
                if request.room is not None:
                    request.room.take(taken.claim.memory_mb, taken.claim.disk_mb)
        return waits

    async def _told(self, over: Mapping[str, str], host: str) -> dict[str, str]:
        """Those of them that have sandboxes which wait; these say so."""
        told = dict[str, str]()
        for project, why in over.items():
            if found := await self._read.call(taking.waiting, host=host, project_id=project):
                told[project] = why
            if new := [id for id, said in found if said != why]:
                await self._try(project, taking.tell, new, error=why)
        return told

    async def renew(self, hold_ids: Collection[str], *, lease_seconds: float, used: Collection[str]) -> SandboxRenewal:
        """Together; each by itself if that is refused. One whose lease can't be extended is lost."""
        holds, which = tuple(hold_ids), frozenset(used)
        try:
            return await self._write.call(holding.renew, holds, lease_seconds=lease_seconds, used=which)
        except ChangeRefused:
            lost, wanted = set[str](), dict[str, str]()
        for hold in holds:
            one: SandboxRenewal | None = await self._try(
                hold, holding.renew, (hold,), lease_seconds=lease_seconds, used=which
            )
            lost |= one.lost if one is not None else {hold}
            wanted |= one.wanted if one is not None else {}
        return SandboxRenewal(lost=frozenset(lost), wanted=wanted)

    async def _try(
        self, id: object, function: Callable[Concatenate[Tx, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        """None if the database refused the change."""
        try:
            return await self._write.call(function, *args, **kwargs)
        except ChangeRefused as error:
            said = (str(lenient(id)), str(error))
            if said not in self._said and len(self._said) < _SAID:
                self._said.add(said)
                log.warning("a sandbox is skipped, since its row can't be changed", id=said[0], error=said[1])
            return None

    def _hand_back(self, claiming: asyncio.Future[list[SandboxClaim]]) -> None:
        if claiming.cancelled() or claiming.exception() is not None or self._write.closed:
            return
        task = asyncio.ensure_future(self._release(claiming.result()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _release(self, claims: list[SandboxClaim]) -> None:
        for claim in claims:
            try:
                await self._write.call(holding.released, claim.hold_id, why="never begun")
            except SwarmError:  # its lease ends anyway
                return
