"""Keeps one ticket's fault from stopping all others.

Another program may have added a trigger, an index or a constraint that refuses Swarm's changes, or written values that
can't be read. A transaction serves many tickets, so its error does not say which of them is at fault. So it runs again
in isolation: every ticket's changes are written by themselves (`Changes.each`), and the ticket that raises is known.
That ticket fails with a sentence. If even that can't be written, the ticket is skipped for a while, and said once.
The price is paid only after a fault: while all is well, this adds nothing to a transaction.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from swarm.base.log import logger
from swarm.errors import ChangeRefused, SwarmError
from swarm.model import TicketState
from swarm.store.sql.database import Database
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import Due, lenient, message
from swarm.store.sql.threads import Batch, ConnectionThread
from swarm.store.sql.transaction import NotExact, Tx
from swarm.store.tickets.changes import MENDED, Changes, Culprit
from swarm.store.tickets.validation import shown

log = logger(__name__)

P = ParamSpec("P")
Result = TypeVar("Result")

ISOLATED_SECONDS: Final = 60.0  # after a fault; a skipped ticket is tried again as soon as this has passed
_ROUNDS: Final = 100  # faults that one request may uncover
_SHOWN: Final = 20

_TICKET_OF_RUN: Final = Sql("SELECT ticket_id FROM workflow_runs WHERE id = :id")
_STATE: Final = Sql("SELECT state FROM tickets WHERE id = :id")
_LIVE_RUNS: Final = Sql("SELECT id FROM workflow_runs WHERE ticket_id = :id AND status IN ('running', 'waiting')")
_ENDED: Final = (TicketState.DONE, TicketState.FAILED, TicketState.CANCELLED)


class RowFault(Exception):
    """Writing what belongs to ``culprit`` raised an error; ``why`` is a sentence."""

    def __init__(self, culprit: Culprit, why: str) -> None:
        super().__init__(f"{culprit.kind} {shown(culprit.id)}: {why}")
        self.culprit = culprit
        self.why = why


class Isolation:
    """For one process. Set on the writing thread, read on others."""

    def __init__(self) -> None:
        self._until = 0.0
        self._skipped: dict[Culprit, tuple[float, str]] = {}
        self._said: set[tuple[Culprit, str]] = set()

    @property
    def active(self) -> bool:
        return time.monotonic() < self._until

    def begin(self) -> None:
        self._until = time.monotonic() + ISOLATED_SECONDS

    def skips(self, culprit: Culprit) -> bool:
        until, _ = self._skipped.get(culprit, (0.0, ""))
        return time.monotonic() < until

    @property
    def skipped(self) -> Mapping[str, str]:
        """Why, by what is skipped now; a few of them."""
        now = time.monotonic()
        found = [(f"{c.kind} {shown(c.id)}", why) for c, (until, why) in list(self._skipped.items()) if until > now]
        return dict(found[:_SHOWN])

    def paced(self, due: Due) -> Due:
        """What is skipped may be due all the time: that is no reason to look without a pause."""
        return replace(due, next_ms=max(1000.0, due.next_ms)) if self._skipped and due.next_ms is not None else due

    @contextmanager
    def of(self, tx: Tx) -> Iterator[Changes]:
        """Changes; turns an error into a RowFault when it is known whose changes raised it."""
        changes = Changes(tx, skips=self.skips if self.active else None)
        try:
            yield changes
        except (SwarmError, NotExact):
            raise
        except Exception as error:
            # A value that the driver can't bind is a bug of the caller, and no ticket's.
            if changes.culprit is None or _is_bug(error) or tx.is_of_database(error):
                raise
            raise RowFault(changes.culprit, _sentence(changes.tx, error)) from error

    def fail(self, tx: Tx, fault: RowFault) -> None:
        """Fail the ticket at fault, with everything that runs for it."""
        culprit = fault.culprit
        if culprit.kind == "run":
            found = tx.first(_TICKET_OF_RUN, id=culprit.id)
            id = found.ticket_id if found is not None else None
        else:
            id = culprit.id if culprit.kind == "ticket" else None
        row = tx.first(_STATE, id=id) if id is not None else None
        if id is None or row is None or row.state in _ENDED:
            raise fault  # there is no ticket to fail: skip it
        fail_ticket(Changes(tx), id, row.state, fault.why)
        after = tx.first(_STATE, id=id)
        if after is not None and after.state != TicketState.FAILED:
            raise fault  # a trigger undid it
        self._say(culprit, fault.why, "a ticket failed, since its rows can't be changed")

    def skip(self, fault: RowFault) -> None:
        now = time.monotonic()
        self._skipped = {one: value for one, value in self._skipped.items() if value[0] > now}
        self._skipped[fault.culprit] = (now + ISOLATED_SECONDS, fault.why)
        self._say(fault.culprit, fault.why, "skipped, since its rows can't be changed, not even to fail it")

    def _say(self, culprit: Culprit, why: str, what: str) -> None:
        if (culprit, why) not in self._said and len(self._said) < 1000:
            self._said.add((culprit, why))
            log.warning(what, of=culprit.kind, id=lenient(culprit.id), error=message(why))


def fail_ticket(changes: Changes, id: str, state: object, error: str) -> None:
    """Fail a ticket that is under way, and cancel its runs."""
    changes.cancel_runs([row.id for row in changes.tx.all(_LIVE_RUNS, id=id)], error=error)
    changes.set_ticket(id, lenient(state), TicketState.FAILED, error=error, why=MENDED)
    changes.flush()


def _is_bug(error: Exception) -> bool:
    return type(error).__name__ in ("ProgrammingError", "InterfaceError")  # as PEP 249 names them


def _sentence(tx: Tx, error: Exception) -> str:
    if isinstance(error, tx.dialect.driver_error):
        return (
            f"the database refused a change that this ticket needs: {' '.join(str(error).split())}; look for a "
            "trigger, an index or a constraint that Swarm did not make, then `swarm ticket retry`"
        )
    return sentence(error)


def sentence(error: Exception) -> str:
    """Why a ticket fails whose rows hold a value that can't be read."""
    return (
        f"a value in the rows that Swarm keeps for this ticket can't be used ({type(error).__name__}: {error}): "
        "another program wrote it; `swarm ticket retry` starts again"
    )


class IsolatingThread:
    """A writing thread whose requests are repeated in isolation when they raise what is no SwarmError."""

    def __init__(
        self,
        db: Database,
        isolation: Isolation,
        *,
        untold: Collection[Callable[..., Any]] = (),
        shared: Collection[Callable[..., Any]] = (),
        joined: tuple[Callable[..., Any], ...] = (),
    ) -> None:
        self._thread = thread = ConnectionThread(db, write=True, untold=untold, shared=shared, joined=joined)
        self._refusal = db.dialect.driver_error
        self._isolation = isolation
        self._tasks: set[asyncio.Task[None]] = set()
        self.call_raw = thread.call_raw
        self.at_once = thread.at_once
        self.close = thread.close
        self.use = thread.use

    @property
    def closed(self) -> bool:
        return self._thread.closed

    async def call(
        self, function: Callable[Concatenate[Tx, P], Result], /, *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        try:
            return await self._thread.call(function, *args, **kwargs)
        except self._refusal as error:
            raise ChangeRefused(error) from error

    async def call_batch(self, batch: Batch[Any, Result], request: Any) -> Result:
        result: Result = await self.submit_batch(batch, request)
        return result

    def submit_batch(self, batch: Batch[Any, Any], request: Any) -> asyncio.Future[Any]:
        """Queued when this returns."""
        outer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        inner = self._thread.submit_batch(batch, request)

        def answered(inner: asyncio.Future[Any]) -> None:
            if outer.cancelled():
                return
            if inner.cancelled():
                outer.cancel()
            elif (error := inner.exception()) is None:
                outer.set_result(inner.result())
            elif isinstance(error, SwarmError) or not isinstance(error, Exception):
                outer.set_exception(error)
            else:
                task = asyncio.ensure_future(self._repeat(batch, request, error, outer))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

        inner.add_done_callback(answered)
        outer.add_done_callback(lambda outer: inner.cancel() if outer.cancelled() else None)
        return outer

    async def _repeat(self, batch: Batch[Any, Any], request: Any, error: Exception, outer: asyncio.Future[Any]) -> None:
        try:
            result = await self._in_isolation(batch, request, error)
        except asyncio.CancelledError:
            outer.cancel()
            raise
        except Exception as final:
            if not outer.done():
                outer.set_exception(final)
        else:
            if not outer.done():
                outer.set_result(result)

    async def _in_isolation(self, batch: Batch[Any, Any], request: Any, error: Exception) -> Any:
        for _ in range(_ROUNDS):
            self._isolation.begin()
            if isinstance(error, RowFault):
                await self._settle(error)
            try:
                return await self._thread.call_batch(batch, request)
            except RowFault as again:
                error = again
            except self._refusal as final:  # even in isolation nobody knows whose it is
                if _is_bug(final):
                    raise
                raise ChangeRefused(final) from final
        raise ChangeRefused(error) from error  # of very many tickets: the next request goes on with them

    async def _settle(self, fault: RowFault) -> None:
        try:
            await self._thread.call(self._isolation.fail, fault)
        except SwarmError:
            raise
        except Exception:
            self._isolation.skip(fault)
