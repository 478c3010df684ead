"""Power failures: processes use a database, and at some moment everything that they had not flushed is thrown away.

power.c, loaded into real processes by LD_PRELOAD, records every write and every flush, in order. They also record what
they are told. `after` makes from that the files as a disk may have them at a moment: flushed bytes are there; each
other write is there or isn't, by chance; and so is a new file's name, until its directory is flushed. More moments by
hand: `python -m tests.store.power 2000`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from swarm.admin.prove import judge
from swarm.base.log import configure
from swarm.ledger import Bill, Order, Spend
from swarm.model import ECHO_AGENT_ID, Claim, Event, Succeeded, Ticket
from swarm.store.store import Store
from tests.store.databases import LEASE, SqliteBackend, account_of

SOURCE: Final = Path(__file__).with_name("power.c")
ROOT: Final = Path(__file__).parents[2]
HEAD: Final = struct.Struct("=cB6xqq")
TOLD: Final = "told"
DATABASE: Final = "swarm.db"


# --- the processes ----------------------------------------------------------------------------------------------------


class _Process:
    """``count``: the tickets that each of the two writers adds."""

    def __init__(self, directory: Path, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.adding = True
        self.told = os.open(directory / TOLD, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(self, what: str, id_: str) -> None:
        os.write(self.told, f"{what} {id_}\n".encode())

    async def write(self, store: Store) -> None:
        await asyncio.gather(self.add(store), *(self.work(store, n) for n in range(3)))

    async def add(self, store: Store) -> None:
        for number in range(self.count):
            ticket = Ticket(id=f"{self.name}-{number}", title="t", state="ready", agent_id=ECHO_AGENT_ID, inputs="{}")
            self.tell("added", (await store.add_ticket(ticket)).id)
        self.adding = False

    async def work(self, store: Store, number: int) -> None:
        more = True
        while more:
            more = self.adding
            for claim in await store.claim(f"{self.name}-{number}", limit=2, lease_seconds=LEASE):
                more = True
                self.tell("claimed", claim.attempt_id)
                await self.spend(store, claim)
                event = Event(ticket_id=claim.ticket.id, attempt_id=claim.attempt_id, kind="output", data={"text": "x"})
                await store.append([event])
                await store.finish(claim.attempt_id, Succeeded(outputs='{"b": 2}'), timings={}, vm_time_ms=1)
                self.tell("done", claim.ticket.id)

    async def spend(self, store: Store, claim: Claim) -> None:
        account = account_of(claim)
        id_, some = f"call-{claim.attempt_id}", Spend(tokens=1, usd=1)
        await store.reserve(Order(id=id_, account=account, upstream="u", model="m", most=some, least=some))
        self.tell("reserved", id_)
        await store.book(
            Bill(
                id=id_,
                account=account,
                upstream="u",
                model="m",
                status=200,
                counts={"input": 1},
                cost_usd=0.5,
                latency_ms=1,
            )
        )
        self.tell("booked", id_)

    async def read(self, store: Store) -> None:
        """What a person sees of another process's work."""
        known: set[str] = set()
        while len(known) < 2 * self.count:
            for ticket in await store.tickets(states=["done"], limit=2 * self.count):
                if ticket.id not in known:
                    known.add(ticket.id)
                    self.tell("done", ticket.id)


async def _run(what: str, directory: str, name: str, count: str) -> None:
    configure()
    process = _Process(Path(directory), name, int(count))
    async with Store.open(f"sqlite:///{directory}/{DATABASE}") as store:
        await (process.read if what == "read" else process.write)(store)


# --- what the disk has ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    op: str
    name: str
    at: int
    data: bytes


@dataclass(slots=True)
class _File:
    flushed: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, Record]] = field(default_factory=list)  # with their numbers
    named: bool = False  # its name is on the disk

    def apply(self, record: Record) -> None:
        if record.op == "t":
            del self.flushed[record.at :]
        end = record.at + len(record.data)
        self.flushed.extend(bytes(max(0, end - len(self.flushed))))
        self.flushed[record.at : end] = record.data


def read_log(log: Path) -> list[Record]:
    """Up to the first file that was removed: that is the end, when the last process closes the database."""
    data, at, records = log.read_bytes(), 0, list[Record]()
    while at < len(data):
        op, name_bytes, offset, count = HEAD.unpack_from(data, at)
        at += HEAD.size + name_bytes
        records.append(Record(op.decode(), data[at - name_bytes : at].decode(), offset, data[at : at + count]))
        at += count
        if op == b"u":
            return records[:-1]
    return records


def after(records: Sequence[Record], before: Path, into: Path, chance: random.Random) -> Counter[tuple[str, str]]:
    """Make ``into`` what a disk may have after these records, and return what was told until then."""
    files = {DATABASE: _File(flushed=bytearray((before / DATABASE).read_bytes()), named=True)}
    told, begun = bytearray(), dict[int, int]()
    for number, record in enumerate(records):
        if record.name == TOLD:
            told += record.data
        elif record.op == "b":
            begun[record.at] = number
        elif record.op == "e":
            since = begun.pop(record.at)
            if not record.name:
                for file in files.values():
                    file.named = file.named or not file.pending or file.pending[0][0] < since
                continue
            file = files.setdefault(record.name, _File())
            while file.pending and file.pending[0][0] < since:
                file.apply(file.pending.pop(0)[1])
        else:
            files.setdefault(record.name, _File()).pending.append((number, record))
    kept = chance.choice((0.0, 0.5, 0.9))
    into.mkdir()
    for name, file in files.items():
        for _, record in file.pending:
            if chance.random() < kept:
                file.apply(record)
        if file.named or chance.random() < kept:
            (into / name).write_bytes(file.flushed)
    return Counter((line.split()[0], line.split()[1]) for line in told.decode().splitlines())


# --- the campaign -----------------------------------------------------------------------------------------------------

_THERE: Final = {
    "added": "SELECT id FROM tickets",
    "claimed": "SELECT id FROM attempts",
    "reserved": "SELECT id FROM model_calls",
    "booked": "SELECT id FROM model_calls WHERE status = 200",
    "done": "SELECT id FROM tickets WHERE state = 'done'",
}


def record(directory: Path, *, tickets: int) -> tuple[list[Record], Path]:
    """Two writers and a reader use a database. Returns what they did, and the directory before they began."""
    library = directory / "power.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)
    before, used = directory / "before", directory / "used"
    before.mkdir()
    url = SqliteBackend(before).new()
    Path(url.removeprefix("sqlite:///")).rename(before / DATABASE)
    used.mkdir()
    shutil.copy(before / DATABASE, used)
    log = directory / "log"
    env = {**os.environ, "LD_PRELOAD": str(library), "POWER_DIRECTORY": str(used), "POWER_LOG": str(log)}
    argv = [sys.executable, "-m", "tests.store.power", "--run"]
    running = [
        subprocess.Popen([*argv, what, used, name, str(tickets)], cwd=ROOT, env=env)
        for what, name in (("write", "one"), ("write", "two"), ("read", "three"))
    ]
    ends = [one.wait() for one in running]
    assert ends == [0, 0, 0], ends
    return read_log(log), before


def lost(records: Sequence[Record], before: Path, into: Path, chance: random.Random) -> tuple[int, list[str]]:
    """Cut the power after these records, start again, and compare. Returns how much was told, and what is wrong."""
    told = after(records, before, into, chance)
    wrong = []
    with contextlib.closing(sqlite3.connect(into / DATABASE)) as connection:
        for what, statement in _THERE.items():
            there = {id_ for (id_,) in connection.execute(statement)}
            wrong += [f"{what} {id_} was told, and is gone" for kind, id_ in told if kind == what and id_ not in there]
        [(integrity,)] = connection.execute("PRAGMA integrity_check").fetchall()
        wrong += [integrity] if integrity != "ok" else []

    async def prove() -> list[str]:
        async with Store.open(f"sqlite:///{into / DATABASE}") as store:
            return [f"prove: {one.id} {one.what}" for one in (await store.audit(judge)).violations]

    return len(told), wrong + asyncio.run(prove())


def cuts(directory: Path, *, count: int, tickets: int, seed: int) -> Iterator[tuple[int, int, list[str]]]:
    """For each moment: its number, how much had been told, and what is wrong."""
    records, before = record(directory, tickets=tickets)
    chance = random.Random(seed)
    told = [number for number, one in enumerate(records) if one.name == TOLD]
    for number in range(count):
        # Half of them directly after somebody was told something.
        moment = chance.choice(told) + 1 if number % 2 else chance.randrange(len(records))
        into = directory / "after"
        yield moment, *lost(records[:moment], before, into, chance)
        shutil.rmtree(into)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int, nargs="?", default=200)
    parser.add_argument("--tickets", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        asyncio.run(_run(*options.run))
        return
    broken = told = 0
    with tempfile.TemporaryDirectory() as name:
        for moment, number, wrong in cuts(Path(name), count=options.count, tickets=options.tickets, seed=options.seed):
            told, broken = told + number, broken + bool(wrong)
            if wrong:
                sys.stdout.write(f"moment {moment}: {wrong[:3]} and {len(wrong[3:])} more\n")
    sys.stdout.write(f"{options.count} power failures, {told} things told before them; {broken} broke a promise\n")


if __name__ == "__main__":
    main()
