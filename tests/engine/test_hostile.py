"""Agents that mean harm to the engine, by what they print and leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from swarm.base import process
from swarm.engine.run_once import run_ticket
from swarm.engine.values import Values
from swarm.model import ECHO_AGENT_ID, Agent, RetryPolicy
from swarm.store.tickets import validation
from swarm.store.tickets.validation import BadRow
from tests.engine.conftest import Bench, ended, serving

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
    [(most,)] = plain.sql(  # in one transaction: others wait for its end
        "SELECT max(size) FROM (SELECT sum(length(CAST(data AS BLOB))) AS size FROM events GROUP BY at)"
    )
    assert int(str(most)) < 3 << 20
    [(last,)] = plain.sql("SELECT data FROM events WHERE kind = 'output' ORDER BY seq DESC LIMIT 1")
    assert "output truncated: stored, it takes more than 64 MiB" in str(last)


async def test_outputs_are_bounded_as_they_are_stored(plain: Bench) -> None:
    """5 bytes of the file become 19: 16 MB become 60."""
    ticket = await plain.run("open('output.json', 'w').write('[' + '1e15,' * 3_000_000 + '0]')")
    assert ticket.state == "failed"
    assert "bytes as it is stored; the limit is 16777216" in (ticket.error or "")


async def test_a_large_output_is_not_checked_for_ever(plain: Bench) -> None:
    schema = '{"type": "array", "items": {"type": "integer"}}'
    ticket = await plain.run("open('output.json', 'w').write('[' + '1,' * 400_000 + '0]')", outputs_schema=schema)
    assert ticket.state == "failed" and "took too many steps" in (ticket.error or "")


def confined(module: str) -> list[int]:
    """The processes of this engine that read large values."""
    found = []
    for entry in Path(f"/proc/{os.getpid()}/task").iterdir():
        for pid in (entry / "children").read_text().split():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if module.encode() in words:
                    found.append(int(pid))
    return found


LARGE = 100_000
DONE = WRITE + "out(1)"
LEAVE = WRITE + f"out({{'x': [[]] * {LARGE}}})"
ANY_SCHEMA = json.dumps({"type": "object"})


# Name of the case → the agent, columns of its ticket, fields of the agent, and the ticket's error.
CASES: dict[str, tuple[str, dict[str, object], dict[str, object], str]] = {
    "inputs": (DONE, {"inputs": json.dumps({"x": [[]] * LARGE})}, {}, ""),
    "inputs with a schema": (DONE, {"inputs": json.dumps({"x": [[]] * LARGE})}, {"inputs_schema": ANY_SCHEMA}, ""),
    "deep inputs": (DONE, {"inputs": "[" * LARGE}, {}, "inputs is nested too deeply"),
    "broken inputs": (DONE, {"inputs": "[0," * LARGE}, {}, "inputs is n"),
    "no object": (DONE, {"inputs": json.dumps([0] * LARGE)}, {}, "inputs is a list; it must be a JSON object"),
    "small things": (
        DONE,
        {"inputs": '{"x":[' + "[]," * 1_000_001 + "0]}"},
        {},
        "inputs has more than 1,000,000 objec",
    ),
    "a description": (DONE, {"description": "d" * LARGE}, {}, ""),
    "outputs": (LEAVE, {}, {}, ""),
    "outputs with a schema": (LEAVE, {}, {"outputs_schema": ANY_SCHEMA}, ""),
    "deep outputs": (
        WRITE + f"open('output.json', 'w').write('[' * {LARGE})",
        {},
        {},
        "output.json is nested too deep",
    ),
}


@pytest.mark.parametrize("case", CASES)
async def test_large_values_are_read_in_a_confined_process(plain: Bench, case: str) -> None:
    """In a thread of the engine, they would hold up all other tickets."""
    code, columns, fields, error = CASES[case]
    agent = await plain.agent(code, **fields)  # type: ignore[arg-type]
    plain.insert("small", agent.id if agent.outputs_schema is None and code == DONE else ECHO_AGENT_ID)
    assert (await run_ticket(plain.store, plain.worker, "small")).state == "done"
    assert not confined("swarm.engine.values")
    plain.insert("t", agent.id, **columns)
    ticket = await run_ticket(plain.store, plain.worker, "t")
    assert len(confined("swarm.engine.values")) == 1
    assert (ticket.state, (ticket.error or "")[: len(error)]) == ("failed" if error else "done", error)
    [attempt] = await plain.attempts()  # for bad inputs too: claims don't read large ones
    assert attempt.reason in ((None,) if not error else ("input_invalid", "output_invalid"))


BROKEN = {
    "broken": '{"x": [' + "0," * 600_000,
    "no-object": json.dumps([0] * 600_000),
    "deep": "[" * 1_200_000,
    "small-things": '{"x":[' + "[]," * 1_000_001 + "0]}",
}


async def test_an_engine_finds_large_broken_inputs_before_it_takes_the_ticket(plain: Bench) -> None:
    """As it does with small ones. What is right is read once."""
    agent = await plain.agent(WRITE + "out(len(json.load(open('input.json'))['inputs']['x']))")
    async with Values() as values, serving(plain, inputs_fault=values.fault):
        for name, inputs in BROKEN.items():
            plain.insert(name, agent.id, inputs=inputs)
        plain.insert("large", agent.id, inputs=json.dumps({"x": [[]] * 500_000}))
        plain.insert("blank", ECHO_AGENT_ID, inputs=" " * 1_500_000)
        plain.insert("small", agent.id, inputs='{"x": [1]}')
        good = ("small", "large", "blank")
        assert await ended(plain, *good, *BROKEN) == [*["done"] * len(good), *["failed"] * len(BROKEN)]
        assert len(values.pids) == 1
    assert (await plain.store.ticket("large")).outputs == "500000"
    assert plain.sql("SELECT count(*) FROM attempts") == [(3,)]
    for name, inputs in BROKEN.items():
        with pytest.raises(BadRow) as error:
            validation.parsed_inputs(inputs)
        assert (await plain.store.ticket(name)).error == str(error.value)


async def test_what_a_look_has_read_is_for_the_same_inputs_only(plain: Bench) -> None:
    agent = await plain.agent(DONE)
    texts = [json.dumps({"x": [number] * 600_000}) for number in range(3)]
    plain.insert("t", agent.id)
    [claim] = await plain.worker.claim(ticket_id="t")
    async with Values() as values:
        for looked_at, given in ((0, 0), (0, 1), (2, 2), (2, 2)):
            assert await values.fault(texts[looked_at]) is None
            for _ in range(2):
                document, _ = await values.input_json(replace(claim, inputs=texts[given]))
                assert json.loads(document)["inputs"] == json.loads(texts[given])
            assert "is not valid JSON" in str(await values.fault(texts[given][:-2]))


async def test_large_values_are_in_the_tickets_row_only(plain: Bench) -> None:
    """Every change of a row writes all of it again, and meanwhile nobody else writes."""
    code = WRITE + "given = json.load(open('input.json'))\nout(given['inputs'])\n"
    agent = await plain.agent(code + "sys.exit(given['step']['attempt'] == 1)", retry=RetryPolicy(max_attempts=2))
    plain.insert("t", agent.id, inputs=json.dumps({"x": [[]] * LARGE}))
    ticket = await run_ticket(plain.store, plain.worker, "t")
    assert (ticket.state, json.loads(ticket.outputs or "0")) == ("done", {"x": [[]] * LARGE}), ticket.error
    assert plain.sql("SELECT inputs, outputs FROM step_executions") == [(None, None)]
    assert len(await plain.attempts()) == 2, "the second one has them too"


async def test_a_value_that_kills_its_reader_fails_its_own_ticket_only(plain: Bench) -> None:
    """Here somebody else kills it, in the middle."""
    agent = Agent(id="a", name="a", version="1.0.0", path=plain.dir, entry=("main.py",))
    large = json.dumps([[]] * LARGE).encode()
    async with Values() as values:
        assert await values.outputs(agent, b"[ 1 ]", {}, 1 << 20) == "[1]"
        assert values.pids == [], "small ones are read here"
        assert len(await values.outputs(agent, large, {}, 1 << 20)) == LARGE * 3 + 1
        [first] = values.pids
        os.kill(first, signal.SIGSTOP)
        reading = asyncio.create_task(values.outputs(agent, large, {}, 1 << 20))
        huge = asyncio.create_task(values.outputs(agent, b"[" + b"1," * (1 << 20) + b"1]", {}, 1 << 30))
        assert len(await huge) == (2 << 20) + 3, "a larger one has a process of its own"
        assert not reading.done()
        os.kill(first, signal.SIGKILL)
        assert len(await reading) == LARGE * 3 + 1, "an idle one that was killed is replaced"
        assert len(values.pids) == 2 and first not in values.pids
        pids = values.pids
    assert not any(process.start_time(pid) for pid in pids), "they end with the engine"


async def test_secrets_in_large_outputs_are_masked(plain: Bench) -> None:
    agent = Agent(id="a", name="a", version="1.0.0", path=plain.dir, entry=("main.py",))
    async with Values() as values:
        made = json.dumps({"x": ["y"] * LARGE, "s-3-cret": "is s-3-cret"}).encode()
        text = await values.outputs(agent, made, {"name": "s-3-cret"}, 1 << 20)
        assert values.pids and text.endswith('"[name]":"is [name]"}')
