"""Small asyncio tools: work that must not be torn in half, and clean-up that can't be cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import structlog

log = structlog.get_logger(__name__)

T = TypeVar("T")


async def finish_uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end even if the caller is cancelled meanwhile; then let the cancellation go on.

    For steps whose half-way state can't be undone (a thread that is making a network namespace, a clean-up). Such
    work must bound its own time. When both happen, the cancellation wins and the work's error is logged.
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
    """A stack of undo steps: run last first, all of them, once, however the block ends, and not cancellable.

    Push a step *before* doing what it undoes. An error of a step never hides an error of the block.
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
    """Result (or error) of whichever ends first; the others are cancelled and waited for."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(t for t in tasks if t in done).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def quietly(work: Awaitable[object]) -> None:
    """Await a clean-up step; log its error instead of raising it."""
    try:
        await work
    except Exception as error:
        log.warning("clean-up step failed", error=str(error))
