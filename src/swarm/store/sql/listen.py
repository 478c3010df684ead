"""Notices within milliseconds that any program committed to the PostgreSQL database: LISTEN, by a connection of its own
in the event loop, without a thread.

There is one notice for each transaction that changed rows that matter: other programs' by the triggers `*_notify`,
Swarm's own after the COMMIT (`Dialect.tell`). While the connection is lost nothing is noticed, so whoever waits is told
to look as soon as there is a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import psycopg

from swarm.base.log import logger
from swarm.errors import StoreError

log = logger(__name__)

_FIRST_PAUSE_SECONDS: Final = 0.1
_LAST_PAUSE_SECONDS: Final = 5.0
_ASKED: Final = 5  # how often two clients of a pooler are asked for their sessions
# A server may end sessions that are idle: this one always is.
_PREPARE: Final = "SET idle_session_timeout = 0; LISTEN swarm"


class Pooled(psycopg.NotSupportedError):
    """A pooler gives the session to others between transactions: notices go astray."""


class Listener:
    """Use `watching`. One waiter at a time."""

    def __init__(
        self, parameters: Mapping[str, Any], explain: Callable[[BaseException], str], *, events: bool = True
    ) -> None:
        self._parameters, self._explain, self._events = parameters, explain, events
        self._changed = asyncio.Event()
        self._told: tuple[bytes, ...] = ()

    @classmethod
    @asynccontextmanager
    async def watching(
        cls, parameters: Mapping[str, Any], explain: Callable[[BaseException], str], *, events: bool = True
    ) -> AsyncIterator[Listener]:
        """``parameters``: of `psycopg.connect`. ``explain``: what to say of an error. ``events``: also notice commits
        that only add events. Raises StoreError."""
        listener = cls(parameters, explain, events=events)
        try:
            connection = await listener._connect()
        except (psycopg.Error, OSError) as error:
            raise StoreError(explain(error)) from error
        listening = asyncio.ensure_future(listener._listen(connection))
        try:
            yield listener
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    def mute(self) -> None:
        """Nothing: a notice comes after the commit, when its locks are released."""

    def unmute(self) -> None:
        """See `mute`."""

    async def changed(self, *, timeout_seconds: float) -> bool:
        """True as soon as there was a notice of a commit that the last call did not tell, which is visible then; False
        after ``timeout_seconds``."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        connection = await self._new()
        try:
            await self._refuse_shared(connection)
            await connection.execute(_PREPARE)
            row = await (await connection.execute("SELECT current_schema()")).fetchone()
            schema = str(row[0]).encode() if row else b""
            self._told = (schema, schema + b":events") if self._events else (schema,)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _new(self) -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(**self._parameters, autocommit=True, prepare_threshold=None)

    async def _refuse_shared(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Raises Pooled. A pooler tells a pid of its own, so without one this asks nothing more. With one, the sessions
        of two clients must be two, and stay so; those that are free are given to whoever asks next."""
        ours = await _session(connection)
        if ours == connection.info.backend_pid:
            return
        async with await self._new() as other:
            for _ in range(_ASKED):
                if await _session(other) == ours or await _session(connection) != ours:
                    raise Pooled

    async def _listen(self, connection: psycopg.AsyncConnection[Any]) -> None:
        while True:
            try:
                await self._receive(connection)
            except (psycopg.Error, OSError) as error:
                log.warning("no notices of changes: the connection was lost", error=self._explain(error))
            finally:
                await connection.close()
            connection = await self._reconnect()
            log.info("notices of changes come again")
            self._changed.set()  # some may have been lost

    async def _receive(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Until the connection is lost: raises psycopg.Error then."""
        loop = asyncio.get_running_loop()
        lost: asyncio.Future[None] = loop.create_future()
        server, reads = connection.pgconn, True

        def stop() -> None:
            """Once: libpq has closed the descriptor of a lost connection, so its number may be another file's by now,
            such as that of a child whose end nobody would learn of."""
            nonlocal reads
            if reads:
                reads = False
                loop.remove_reader(descriptor)

        def read() -> None:
            try:
                server.consume_input()
                while (notice := server.notifies()) is not None:
                    if notice.extra in self._told:
                        self._changed.set()
            except psycopg.Error as error:
                stop()
                if not lost.done():
                    lost.set_exception(error)

        descriptor = server.socket
        loop.add_reader(descriptor, read)
        try:
            read()  # what came together with the answer to LISTEN
            await lost
        finally:
            stop()

    async def _reconnect(self) -> psycopg.AsyncConnection[Any]:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            await asyncio.sleep(random.uniform(pause / 2, pause))  # so that not all engines come at once
            pause = min(2 * pause, _LAST_PAUSE_SECONDS)
            with contextlib.suppress(psycopg.Error, OSError):
                return await self._connect()


async def _session(connection: psycopg.AsyncConnection[Any]) -> int:
    [(pid,)] = await (await connection.execute("SELECT pg_catalog.pg_backend_pid()")).fetchall()
    return int(pid)
