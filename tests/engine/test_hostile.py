"""Agents that mean harm to the engine, by what they print and leave."""

from __future__ import annotations

import threading

import pytest

from swarm.engine.engine import SMALL_BYTES, off_loop
from tests.engine.conftest import Bench

WRITE = "import json, os, sys, time\ndef out(v): json.dump(v, open('output.json', 'w'))\n"


async def test_two_streams_in_turn_do_not_fill_the_database(plain: Bench) -> None:
    """A byte of the one, a byte of the other: each would be a row of its own."""
    code = WRITE + "for n in range(50_000):\n  os.write(1, b'o')\n  os.write(2, b'e')\nout(1)"
    assert (await plain.run(code)).state == "done"
    [(rows, o, e)] = plain.sql(
        "SELECT count(*), sum(length(data) - length(replace(data, 'o', ''))), "
        "sum(length(data) - length(replace(data, 'e', ''))) FROM events WHERE kind = 'output'"
    )
    assert (o, e) > (50_000, 50_000)
    assert int(str(rows)) < 1500


async def test_a_large_document_of_small_things(plain: Bench) -> None:
    """16 MB of it would be most of a gigabyte in the engine's memory."""
    ticket = await plain.run("open('output.json', 'w').write('[' + '{},' * 4_000_000 + '0]')")
    assert ticket.state == "failed"
    assert "output.json has more than 1,000,000 objects and lists" in (ticket.error or "")


async def test_what_is_printed_is_bounded_as_it_is_stored(plain: Bench) -> None:
    """As JSON, \\x01 takes six bytes, and a byte that isn't UTF-8 becomes three."""
    code = WRITE + "for n in range(1_000):\n  os.write(1, b'\\x01' * 8192)\n  os.write(2, b'\\xff' * 8192)\nout(1)"
    ticket = await plain.run(code)
    assert ticket.state == "done", ticket.error
    [(size,)] = plain.sql("SELECT sum(length(CAST(data AS BLOB))) FROM events WHERE kind = 'output'")
    assert 60 << 20 < int(str(size)) < 64 << 20
    [(last,)] = plain.sql("SELECT data FROM events WHERE kind = 'output' ORDER BY seq DESC LIMIT 1")
    assert "output truncated: stored, it takes more than 64 MiB" in str(last)


async def test_outputs_are_bounded_as_they_are_stored(plain: Bench) -> None:
    """5 bytes of the file become 19: 16 MB become 60."""
    ticket = await plain.run("open('output.json', 'w').write('[' + '1e15,' * 3_000_000 + '0]')")
    assert ticket.state == "failed"
    assert "bytes as it is stored; the limit is 16777216" in (ticket.error or "")


@pytest.mark.parametrize(("size", "on_loop"), [(SMALL_BYTES, True), (SMALL_BYTES + 1, False)])
async def test_large_values_are_read_outside_the_event_loop(size: int, on_loop: bool) -> None:
    assert (await off_loop(size, threading.get_ident) == threading.get_ident()) is on_loop


async def test_a_large_output_is_not_checked_for_ever(plain: Bench) -> None:
    schema = '{"type": "array", "items": {"type": "integer"}}'
    ticket = await plain.run("open('output.json', 'w').write('[' + '1,' * 400_000 + '0]')", outputs_schema=schema)
    assert ticket.state == "failed" and "took too many steps" in (ticket.error or "")
