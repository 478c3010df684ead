"""The agent claude-code: Claude Code itself on this host, before a scripted model, with every fault that we know of.

In a VM, through the gateway, a test of the gateway runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from swarm.agents import check
from tests.agents import claude_code_here
from tests.agents.claude_code_here import CODE
from tests.agents.scripted_api import INPUT_TOKENS, OUTPUT_TOKENS, Answer, ScriptedApi
from tests.conftest import PATIENCE_SECONDS, need

pytestmark = pytest.mark.slow  # starts programs

DONE: Answer = {"text": "All done."}


def bash(command: str) -> Answer:
    return {"text": "Next.", "calls": [{"name": "Bash", "input": {"command": command}}]}


EDIT = bash("echo two >> a.txt")  # the work that no fault may cost


@dataclass
class Ran:
    api: ScriptedApi
    code: int
    printed: str
    said: str
    outputs: dict[str, Any]
    work: Path

    @property
    def patched(self) -> str:
        """a.txt in a new repository with the same files, after the patch."""
        place = self.work.with_name("patched")
        place.mkdir()
        (place / "a.txt").write_text("one\n")
        _git("-C", str(place), "apply", str(self.work / "out" / self.outputs["patch"]))
        return (place / "a.txt").read_text()


Run = Callable[..., Awaitable[Ran]]


@pytest.fixture(scope="module")
def modules() -> Path:
    need("claude-code")
    return claude_code_here.modules()


@pytest.fixture
async def run(modules: Path, tmp_path: Path) -> AsyncIterator[Run]:
    """Run its program as a process of this host, on a repository with a.txt, with a script for the model."""
    started: list[asyncio.subprocess.Process] = []

    async def run(
        *script: Answer,
        seconds: float = 200,
        during: Callable[[ScriptedApi, asyncio.subprocess.Process], Coroutine[Any, Any, None]] | None = None,
        ticket: dict[str, str] | None = None,
        **inputs: Any,
    ) -> Ran:
        work = tmp_path / str(len(started)) / "work"
        work.mkdir(parents=True)
        inputs = {"prompt": "Do it.", "files": {"a.txt": "one\n"}, **inputs}
        given = {
            "inputs": check.inputs(CODE, {name: value for name, value in inputs.items() if value is not None}),
            "ticket": ticket or {"title": "A title", "description": "A description."},
            "step": {"timeout_seconds": seconds},
        }
        (work / "input.json").write_text(json.dumps(given))
        async with ScriptedApi(script).serving() as api:
            env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(modules), "PYTHONDONTWRITEBYTECODE": "1"}
            env |= {"ANTHROPIC_BASE_URL": api.url, "ANTHROPIC_API_KEY": api.key}
            child = await asyncio.create_subprocess_exec(
                sys.executable, str(CODE.path / CODE.entry[0]), cwd=work, env=env, stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            started.append(child)
            async with asyncio.TaskGroup() as group:
                if during is not None:
                    group.create_task(during(api, child))
                printed, said = await child.communicate()
        assert b"Traceback" not in said, said.decode()
        assert api.others == [], "calls of the model, and no other traffic"
        left = work / "output.json"
        outputs = json.loads(left.read_text()) if left.exists() else {}
        if child.returncode == 0:
            check.outputs(CODE, outputs)
        return Ran(
            api=api,
            code=child.returncode or 0,
            printed=printed.decode(),
            said=said.decode(),
            outputs=outputs,
            work=work,
        )

    yield run
    for child in started:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def test_it_works_on_a_repository(run: Run) -> None:
    ran = await run(EDIT, bash("git add -A; git commit -qm two; echo $HOME; id -un"), {"text": "All done."})
    out = ran.outputs
    assert (out["text"], out["finished"], out["stop_reason"], out["why"], out["turns"]) == (
        "All done.", True, "end_turn", "", 3
    )  # fmt: skip
    assert [(one["path"], one["status"]) for one in out["changes"]] == [("a.txt", "changed")], "HOME is elsewhere"
    assert ran.patched == "one\ntwo\n" and "+two" in out["diff"] and out["commits"] == 1
    assert out["usage"] == {"input_tokens": 3 * INPUT_TOKENS, "output_tokens": 3 * OUTPUT_TOKENS}
    assert "$ echo two >> a.txt\n" in ran.printed and "Next.\n" in ran.printed, "what it says and does"
    sent = ran.api.seen[0]
    assert {tool["name"] for tool in sent["tools"]} >= {"Bash", "Edit", "Read", "Write"}
    assert not {"WebFetch", "WebSearch"} & {tool["name"] for tool in sent["tools"]}, "it has no network"
    kept = [json.loads(line) for line in (ran.work / "out" / out["transcript"]).read_text().splitlines()]
    assert "echo two >> a.txt" in json.dumps(kept) and "Do it." in json.dumps(kept)


async def test_a_title_is_enough(run: Run) -> None:
    ran = await run(DONE, prompt=None, ticket={"title": "Fix median()"})
    assert "Fix median()" in json.dumps(ran.api.seen[0]["messages"]) and ran.outputs["patch"] == ""


async def test_a_branch_comes_back(run: Run) -> None:
    ran = await run(EDIT, DONE, branch="fix/two", prompt=None, system="Be brief.")
    assert "A description." in json.dumps(ran.api.seen[0]["messages"])
    assert "Be brief." in json.dumps(ran.api.seen[0]["system"])
    bundle = ran.work / "out" / ran.outputs["bundle"]
    clone = ran.work.with_name("clone")
    _git("clone", "-q", "-b", "fix/two", str(bundle), str(clone))
    assert (clone / "a.txt").read_text() == "one\ntwo\n"


OVERLOADED = {"status": 529, "type": "overloaded_error", "message": "Overloaded", "headers": {"retry-after": "1"}}
TOO_LONG = {"status": 400, "type": "invalid_request_error", "message": "prompt is too long: 214000 tokens > 200000"}
REFUSED = {"status": 402, "type": "billing_error", "message": "over budget: the ticket's budget is $1, $0.99 is spent"}
WRITE = {"calls": [{"name": "Write", "input": {"file_path": "b.txt", "content": "x" * 1000}}]}


@pytest.mark.parametrize(
    ("script", "stop_reason", "why"),
    [
        pytest.param([{**bash("echo no"), "fault": "overloaded"}] * 2, "", "", id="overloaded within the stream"),
        pytest.param([OVERLOADED] * 5, "", "", id="overloaded five times"),
        pytest.param([{"status": 429, "type": "rate_limit_error", "headers": {"retry-after": "1"}}], "", "", id="429"),
        pytest.param([{**bash("echo no"), "fault": "torn"}] * 2, "", "", id="torn stream"),
        pytest.param([{"text": "half \ud83d", **bash("printf '\ud83d'")}], "", "", id="lone surrogate"),
        pytest.param([{**WRITE, "fault": "cut", "stop": "max_tokens"}], "", "", id="tool call cut by max_tokens"),
        pytest.param([{"text": "And so", "stop": "max_tokens"}], "", "", id="text cut by max_tokens"),
        pytest.param([TOO_LONG] * 9, "prompt_too_long", "too long", id="prompt too long"),
        pytest.param([REFUSED] * 9, "budget", "over budget", id="budget"),
        pytest.param([{"status": 400, "type": "invalid_request_error"}] * 9, "api_error", "400", id="bad request"),
    ],
)
async def test_no_fault_costs_work_that_was_done(run: Run, script: list[Answer], stop_reason: str, why: str) -> None:
    ran = await run(EDIT, *script, DONE)
    out = ran.outputs
    assert ran.code == 0 and ran.patched == "one\ntwo\n", ran.said
    assert (out["finished"], out["stop_reason"]) == (not stop_reason, stop_reason or "end_turn"), out["why"]
    assert why in out["why"] and bool(why) == bool(out["why"])
    assert out["transcript"] and out["bundle"]
    if not stop_reason:
        assert out["text"] == "All done." and len(ran.api.seen) == len(script) + 2


async def test_a_tool_call_that_was_cut_is_handed_back(run: Run) -> None:
    ran = await run({**WRITE, "fault": "cut", "stop": "max_tokens"}, DONE)
    assert "could not be parsed" in json.dumps(ran.api.seen[1]["messages"][-1]), "so that Claude can mend it"


@pytest.mark.parametrize(
    ("limit", "stop_reason"), [({"max_turns": 2}, "max_turns"), ({"max_usd": 0.005}, "budget_exhausted")]
)
async def test_limits_end_it(run: Run, limit: dict[str, Any], stop_reason: str) -> None:
    out = (await run(bash("echo x >> a.txt"), **limit)).outputs
    assert (out["finished"], out["stop_reason"]) == (False, stop_reason) and "+x" in out["diff"]


async def test_the_time_limit_of_the_ticket_comes_near(run: Run) -> None:
    """While a tool runs, whose processes end with it."""
    mark = f"import time; time.sleep(1000)  # of this test, {uuid.uuid4()}"
    for seconds in (24, 120):  # a busy machine may use all of it before the first tool
        ran = await run(EDIT, bash(f'python3 -c "{mark}"'), seconds=seconds)
        if "+two" in ran.outputs.get("diff", ""):
            break
    assert (ran.outputs["finished"], ran.outputs["stop_reason"]) == (False, "time"), ran.outputs["why"]
    assert ran.patched == "one\ntwo\n"
    assert not [one for one in _processes() if mark in one[1]]


async def test_a_crash_is_survived_by_the_session(run: Run) -> None:
    def written(pid: int) -> bool:
        """Has Claude Code, which writes its session behind its calls, written what the tool said?"""
        sessions = Path(f"/proc/{pid}/cwd").glob(".home/.claude/projects/*/*.jsonl")
        return any("echo two" in text and "tool_result" in text for text in (one.read_text() for one in sessions))

    async def kill(api: ScriptedApi, child: asyncio.subprocess.Process) -> None:
        await asyncio.wait_for(api.held.wait(), 60)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not written(child.pid):  # noqa: ASYNC110 - by another program
                await asyncio.sleep(0.05)
        os.kill(_claude_of(child.pid), signal.SIGKILL)

    ran = await run(EDIT, {"text": "I am", "fault": "held"}, DONE, during=kill)
    assert (ran.outputs["finished"], ran.outputs["text"]) == (True, "All done."), ran.outputs["why"]
    assert ran.patched == "one\ntwo\n" and "was ended by signal 9" in ran.printed
    assert "echo two" in json.dumps(ran.api.seen[-1]["messages"]), "it knows what it did"


async def test_what_crashes_again_and_again_ends_with_the_work(run: Run) -> None:
    async def kill(api: ScriptedApi, child: asyncio.subprocess.Process) -> None:
        while child.returncode is None:
            waits = [asyncio.ensure_future(one) for one in (api.held.wait(), child.wait())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if api.held.is_set():
                api.held.clear()
                os.kill(_claude_of(child.pid), signal.SIGKILL)
            for one in waits:
                one.cancel()

    ran = await run(EDIT, {"text": "I am", "fault": "held"}, during=kill)
    assert (ran.outputs["finished"], ran.outputs["stop_reason"]) == (False, "crashed")
    assert "signal 9" in ran.outputs["why"] and ran.patched == "one\ntwo\n"


@pytest.mark.parametrize(
    ("script", "inputs", "code", "said"),
    [
        ([{"status": 400, "message": "no such model"}], {}, 3, "no such model"),
        ([DONE], {"prompt": "  "}, 2, "nothing to do"),
        ([DONE], {"files": {"../b": "x"}}, 2, "not a path below the work directory"),
    ],
)
async def test_what_never_began_fails(
    run: Run, script: list[Answer], inputs: dict[str, Any], code: int, said: str
) -> None:
    ran = await run(*script, **inputs)
    assert ran.code == code and said in ran.said and ran.said.startswith("claude-code: ") and not ran.outputs


def _git(*words: str) -> None:
    subprocess.run(["git", *words], check=True)


def _processes() -> list[tuple[int, str]]:
    """Process id and command line of all of them."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError):
                found.append((int(place.name), (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()))
    return found


def _claude_of(parent: int) -> int:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    [child] = [int(one) for one in children if "_bundled/claude" in Path(f"/proc/{one}/cmdline").read_text()]
    return child
