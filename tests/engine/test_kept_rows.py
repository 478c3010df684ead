"""Files of snapshots and the rows that name them: none is without the other for long."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from swarm.app import wiring
from swarm.config import Settings
from swarm.engine import kept
from swarm.errors import Conflict, StoreError
from swarm.model import Snapshot
from tests.conftest import PATIENCE_SECONDS
from tests.engine.sandboxing import Desk


class Answers:
    """Of a store, which get lost: before the change or after it."""

    def __init__(self, desk: Desk, *, after: bool, deaf: bool = False) -> None:
        self._store, self._after, self._deaf = desk.store, after, deaf

    async def add_snapshot(
        self, snapshot: Snapshot, *, keep_seconds: float | None = None, by: str | None = None
    ) -> Snapshot:
        if self._after:
            await self._store.add_snapshot(snapshot, keep_seconds=keep_seconds, by=by)
        raise StoreError("the connection is gone")

    async def snapshot_ids(self, host: str | None) -> set[str]:
        if self._deaf:
            raise StoreError("the connection is gone")
        return await self._store.snapshot_ids(host)


def made(desk: Desk, id: str, **columns: object) -> Snapshot:
    (desk.settings.snapshots / id).mkdir(parents=True)
    return Snapshot(id=id, kind="named", host="here", **columns)  # type: ignore[arg-type]


async def test_a_snapshot_has_both_files_and_a_row_or_neither(settings: Settings, tmp_path: Path) -> None:
    async with Desk.at({**settings.model_dump(), "home": tmp_path / "home"}) as desk:
        files = wiring.snapshots(desk.settings)
        one, two, three, four = (digit * 32 for digit in "1234")
        with pytest.raises(StoreError):
            await kept.add(Answers(desk, after=False), files, made(desk, one), keep_seconds=None)
        assert desk.files() == [], "it has no row"
        answered = await kept.add(Answers(desk, after=True), files, made(desk, two), keep_seconds=None)
        assert (answered.id, desk.files()) == (two, [two]), "it has one"
        with pytest.raises(StoreError):
            await kept.add(Answers(desk, after=True, deaf=True), files, made(desk, three), keep_seconds=None)
        assert desk.files() == [two, three], "nobody knows"
        await kept.add(desk.store, files, made(desk, four, name="base"), keep_seconds=None)
        with pytest.raises(Conflict):
            await kept.add(desk.store, files, made(desk, one, name="base"), keep_seconds=None)
        assert desk.files() == [two, three, four]
        adding = asyncio.create_task(kept.add(desk.store, files, made(desk, one), keep_seconds=None))
        await asyncio.sleep(0)
        adding.cancel()  # while it is written
        with pytest.raises(asyncio.CancelledError):
            await adding
        assert (one in await desk.store.snapshot_ids(None)) == (one in desk.files())


async def test_what_can_not_be_forgotten_is_not_tried_for_ever(settings: Settings, tmp_path: Path) -> None:
    async with Desk.at({**settings.model_dump(), "home": tmp_path / "home"}) as desk:
        files, (one, two) = wiring.snapshots(desk.settings), (digit * 32 for digit in "12")
        for id in (one, two):
            expired = replace(made(desk, id), kind="attempt", host=socket.gethostname(), expires_at=1)
            await desk.store.add_snapshot(expired)
        desk.sql("CREATE TRIGGER keeps BEFORE DELETE ON snapshots BEGIN SELECT RAISE(IGNORE); END")
        async with asyncio.timeout(PATIENCE_SECONDS):
            await kept.collect(desk.store, files)
        assert desk.files() == []


async def test_files_whose_row_can_not_be_written_yet_are_not_collected(settings: Settings, tmp_path: Path) -> None:
    async with Desk.at({**settings.model_dump(), "home": tmp_path / "home"}) as desk:
        files, place = wiring.snapshots(desk.settings), desk.settings.snapshots / ("1" * 32)
        made(desk, place.name)
        (place / "snapshot.json").write_text(json.dumps({"owner": files.owner}))
        for renewed in (True, False):
            os.utime(place, (0, 0))
            if renewed:
                files.renew(place.name)
            await kept.collect(desk.store, files)
            assert bool(desk.files()) == renewed
