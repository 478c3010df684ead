"""Two attempts side by side."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

import pytest

from swarm.base import trees
from swarm.base.trees import Entry
from swarm.errors import NotFound, UsageError
from swarm.model import Claim, Event, Failed, FailureReason, Succeeded
from swarm.store import kept_vms
from swarm.store.comparison import changes, compare, files_below
from swarm.store.store import Store
from tests.store.databases import Outside, insert
from tests.store.flows import claims, ticket


async def left(store: Store, claim: Claim, files: Mapping[str, bytes | tuple[int, bytes]], **printed: str) -> None:
    """What an engine records of an attempt: its files, output, connections and model calls."""
    given = {name: one if isinstance(one, tuple) else (0o644, one) for name, one in files.items()}
    packed = [(Entry(name, stat.S_IFREG | mode, len(data)), [data]) for name, (mode, data) in sorted(given.items())]
    parts = list(trees.pack(packed))
    await store.keep_artifacts(claim.ticket.id, dict(parts))
    about = {
        "trees": {"out/": parts[-1][0]},
        "files": len(files),
        "left_out": [],
        "left_out_files": 0,
        "complete": True,
    }

    def event(kind: str, data: Mapping[str, object]) -> Event:
        return Event(
            ticket_id=claim.ticket.id, step_id=claim.step_id, attempt_id=claim.attempt_id, kind=kind, data=data
        )

    said = [event("output", {"stream": stream, "text": text}) for stream, text in printed.items()]
    await store.append([event("files", about), *said, event("egress", {"host": "example.org", "port": 443})])


async def test_a_race(store: Store, outside: Outside) -> None:
    await ticket(store, outside, "steps: [{id: try, agent: echo, for_each: [1, 2]}]")
    one, other = await claims(store)
    same = b"0" * 300_000
    await left(store, one, {"a.txt": b"one\ntwo\n", "b.bin": b"\0\1", "gone": b"x\n", "same": same}, stdout="é\n")
    await left(store, other, {"a.txt": b"one\n2\n", "b.bin": b"\0\2", "new": b"y\n", "same": same, "z": (0o755, b"")})
    outcome = Failed(reason=FailureReason.AGENT_FAILED, message="broke", exit_code=3)
    await store.finish(one.attempt_id, outcome, timings={}, vm_time_ms=1.0)
    await store.finish(other.attempt_id, Succeeded(outputs='{"n": 2}'), timings={}, vm_time_ms=1.0)
    found = await compare(store, "t:try[0]", "t:try[1]:1")
    assert (found.a.step_id, found.a.attempt.outcome, found.a.attempt.exit_code) == ("try[0]", "failed", 3)
    assert (found.a.printed_bytes, found.b.printed_bytes) == (3, 0)
    assert found.a.connections == {"example.org:443": 1} and found.b.duration_ms is not None
    assert {one.name: one.change for one in found.files} == {
        "a.txt": "changed", "b.bin": "changed", "gone": "removed", "new": "added", "z": "added",
    }  # fmt: skip
    texts = {one.name: one.diff for one in found.files}
    assert texts["a.txt"] == "--- a/a.txt\n+++ b/a.txt\n@@ -1,2 +1,2 @@\n one\n-two\n+2\n" and texts["b.bin"] is None
    assert found.outputs.endswith('+{\n+  "n": 2\n+}\n')
    again = await compare(store, "t:try[1]", "t:try[1]")
    assert (again.files, again.outputs, again.commands) == ([], "", "")
    assert again.a.commands is None, "it printed none"


async def test_commands_are_found_in_what_agents_print(store: Store, outside: Outside) -> None:
    """In pieces of any size, from two streams at once."""
    await ticket(store, outside, "steps: [{id: try, agent: echo, for_each: [1, 2]}]")
    one, other = await claims(store)
    await left(store, one, {}, stdout="$ ma", stderr="$ git status\nnothing $ here\n$ ")
    await left(store, one, {}, stdout="ke " + "x" * 600, stderr="tail\r\n", swarm="$ not an agent's\n")
    await left(store, one, {}, stdout="x" * 600 + "\n$ last")
    await left(store, other, {}, stdout="$ git status\n$ last\n")
    found = await compare(store, "t:try[0]", "t:try[1]")
    assert found.a.commands == ("git status", "tail", "make " + "x" * 495, "last")
    assert found.b.commands == ("git status", "last")
    assert found.commands.endswith(
        "+++ b/commands\n@@ -1,4 +1,2 @@\n git status\n-tail\n-make " + "x" * 495 + "\n last\n"
    )


async def test_attempts_of_a_ticket_and_ids_with_colons(store: Store, outside: Outside) -> None:
    insert(outside, "my:ticket:2", agent_id="retry")
    for code in (1, 2):
        [claim] = await claims(store)
        outcome = Failed(reason=FailureReason.AGENT_FAILED, message="broke", exit_code=code)
        await store.finish(claim.attempt_id, outcome, timings={}, vm_time_ms=1.0)
        await store.shift_clock(60_000)
    found = await compare(store, "my:ticket:2:1", "my:ticket:2")
    assert (found.a.attempt.exit_code, found.b.attempt.exit_code, found.b.number) == (1, 2, 2)
    assert (await compare(store, "my:ticket:2:main:1", "my:ticket:2:2")).a.number == 1


async def test_an_attempt_that_never_was_had_no_vm_to_keep(store: Store, outside: Outside) -> None:
    await ticket(store, outside, "steps: [{id: a, agent: echo}]")
    with pytest.raises(NotFound, match="t:1: there is no attempt yet"):
        await kept_vms.find(store, "t:1")
    [claim] = await claims(store)
    kept = Event(ticket_id="t", step_id=claim.step_id, attempt_id=claim.attempt_id, kind="vm_kept", data={})
    await store.append([kept])
    for ref, why in (
        ("t:9", "t:9: there are the attempts 1 to 1"), ("t:a:0", "the attempts 1 to 1"), ("t:a:1", "and is gone"),
        ("t", "and is gone"),
    ):  # fmt: skip
        with pytest.raises(NotFound, match=why):
            await kept_vms.find(store, ref)


async def test_what_is_not_there(store: Store, outside: Outside) -> None:
    await ticket(store, outside, "steps: [{id: a, agent: echo}, {id: b, agent: echo}]")
    with pytest.raises(NotFound, match="the ticket t has no attempt yet"):
        await compare(store, "t", "t")
    await claims(store)
    for ref, why in (
        ("t", "which step"), ("t:c", r"no attempt of a step 'c'; it ran [ab], [ab]"), ("t:a:2", "the attempts 1 to 1"),
        ("nobody:a", "write TICKET, TICKET:STEP"), ("t:a:b:1", "write TICKET"), ("t:a:0", "the attempts 1 to 1"),
    ):  # fmt: skip
        with pytest.raises((NotFound, UsageError), match=why):
            await compare(store, ref, "t:a")


async def test_directories_of_two_vms(tmp_path: Path) -> None:
    for side, text in (("a", "one\n"), ("b", "two\n")):
        (tmp_path / side / "sub").mkdir(parents=True)
        (tmp_path / side / "sub" / "same").write_text("x")
        (tmp_path / side / "log").write_text(text)
        (tmp_path / side / "link").symlink_to("sub" if side == "a" else "nowhere")
    (tmp_path / "b" / "sub" / "run").write_text("")
    (tmp_path / "b" / "sub" / "same").chmod(0o755)
    found = await changes(files_below(tmp_path / "a"), files_below(tmp_path / "b"))
    assert [(one.name, one.change) for one in found] == [
        ("link", "changed"), ("log", "changed"), ("sub/run", "added"), ("sub/same", "changed"),
    ]  # fmt: skip
    assert found[1].diff == "--- a/log\n+++ b/log\n@@ -1 +1 @@\n-one\n+two\n" and found[3].mode[1] == "-rwxr-xr-x"
