"""How long leases are good for, by the engine's own clock."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from swarm.engine import leases
from swarm.errors import StoreError
from tests.conftest import PATIENCE_SECONDS


@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_what_can_not_be_renewed_is_lost(how: str) -> None:
    """Also if the database says nothing at all."""
    lost, answers = asyncio.Event(), ["well"]

    async def renew(ids: Collection[str]) -> None:
        if answers.pop() == "well":
            answers[:] = [how]
        elif how == "fails":
            answers[:] = [how]
            raise StoreError("locked")
        else:
            await asyncio.Event().wait()

    keeping = asyncio.create_task(leases.keep(lambda: ["a"], renew, lost.set, lease_seconds=0.3))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await lost.wait()
    keeping.cancel()


async def test_what_is_renewed_or_not_held_is_not_lost() -> None:
    for seconds in (0.3, 5.0):  # a busy machine may stand still for longer than a short one
        if not await is_lost(seconds):
            return
    raise AssertionError("lost")


async def is_lost(lease_seconds: float) -> bool:
    lost, renewed = asyncio.Event(), asyncio.Event()
    held: list[str] = []
    looks = 0

    def look() -> list[str]:
        nonlocal looks
        looks += 1
        held[:] = ["a"] if looks > 5 else []  # longer than a lease
        return held

    async def renew(ids: Collection[str]) -> None:
        if looks > 10:
            renewed.set()

    keeping = asyncio.create_task(leases.keep(look, renew, lost.set, lease_seconds=lease_seconds))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await renewed.wait()
    keeping.cancel()
    return lost.is_set()
