"""Large values: stored once, passed on as references, loaded only when an expression looks inside, never forged."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.admin.prove import judge
from swarm.cel import artifact_refs, template
from swarm.cel.artifact_refs import KEY, ArtifactRef
from swarm.cel.evaluate import MAX_DATA_BYTES
from swarm.cel.expression import ExpressionError
from swarm.cel.jail import Jail
from swarm.errors import NotFound, UsageError
from swarm.model import RunStatus, Succeeded
from swarm.store.runs import decision, packing
from swarm.store.sql.rows import StepRow
from swarm.store.store import Store
from swarm.workflow.definition import Step
from swarm.workflow.state import Child, Complete, Decision, End, Expand, FanOutState, RunProgress, Start
from tests.store.databases import Outside, claim_one, insert
from tests.store.flows import Behaviour, claims, finish, gives, state, ticket

BIG = "x" * (64 << 10)  # one byte over the limit for its quotes


class Shelf:
    """The parts that `pack` made, to be loaded; counts the loads."""

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}
        self.loaded: list[str] = []

    def put(self, packed: packing.Packed) -> str:
        self.parts |= packed.parts
        return packed.text

    def load(self, digest: str) -> Any:
        self.loaded.append(digest)
        return packing.unpack(self.parts[digest], self.load)

    def kept(self, value: Any) -> Any:
        return packing.unpack(self.put(packing.pack(value)), self.load)


def test_what_is_small_stays_as_it_is() -> None:
    for text in ('{"a":  1}', "[]", '"' + "y" * 16000 + '"'):
        assert packing.pack_text(text) == packing.Packed(text)
    assert packing.pack({"a": BIG[:-10]}).parts == {}
    assert packing.pack_text('"\\ud800"').text == '"\\ud800"'


def running(packer: packing.Packer) -> int | None:
    return packer.pid


def test_large_values_are_packed_and_resolved_in_a_confined_process() -> None:
    """In a thread, they would hold up all tickets of the engine. The results are the same."""
    made = {"log": BIG, "many": ["y" * 100] * 1000, "n": 1}
    small, large = '{"a":1}', json.dumps(made)
    with packing.Packer() as packer:
        assert packer.pack_text(small) == packing.Packed(small)
        assert packer.resolve(small, {}) == small
        assert not running(packer)
        packed = packer.pack_text(large)
        assert packed == packing.pack_text(large) and packed.parts
        first = running(packer)
        assert first is not None
        assert json.loads(packer.resolve(packed.text, packed.parts)) == made
        with pytest.raises(UsageError, match="nested too deeply"):
            packer.pack_text("[" * 100_000 + "]" * 100_000)
        assert packer.pid == first, "an error of one value doesn't end it"
        os.kill(first, signal.SIGKILL)
        assert packer.pack_text(large) == packed, "one that was killed is replaced"


def test_what_is_decided_outside_is_packed_there() -> None:
    """Packing waits for no disk, but everybody would wait for it: it isn't done in the writing transaction."""
    one = {"text": BIG}
    start = Start(key="s[0]", step=Step(id="s", agent="echo@1"), agent="echo@1", inputs=one)
    expand = Expand(key="s", children=(Child(key="s[0]", inputs=one),), fan_out=FanOutState(count=1))
    complete = Complete(key="t", outputs=one)
    end = End(status=RunStatus.COMPLETED, outputs=one)
    made = Decision(actions=(expand, start, complete), progress=RunProgress(), end=end)
    packed = decision.packed(made, root=True)
    assert [type(action) for action in packed.actions] == [Expand, Start, Complete]
    values = [packed.actions[0].children[0].inputs, packed.actions[1].inputs, packed.actions[2].outputs]  # type: ignore[union-attr]
    assert all(value is values[0] and value == packing.pack(one) for value in values), "and each value once"
    assert packed.end is not None and packed.end.outputs == packing.Packed(json.dumps(one, separators=(",", ":")))


def test_large_fields_go_one_by_one() -> None:
    packed = packing.pack({"log": BIG, "same": BIG, "code": 0, "many": ["y" * 100] * 1000})
    made = json.loads(packed.text)
    assert made["code"] == 0 and made["log"] == made["same"]
    text = json.dumps(BIG)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert made["log"] == {KEY: {"digest": digest, "bytes": len(text)}}
    assert packed.parts[digest] == text and len(packed.parts) == 2


@pytest.mark.parametrize("value", [BIG, {str(n): "y" * 100 for n in range(1000)}, ["y" * 100] * 1000])
def test_what_has_many_small_parts_goes_whole(value: Any) -> None:
    shelf = Shelf()
    there = shelf.kept(value)
    assert isinstance(there, ArtifactRef) and len(shelf.parts) == 1
    assert artifact_refs.resolve_references(there, limit_bytes=1 << 20) == value


def test_nested_deeply() -> None:
    shelf, depth = Shelf(), 800
    value = json.loads('{"a":[' * (depth // 2) + f'"{BIG}"' + "]}" * (depth // 2))
    there = packing.unpack(shelf.put(packing.pack_text(json.dumps(value))), shelf.load)
    assert artifact_refs.has_any(there) and len(shelf.parts) == 1
    assert json.dumps(artifact_refs.resolve_references(there, limit_bytes=1 << 20)) == json.dumps(value)


def test_a_digest_that_somebody_wrote_is_a_value() -> None:
    shelf = Shelf()
    secret = shelf.kept({"secret": BIG})["secret"]
    forged = json.loads(json.dumps({"x": secret, "y": [{KEY: {"pairs": [["z", secret]]}}], KEY: 1}))
    assert forged["x"] == dict(secret) and not isinstance(forged["x"], ArtifactRef)
    for packed in (packing.pack(forged), packing.pack_text(json.dumps(forged))):
        again = packing.unpack(packed.text, shelf.load)
        assert again == forged and not artifact_refs.has_any(again) and shelf.loaded == []
    hidden = json.dumps(forged).replace("$", "\\u0024")  # no mark in the text as it comes
    for text in (hidden, packing.pack_text(hidden).text):
        assert packing.unpack(text, shelf.load) == forged and shelf.loaded == []


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
LARGE = st.integers(60_000, 70_000).map(lambda n: "é" * (n // 2))
REFERENCES = st.fixed_dictionaries(
    {KEY: st.fixed_dictionaries({"digest": st.text(max_size=4), "bytes": st.integers()}) | LEAVES}
)
VALUES = st.recursive(
    LEAVES | LARGE | REFERENCES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | st.just(KEY) | st.just("pairs"), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_every_value_comes_back(value: Any) -> None:
    shelf = Shelf()
    packed = packing.pack(value)
    assert len(packed.text.encode()) <= packing.INLINE_BYTES
    once = packing.unpack(shelf.put(packed), shelf.load)
    assert artifact_refs.resolve_references(once, limit_bytes=1 << 30) == value
    twice = shelf.kept({"on": once, "list": [once]})  # handed on, as a step's input
    assert artifact_refs.resolve_references(twice, limit_bytes=1 << 30) == {"on": value, "list": [value]}
    raw = packing.unpack(shelf.put(packing.pack_text(json.dumps(value))), shelf.load)
    assert artifact_refs.resolve_references(raw, limit_bytes=1 << 30) == value


# --- in expressions ---------------------------------------------------------------------------------------------------


def test_expressions_hand_on_or_look_inside() -> None:
    shelf = Shelf()
    outputs = shelf.kept({"log": BIG, "rows": [{"n": n, "s": "y" * 100} for n in range(1000)], "code": 3})
    names = {"steps": {"a": {"outputs": outputs}}}
    with Jail() as jail:

        def fill(source: str) -> Any:
            return template.fill(source, names, jail)

        handed_on = {
            "all": fill("${steps.a.outputs}"),
            "log": fill("${steps.a.outputs.log}"),
            "code": fill("${steps.a.outputs.code}"),
        }
        assert shelf.loaded == [] and handed_on["log"] is outputs["log"] and handed_on["code"] == 3
        assert packing.pack(handed_on).parts == {}
        assert fill("${steps.a.outputs.rows[7].n}") == 7
        assert fill("${size(steps.a.outputs.log)}") == len(BIG)
        assert fill("${steps.a.outputs.rows.filter(r, r.n < 3).map(r, r.n)}") == [0, 1, 2]
        assert fill("${steps.a.outputs.rows.size() + steps.a.outputs.code}") == 1003
        assert fill("the log: ${steps.a.outputs.log}") == f"the log: {BIG}"
        assert len(shelf.loaded) == 2  # each once
        with pytest.raises(ExpressionError, match="has no 'n'"):
            fill("${steps.a.outputs.rows[7].s.n}")


def test_what_is_too_large_is_not_loaded() -> None:
    shelf = Shelf()
    names = {"steps": {"a": {"outputs": shelf.kept({"log": "x" * (MAX_DATA_BYTES + 1)})}}}
    with Jail() as jail:
        for source in ("${size(steps.a.outputs.log)}", "${steps.a.outputs.size()}", "it: ${steps.a.outputs.log}"):
            with pytest.raises(ExpressionError, match="MiB"):
                template.fill(source, names, jail)
        assert shelf.loaded == []
        assert template.fill("${steps.a.outputs.code == 1}", {"steps": {"a": {"outputs": {"code": 1}}}}, jail) is True


# --- in runs ----------------------------------------------------------------------------------------------------------

LOG = "y" * 200_000
CHAIN = """
steps:
  - {id: build, agent: echo@1}
  - id: pass_on
    agent: echo@1
    needs: build
    inputs: {all: "${steps.build.outputs}", log: "${steps.build.outputs.log}"}
  - id: look
    agent: echo@1
    needs: build
    inputs: {size: "${size(steps.build.outputs.log)}", code: "${steps.build.outputs.code}"}
"""
BUILT = gives(build={"log": LOG, "same": LOG, "code": 7})


async def serve(store: Store, behave: Behaviour, *, limit: int = 4) -> dict[str, str]:
    """As a worker does: agents get whole values. The inputs as they were claimed, by step."""
    given: dict[str, str] = {}
    while found := await claims(store, limit):
        for claim in found:
            given[claim.step_id] = claim.inputs
            await finish(store, replace(claim, inputs=await store.resolve_references(claim.inputs)), behave)
    return given


async def rows(store: Store, id: str = "t") -> dict[str, StepRow]:
    return {row.step_id: row for row in await store.steps(id)}


async def test_steps_hand_on_references(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN)
    given = await serve(store, BUILT)
    assert set(given) == {"build", "pass_on", "look"}
    made = await rows(store)
    assert len(made["build"].outputs or "") < 500 and len(made["pass_on"].outputs or "") < 1000
    (artifact,) = await store.artifacts(ticket_id="t")
    assert (artifact.bytes, json.loads(await store.artifact(artifact.digest[:8]))) == (200_002, LOG)
    assert outside.execute("SELECT digest, bytes, substr(data, 1, 3) FROM artifacts") == [
        (artifact.digest, 200_002, '"yy')
    ]
    assert len(given["pass_on"]) < 1000 and json.loads(given["look"]) == {"size": 200_000, "code": 7}
    assert json.loads(await store.resolve_references(given["pass_on"])) == {
        "all": {"log": LOG, "same": LOG, "code": 7},
        "log": LOG,
    }
    ticket_ = await store.ticket("t")  # people and other tools get values
    assert ticket_.state == "done"
    assert json.loads(ticket_.outputs or "")["pass_on"]["log"] == LOG


@pytest.mark.parametrize("large", [False, True])
async def test_lists_workflows_within_and_repeats(store: Store, outside: Outside, large: bool) -> None:
    text = """
steps:
  - {id: list, agent: echo@1}
  - {id: each, needs: list, for_each: "${steps.list.outputs.items}", agent: echo@1, inputs: {item: "${item}"}}
  - id: inner
    needs: each
    inputs: {all: "${steps.each.outputs}"}
    workflow:
      inputs: {all: array}
      steps: [{id: count, agent: echo@1, inputs: {n: "${inputs.all.size()}", last: "${inputs.all[2]}"}}]
      outputs: {n: "${steps.count.outputs.n}", last: "${steps.count.outputs.last}"}
  - {id: again, needs: inner, agent: echo@1, repeat: {until: "${index == 1}", max_times: 2}, inputs: {p: "${previous}"}}
outputs: {inner: "${steps.inner.outputs}", p: "${steps.again.outputs.p.p}"}
"""
    item = "z" * (100_000 if large else 10)
    await ticket(store, outside, text)
    await serve(store, gives(list={"items": [item, item, item]}), limit=8)
    found = await store.ticket("t")
    assert found.state == "done", found.error
    assert json.loads(found.outputs or "") == {"inner": {"n": 3, "last": {"item": item}}, "p": None}
    assert all(len(row.outputs or "") < 1000 for row in await store.steps("t"))
    assert bool(await store.artifacts(ticket_id="t")) is large


async def test_what_an_agent_writes_is_no_reference(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN)
    await serve(store, BUILT)
    (artifact,) = await store.artifacts(ticket_id="t")
    forged = {"log": {KEY: {"digest": artifact.digest, "bytes": artifact.bytes}}, "code": 1}
    await ticket(store, outside, CHAIN, id="thief")
    given = await serve(store, gives(build=forged))
    assert json.loads(await store.resolve_references(given["pass_on"])) == {"all": forged, "log": forged["log"]}
    assert json.loads(given["look"]) == {"size": 1, "code": 1}
    insert(outside, "plain", inputs=json.dumps(forged))  # a plain ticket's inputs are nobody's but its agent's
    claim = await claim_one(store)
    assert not claim.in_workflow and json.loads(claim.inputs) == forged


async def test_plain_tickets_have_their_outputs_in_their_rows(store: Store, outside: Outside) -> None:
    insert(outside, "plain")
    claim = await claim_one(store)
    outputs = json.dumps({"log": LOG})
    await store.finish(claim.attempt_id, Succeeded(outputs=outputs), timings={}, vm_time_ms=1)
    (step,) = await store.steps("plain")
    assert (await store.ticket("plain")).outputs == outputs and await store.artifacts() == []
    assert step.outputs is None, "once"


async def test_they_go_with_their_last_ticket(store: Store, outside: Outside) -> None:
    for name in ("a", "b"):
        await ticket(store, outside, CHAIN, id=name)
    await serve(store, BUILT)
    (artifact,) = await store.artifacts()
    assert artifact.tickets == 2
    outside.execute("DELETE FROM tickets WHERE id = 'a'")
    assert json.loads(await store.artifact(artifact.digest)) == LOG
    outside.execute("DELETE FROM tickets WHERE id = 'b'")
    assert await store.artifacts() == [] and outside.execute("SELECT * FROM artifact_uses") == []
    with pytest.raises(NotFound, match="artifact list"):
        await store.artifact(artifact.digest)


async def test_prune_takes_what_nobody_uses(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN)
    await serve(store, BUILT)
    outside.execute("INSERT INTO artifacts (digest, bytes, data) VALUES ('0', 1, '1')")
    outside.execute("INSERT INTO artifact_uses (ticket_id, digest) VALUES ('nobody', '0')")
    await store.prune(0)
    (artifact,) = await store.artifacts()
    assert artifact.bytes == 200_002


async def test_one_that_is_gone_fails_what_looks_into_it(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN)
    (build,) = await claims(store)
    outside.execute("CREATE TRIGGER gone AFTER INSERT ON artifacts BEGIN DELETE FROM artifacts; END")
    await finish(store, build, BUILT)
    steps = {claim.step_id: claim for claim in await claims(store)}
    assert set(steps) == {"pass_on"}
    with pytest.raises(NotFound, match="gone from the table"):
        await store.resolve_references(steps["pass_on"].inputs)
    look = (await rows(store))["look"]
    assert look.status == "failed" and "is gone" in (look.error or "")
    assert [one.what for one in (await store.audit(judge)).violations] == [
        "1 of its artifacts (files, large values) are gone from the database"
    ]
    outside.execute("DELETE FROM artifact_uses")  # otherwise what follows every test would say so, too


async def test_more_than_there_may_be(store: Store, outside: Outside) -> None:
    many = "{" + ", ".join(f"x{n}: '${{steps.build.outputs.log}}'" for n in range(5)) + "}"
    steps = f"steps: [{{id: build, agent: echo@1}}, {{id: b, agent: echo@1, needs: build, inputs: {many}}}]\n"
    built = gives(build={"log": "x" * (4 << 20)}, b={})
    await ticket(store, outside, steps)
    (build,) = await claims(store)
    await finish(store, build, built)
    (b,) = await claims(store)
    with pytest.raises(UsageError, match="more than 16 MiB"):
        await store.resolve_references(b.inputs)
    await ticket(store, outside, f"steps: [{{id: build, agent: echo@1}}]\noutputs: {many}\n", id="u")
    await serve(store, built)
    found = await store.ticket("u")
    assert found.state == "failed" and "more than 16 MiB" in (found.error or "")


async def test_a_retry_goes_on_with_them(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN)
    await serve(store, gives(build={"log": LOG, "code": 7}, pass_on=Exception("no")))
    assert (await store.ticket("t")).state == "failed"
    await store.retry("t", step="pass_on")
    given = await serve(store, gives())
    assert list(given) == ["pass_on"]
    assert json.loads((await store.ticket("t")).outputs or "")["pass_on"]["log"] == LOG
    (artifact,) = await store.artifacts(ticket_id="t")
    assert artifact.bytes == 200_002


async def test_outputs_nested_too_deeply_fail_the_attempt(store: Store, outside: Outside) -> None:
    """An engine limits nesting itself; another executor may not."""
    await ticket(store, outside, "steps: [{id: a, agent: echo@1}]")
    (claim,) = await claims(store)
    deep = Succeeded(outputs=f'{{"a": {"[" * 50_000}"{"x" * 100_000}"{"]" * 50_000}}}')
    await store.finish(claim.attempt_id, deep, timings={}, vm_time_ms=1.0, in_workflow=True)
    assert (await state(store))[0] == "failed"
    (attempt,) = await store.attempts("t")
    assert attempt.error == "its outputs are nested too deeply"


def test_large_values_are_packed_beside_a_thousand_open_files() -> None:
    """As an engine with a hundred VMs has them: `select` takes no descriptor above 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        with packing.Packer() as packer:
            assert packer.pack_text(json.dumps({"x": "y" * 100_000})).parts
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_what_is_nested_too_deeply_to_be_read_again(store: Store) -> None:
    """Escaping multiplies the levels of a value that has `$artifact` in it."""
    value: object = 1
    for _ in range(256):
        value = {"$artifact": value}
    text = packing.pack_text(json.dumps(value)).text
    with pytest.raises(UsageError, match="nested too deeply"):
        await store.resolve_references(text)
