"""Clean-up that can't be cancelled, and work that does not stop half-way."""

from __future__ import annotations

import asyncio

import pytest

from swarm.base.aio import finish_uninterrupted, first, undoing


async def test_work_ends_before_the_cancellation_is_raised() -> None:
    begun, go, done = asyncio.Event(), asyncio.Event(), False

    async def work() -> None:
        nonlocal done
        begun.set()
        await go.wait()
        done = True

    task = asyncio.create_task(finish_uninterrupted(work()))
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()  # a second Ctrl+C changes nothing
    await asyncio.sleep(0)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done


async def test_its_result_or_error_is_passed_on() -> None:
    async def value() -> int:
        return 4

    async def fail() -> None:
        raise ValueError("no")

    assert await finish_uninterrupted(value()) == 4
    with pytest.raises(ValueError, match="no"):
        await finish_uninterrupted(fail())


async def test_undo_runs_last_first_and_whole_even_when_a_step_fails() -> None:
    order: list[int] = []

    async def step(n: int) -> None:
        order.append(n)
        if n == 2:
            raise RuntimeError("step 2")

    with pytest.raises(KeyError):  # the block's own error, not the step's
        async with undoing() as undo:
            for n in (1, 2, 3):
                undo.push_async_callback(step, n)
            raise KeyError("block")
    assert order == [3, 2, 1]
    with pytest.raises(RuntimeError, match="step 2"):
        async with undoing() as undo:
            undo.push_async_callback(step, 2)


async def test_undo_is_not_cut_short_by_cancellation() -> None:
    inside, go, undone = asyncio.Event(), asyncio.Event(), False

    async def step() -> None:
        nonlocal undone
        inside.set()
        await go.wait()
        undone = True

    async def block() -> None:
        async with undoing() as undo:
            undo.push_async_callback(step)

    task = asyncio.create_task(block())
    await inside.wait()
    task.cancel()
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone


async def test_first_cancels_the_rest() -> None:
    stopped = asyncio.Event()

    async def slow() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return "slow"

    async def quick() -> str:
        return "quick"

    assert await first(slow(), quick()) == "quick"
    assert stopped.is_set()
