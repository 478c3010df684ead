"""The process that makes large decisions: killed, stopped, short of memory, without its database."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pytest

from swarm import __version__
from swarm.base import confined
from swarm.errors import StoreError
from swarm.store.runs.decision import Decided
from swarm.store.runs.decision_process import DecisionProcess, _Decider
from swarm.store.store import Store
from swarm.workflow import plan
from tests.store.databases import Outside
from tests.store.flows import claims, finish, gives, run, ticket
from tests.store.runs.workflows import proved

LONG = ["y" * 1000] * 100
MUCH = """
steps:
  - {id: one, agent: echo}
  - {id: two, agent: echo, needs: one, inputs: {n: "${steps.one.outputs.x[0]}"}}
"""
BEGUN = gives(one={"x": LONG})


async def asks(store: Store, outside: Outside, id: str = "t") -> None:
    """A run whose next decision is for the process."""
    await ticket(store, outside, MUCH, id=id)
    (one,) = await claims(store)
    await finish(store, one, BEGUN)


def process_of(store: Store) -> DecisionProcess:
    return store._planner._process


async def test_a_process_that_was_killed_is_started_again(store: Store, outside: Outside) -> None:
    await asks(store, outside, "a")
    assert await run(store) == ["two"]
    pid = process_of(store).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await asks(store, outside, "b")
    assert await run(store) == ["two"]
    assert process_of(store).pid not in (None, pid)


async def test_one_that_dies_each_time_fails_the_run(
    store: Store, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_of(store), "_module", "swarm.base.clock")  # it ends at once
    await asks(store, outside)
    assert await claims(store) == []
    ended = await store.ticket("t")
    assert ended.state == "failed"
    assert str(ended.error).startswith("its next steps can't be decided: that needed more than 2048 MiB of memory")


async def test_a_database_that_is_away_is_asked_again(
    store: Store, outside: Outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asks(store, outside)
    monkeypatch.setattr(process_of(store)._db, "_url", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(StoreError, match=r"none\.db does not exist"):
        await asyncio.to_thread(
            process_of(store).decide,
            Decided(run_id="r", revision=0, processed=()),
            store._workflows.definitions,
        )
    assert await claims(store) == [] and (await store.ticket("t")).state == "in_progress"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    await store.shift_clock(31_000)
    assert await run(store) == ["two"]


async def test_a_value_that_can_t_be_read_fails_its_ticket(store: Store, outside: Outside) -> None:
    await asks(store, outside)
    outside.execute("UPDATE artifacts SET data = :no_json", {"no_json": "x" * 100_000})
    assert await claims(store) == []
    ended = await store.ticket("t")
    assert ended.state == "failed" and "ValueError: Expecting value" in str(ended.error)


async def test_a_store_that_closes_does_not_wait_for_it(
    url: str, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()
    async with Store.open(url) as store:
        await asks(store, outside, "a")
        assert await run(store) == ["two"]
        process = process_of(store)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        loop, receive = asyncio.get_running_loop(), confined._Pipes.receive

        def asking(pipes: confined._Pipes) -> confined.Message:
            loop.call_soon_threadsafe(asked.set)
            return receive(pipes)

        monkeypatch.setattr(confined._Pipes, "receive", asking)
        await asks(store, outside)
        await store.claim("w", lease_seconds=60)
        await asked.wait()
    assert process_of(store).pid is None
    async with Store.open(url) as store:
        await store.shift_clock(31_000)
        assert await run(store) == ["two"]
        await proved(store, outside)


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
@pytest.mark.needs("postgres")
async def test_what_libpq_takes_from_the_environment(
    url: str, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = psycopg.conninfo.conninfo_to_dict(url)
    for name in ("host", "port", "user"):
        if name in known:
            monkeypatch.setenv(f"PG{name.upper()}", str(known[name]))
    async with Store.open(f"postgresql:///{known['dbname']}", planning_seconds=60) as store:
        await asks(store, outside)
        assert await run(store) == ["two"]
        assert process_of(store).pid is not None
        await proved(store, outside)


def answered(decider: _Decider, *request: object) -> tuple[Any, Any]:
    _, [reply, *_] = decider.answer({}, [pickle.dumps(request)])
    found: tuple[Any, Any] = pickle.loads(reply)
    return found


async def test_what_takes_too_much_memory_is_said(
    store: Store, outside: Outside, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asks(store, outside)
    run_id = (await store.ticket("t")).run_id or ""
    with contextlib.closing(_Decider()) as decider:
        request = (__version__, *process_of(store)._db.address, run_id)
        decided, frozen = answered(decider, *request)
        assert isinstance(decided, Decided) and frozen is not None
        kept, connection = decider._engine.definitions, decider._opened
        with monkeypatch.context() as patch:
            patch.setattr(plan, "advance", _needs_memory)
            said, _ = answered(decider, *request)
        assert said == "its next steps can't be decided: that takes more than 2048 MiB of memory or 127 MiB of rows"
        assert decider._engine.definitions is not kept and decider._opened is None is not connection
        assert isinstance(answered(decider, *request)[0], Decided)
        again = decider._opened
        assert isinstance(answered(decider, *request)[0], Decided) and decider._opened is again
        old, _ = answered(decider, "0.0.1", *request[1:])
        assert isinstance(old, StoreError) and "start the engine again" in str(old)
    await run(store)


def _needs_memory(*values: object) -> NoReturn:
    raise MemoryError


async def test_one_that_is_killed_from_outside_each_time_is_tried_again_later(
    store: Store, outside: Outside, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the kernel when memory is short: no fault of the ticket's."""
    send = confined._Pipes.send

    def killed(pipes: confined._Pipes, *message: Any) -> None:
        pid = process_of(store).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        send(pipes, *message)

    await asks(store, outside)
    with monkeypatch.context() as patch:
        patch.setattr(confined._Pipes, "send", killed)
        assert await claims(store) == []
    assert (await store.ticket("t")).state == "in_progress"
    assert "the process that decides does not run: it was killed twice" in capsys.readouterr().out
    await store.shift_clock(31_000)
    assert await run(store) == ["two"]


async def test_none_can_be_started(
    store: Store, outside: Outside, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    await asks(store, outside)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        assert await claims(store) == []
    said = capsys.readouterr().out
    assert "does not run: No such file or directory" in said and "Traceback" not in said
    assert (await store.ticket("t")).state == "in_progress"
    await store.shift_clock(31_000)
    assert await run(store) == ["two"]


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
@pytest.mark.needs("postgres")
async def test_a_connection_that_the_server_ended_is_made_again(store: Store, outside: Outside) -> None:
    await asks(store, outside)
    run_id = (await store.ticket("t")).run_id or ""
    with contextlib.closing(_Decider()) as decider:
        request = (__version__, *process_of(store)._db.address, run_id)
        for _ in range(2):
            assert isinstance(answered(decider, *request)[0], Decided)
            assert decider._opened is not None
            number = decider._opened[1].driver.info.backend_pid
            outside.execute(f"SELECT pg_terminate_backend({number}, 60000)")
    await run(store)
