"""Agents that mean harm to the engine, by what they print and leave."""

from __future__ import annotations

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
