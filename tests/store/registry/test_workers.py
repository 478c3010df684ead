"""What a dead worker of this host held is free at once; what may still live is waited for until its lease ends."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from swarm.base import process
from swarm.store.store import Store
from tests.store.databases import Outside, claimed, insert


def a_dead_process() -> dict[str, object]:
    child = subprocess.Popen(["sleep", "60"])
    started = process.start_time(child.pid)
    child.kill()
    child.wait()
    return {"pid": child.pid, "started": started}


OURS = {"pid": os.getpid(), "started": process.start_time(os.getpid())}
HERE = {"machine": process.machine()}


@pytest.mark.parametrize(
    ("row", "is_dead"),
    [
        (a_dead_process() | HERE, True),
        (OURS | HERE | {"started": 1}, True),  # its pid is another process's by now
        (OURS | HERE, False),
        (a_dead_process() | {"machine": f"{process.boot_id()} 1"}, False),  # of another container
        (a_dead_process() | {"machine": "another boot"}, False),
        (a_dead_process() | {"machine": ""}, False),
        (a_dead_process(), False),  # of an engine that says too little about itself
        (a_dead_process() | HERE | {"started": None}, False),
    ],
    ids=["ended", "its pid was reused", "alive", "container", "boot", "nowhere", "no machine", "no start time"],
)
async def test_only_the_surely_dead_lose_their_leases(
    store: Store, outside: Outside, row: dict[str, object], is_dead: bool
) -> None:
    insert(outside, "t")
    insert(outside, "other")
    await claimed(store, "w", ticket_id="t", seconds=3600)
    await claimed(store, "alive", ticket_id="other", seconds=3600)
    pid, info = row["pid"], {name: value for name, value in row.items() if name != "pid"}
    await store.heartbeat("w", host="any", pid=pid, info=info)  # type: ignore[arg-type]
    assert await store.bury_dead_workers() == (["w"] if is_dead else [])
    assert await store.bury_dead_workers() == []
    assert len(await store.workers()) == (0 if is_dead else 1)
    assert [claim.ticket.id for claim in await claimed(store, "next", limit=9)] == (["t"] if is_dead else [])
    assert (await store.attempts("other"))[0].outcome is None


@pytest.mark.parametrize(
    "info", ["", "[]", "null", "{", "[" * 100_000, json.dumps({"machine": HERE["machine"], "started": "x"}), b"\xff"]
)
async def test_a_row_that_another_program_wrote_is_no_reason(store: Store, outside: Outside, info: object) -> None:
    sql = "INSERT INTO workers (id, host, pid, info) VALUES ('w', 'h', {}, ?)"
    if outside.refuses(sql.format("'pid'"), (info,)):
        outside.execute(sql.format("NULL"), (info,))
    assert await store.bury_dead_workers() == []
    assert (await store.workers())[0].id == "w"
