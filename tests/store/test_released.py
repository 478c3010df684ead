"""A database of any released version is migrated, never rejected, and what it held goes on where it was."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

import pytest

from swarm.admin.prove import judge
from swarm.model import TicketState
from swarm.store.store import Store
from tests.store import flows

RELEASED = sorted((Path(__file__).parent / "released").glob("*.sql"))


@pytest.fixture(params=RELEASED, ids=lambda path: path.stem)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / "swarm.db"
    connection = sqlite3.connect(file)
    connection.executescript(request.param.read_text(encoding="utf-8"))
    connection.close()
    return file


def tables(file: Path) -> set[tuple[str, str]]:
    connection = sqlite3.connect(file)
    found = connection.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    names = {(f"{kind} {name}", " ".join(sql.replace('"', "").split())) for kind, name, sql in found}
    connection.close()
    return names


def test_there_is_one_for_the_first_release() -> None:
    assert "0.1.0" in [path.stem for path in RELEASED]


async def test_it_becomes_what_a_new_one_is(file: Path, tmp_path: Path) -> None:
    async with Store.open(f"sqlite:///{file}") as store:
        await store.migrate()
        assert await store.revision() == Store.head()
    async with Store.open(f"sqlite:///{tmp_path}/new.db") as store:
        await store.migrate()
    assert tables(file) == tables(tmp_path / "new.db")


async def test_an_index_that_its_user_dropped_is_made_again(file: Path) -> None:
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("DROP INDEX tickets_created")
    async with Store.open(f"sqlite:///{file}") as store:
        await store.migrate()
    assert "index tickets_created" in {name for name, _ in tables(file)}


async def test_its_tickets_go_on(file: Path) -> None:
    async with Store.open(f"sqlite:///{file}") as store:
        await store.migrate()
        found = {ticket.id: ticket.state for ticket in await store.tickets()}
        assert found == {
            "done": "done",
            "failed": "failed",
            "cancelled": "cancelled",
            "ready": "ready",
            "blocked": "blocked",
            "waiting": "waiting",
            "half-way": "in_progress",
        }
        assert json.loads((await store.ticket("done")).outputs or "") == {"word": "hello"}
        assert [event.data.get("text") for event in await store.events("done") if event.kind == "output"] == ["hello"]
        await store.answer("waiting", approved=True, by="somebody")
        await store.shift_clock(3_600_000)  # whoever held the leases is gone
        await flows.run(store)
        states = {ticket.id: ticket.state for ticket in await store.tickets()}
        assert states | {"failed": "done", "cancelled": "done"} == dict.fromkeys(found, str(TicketState.DONE))
        assert await store.audit(lambda source: judge(source).violations) == []
        assert [row.workflow for row in await store.schedules()] == ["nightly"]
