"""Small asyncio tools: work that must not stop half-way, and clean-up that can't be cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from swarm.base.log import logger

log = logger(__name__)

T = TypeVar("T")


async def finish_uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Await ``work`` to its end; a cancellation that arrives meanwhile is raised only after that.

    For work that can't be undone half-way (a thread that creates a network namespace, a clean-up). It must bound its
    own time. If the work fails and the caller was cancelled, the cancellation is raised and the error logged.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                break
            cancelled = error
        except BaseException:
            break  # the work's own error: raised below
    if cancelled is not None:
        if not task.cancelled() and task.exception() is not None:
            log.warning("failed while being cancelled", error=str(task.exception()))
        raise cancelled
    return task.result()


@asynccontextmanager
async def undoing() -> AsyncIterator[AsyncExitStack]:
    """Give the block a stack of undo steps that all run, last first, when it ends, even if it is cancelled.

    Push a step *before* doing what it undoes. An error in a step never hides the block's own error.
    """
    stack = AsyncExitStack()
    try:
        yield stack
    except BaseException:
        try:
            await finish_uninterrupted(stack.aclose())
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.error("clean-up failed", error=str(error))
        raise
    await finish_uninterrupted(stack.aclose())


async def first(*work: Coroutine[Any, Any, T]) -> T:
    """Run all of ``work`` at once, cancel the rest when the first one ends, and return (or raise) its result."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(t for t in tasks if t in done).result()
    finally:
        await cancel_all(tasks)


async def cancel_all(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel these tasks and wait for their end. Their errors are dropped."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def quietly(work: Awaitable[object]) -> None:
    """Await a clean-up step, and log its error instead of raising it."""
    try:
        await work
    except Exception as error:
        log.warning("clean-up step failed", error=str(error))


class _Stopped(Exception):
    pass


async def stoppable(work: Callable[[Callable[[], None]], T]) -> T:
    """The result of ``work(check)``, in a thread: files are hashed there, which may take long. After a cancellation
    ``check`` raises, and the thread is waited for: nothing is removed under its hands."""
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise _Stopped

    thread = asyncio.ensure_future(asyncio.to_thread(work, check))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        stop.set()
        await finish_uninterrupted(_ended(thread))
        raise


async def _ended(thread: asyncio.Future[Any]) -> None:
    await asyncio.wait([thread])
    if not thread.cancelled():
        thread.exception()  # seen
