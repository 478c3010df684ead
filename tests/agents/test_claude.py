"""The agents claude and claude-agent: their programs, with Anthropic's own SDK, before a real HTTP server.

As plain processes. In a VM, through the gateway, they are run by tests of the gateway.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
import tarfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from swarm import agents
from swarm.agents import check
from swarm.errors import StepError
from swarm.model import Agent
from tests.gateway.messages_api import HAIKU, MessagesApi

CLAUDE, WORKER = (agents.read(next(d for d in agents.builtin() if d.name == n)) for n in ("claude", "claude-agent"))


@dataclass
class Ran:
    code: int
    printed: str
    said: str
    outputs: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
async def api() -> AsyncIterator[MessagesApi]:
    async with MessagesApi(key="token").serving() as serving:
        yield serving


async def run(
    agent: Agent,
    api: MessagesApi,
    place: Path,
    inputs: Mapping[str, Any],
    *,
    description: str | None = None,
    **env: str,
) -> Ran:
    """The agent's program as its VM starts it: inputs checked, with the environment of the gateway."""
    place.mkdir(exist_ok=True)
    given = {"inputs": check.inputs(agent, dict(inputs)), "ticket": {"description": description}}
    (place / "input.json").write_text(json.dumps(given))
    ways = {"ANTHROPIC_BASE_URL": api.url, "ANTHROPIC_API_KEY": "token", "PATH": "/usr/bin:/bin", **env}
    child = await asyncio.create_subprocess_exec(
        sys.executable, str(agent.path / agent.entry[0]), cwd=place, env=ways, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await child.communicate()
    ran = Ran(code=child.returncode or 0, printed=out.decode(), said=err.decode())
    assert "Traceback" not in ran.said, ran.said
    if ran.code == 0:
        ran.outputs = json.loads((place / "output.json").read_text())
        check.outputs(agent, ran.outputs)
    return ran


# --- claude -----------------------------------------------------------------------------------------------------------


async def test_a_prompt_and_its_answer(api: MessagesApi, tmp_path: Path) -> None:
    ran = await run(CLAUDE, api, tmp_path, {"prompt": "Write a haiku", "system": "Be brief", "max_tokens": 50})
    assert ran.printed.strip() == HAIKU == ran.outputs["text"]
    assert (ran.outputs["model"], ran.outputs["stop_reason"]) == ("claude-sonnet-5-5", "end_turn")
    assert ran.outputs["usage"]["input_tokens"] > 0 and ran.outputs["usage"]["output_tokens"] > 0
    (seen,) = api.seen
    assert seen["body"]["stream"] is True and "temperature" not in seen["body"]
    assert {name: seen["body"][name] for name in ("system", "max_tokens", "messages")} == {
        "system": "Be brief",
        "max_tokens": 50,
        "messages": [{"role": "user", "content": "Write a haiku"}],
    }


async def test_the_tickets_description_or_a_conversation_in_place_of_a_prompt(api: MessagesApi, tmp_path: Path) -> None:
    await run(CLAUDE, api, tmp_path, {}, description="from the ticket")
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "one"}]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    more = {"messages": conversation, "model": "claude-haiku-4-5", "temperature": 0.5}
    await run(CLAUDE, api, tmp_path, more, description="not this")
    first, second = (seen["body"] for seen in api.seen)
    assert first["messages"] == [{"role": "user", "content": "from the ticket"}]
    assert second["messages"] == conversation and second["temperature"] == 0.5
    assert second["model"] == "claude-haiku-4-5"


async def test_it_prints_while_the_answer_comes(api: MessagesApi, tmp_path: Path) -> None:
    """The first word is out before the server has sent the last."""
    (tmp_path / "input.json").write_text(
        json.dumps({"inputs": {"prompt": "words=6 delay=0.3"}, "ticket": {"description": None}})
    )
    child = await asyncio.create_subprocess_exec(
        sys.executable, str(CLAUDE.path / "main.py"), cwd=tmp_path, stdout=asyncio.subprocess.PIPE,
        env={"ANTHROPIC_BASE_URL": api.url, "ANTHROPIC_API_KEY": "token"},
    )  # fmt: skip
    assert child.stdout is not None
    async with asyncio.timeout(60):
        assert await child.stdout.readexactly(5) == b"word "
        assert not (tmp_path / "output.json").exists() and child.returncode is None
        await child.communicate()
    assert child.returncode == 0


@pytest.mark.parametrize(
    ("agent", "inputs", "env", "code", "said"),
    [
        (CLAUDE, {"prompt": "scenario=429"}, {}, 3, "429 rate_limit_error: slow down"),
        (WORKER, {"prompt": "scenario=529"}, {}, 3, "529 overloaded_error: Overloaded"),
        (CLAUDE, {"prompt": "scenario=cut"}, {}, 4, "the answer is not whole"),
        (WORKER, {"prompt": "scenario=cut"}, {}, 4, "the answer is not whole"),
        (CLAUDE, {"prompt": "scenario=malformed"}, {}, 4, "the answer is not whole"),
        (CLAUDE, {"prompt": "hi"}, {"ANTHROPIC_API_KEY": "dead"}, 3, "401 authentication_error: invalid x-api-key"),
        (CLAUDE, {"prompt": "hi"}, {"ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}, 4, "can't be reached"),
        (CLAUDE, {"prompt": "hi"}, {"ANTHROPIC_BASE_URL": ""}, 2, "no way to the model"),
        (WORKER, {"prompt": "hi"}, {"ANTHROPIC_API_KEY": ""}, 2, "no way to the model"),
        (CLAUDE, {"prompt": "  "}, {}, 2, "nothing to ask"),
        (WORKER, {}, {}, 2, "nothing to do"),
    ],
)
async def test_failures_are_one_line_and_a_status(
    agent: Agent, api: MessagesApi, tmp_path: Path, inputs: dict[str, Any], env: dict[str, str], code: int, said: str
) -> None:
    ran = await run(agent, api, tmp_path, {"max_retries": 0, **inputs}, **env)
    assert ran.code == code and ran.said.startswith(f"{agent.name}: ") and said in ran.said, ran.said
    assert len(ran.said.splitlines()) == 1 and not (tmp_path / "output.json").exists()


async def test_a_busy_api_is_asked_again(api: MessagesApi, tmp_path: Path) -> None:
    ran = await run(CLAUDE, api, tmp_path, {"prompt": "scenario=529 times=2"})
    assert ran.outputs["text"] == HAIKU and len(api.seen) == 3


@pytest.mark.parametrize(
    "inputs",
    [
        {"prompt": "a", "messages": [{"role": "user", "content": "b"}]},
        {"messages": []},
        {"messages": [{"role": "system", "content": "b"}]},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "tools": []},
    ],
)
def test_inputs_that_make_no_sense(inputs: dict[str, Any]) -> None:
    with pytest.raises(StepError, match="don't fit the agent claude"):
        check.inputs(CLAUDE, inputs)


# --- claude-agent -----------------------------------------------------------------------------------------------------


def script(*turns: list[dict[str, Any]]) -> str:
    return f"scenario=script script={json.dumps(turns)}"


def call(name: str, **given: Any) -> dict[str, Any]:
    return {"name": name, "input": given}


async def test_it_works_with_its_tools(api: MessagesApi, tmp_path: Path) -> None:
    turns = script(
        [
            call("read_file", path="notes.txt"),
            call("run_command", command="cat notes.txt | wc -l; env | grep -c ANTHRO"),
        ],
        [
            call("edit_file", path="notes.txt", old="two", new="2"),
            call("write_file", path="new/deep.txt", text="fresh\n"),
        ],
        [call("run_command", command="rm gone.txt; printf '\\0' > binary; ls new")],
    )
    inputs = {
        "prompt": turns,
        "files": {"notes.txt": "one\ntwo\n", "gone.txt": "x\n", "same.txt": "s"},
        "archive": True,
    }
    ran = await run(WORKER, api, tmp_path, inputs)
    out = ran.outputs
    assert (out["text"], out["finished"], out["stop_reason"], out["turns"]) == (HAIKU, True, "end_turn", 4)
    assert out["changes"] == {
        "notes.txt": "changed", "new/deep.txt": "added", "binary": "added", "gone.txt": "removed"
    }  # fmt: skip
    assert out["files"] == {"notes.txt": "one\n2\n", "new/deep.txt": "fresh\n"}
    assert "--- a/notes.txt\n+++ b/notes.txt\n@@ -1,2 +1,2 @@\n one\n-two\n+2\n" in out["diff"]
    assert "--- /dev/null\n+++ b/new/deep.txt\n@@ -0,0 +1 @@\n+fresh\n" in out["diff"]
    assert "--- a/gone.txt\n+++ /dev/null\n" in out["diff"] and "same.txt" not in out["diff"]
    assert out["truncated"] is True, "the binary file is not in the diff"
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(out["archive"]))) as archive:
        assert archive.getnames() == ["binary", "new/deep.txt", "notes.txt"]
    # What Claude was told, turn by turn, and that nothing of the SDK's own is sent back.
    last = api.seen[-1]["body"]
    assert [m["role"] for m in last["messages"]] == ["user", "assistant"] * 3 + ["user"]
    first, second = last["messages"][2]["content"]
    assert first == {"type": "tool_result", "tool_use_id": "toolu_0_0", "content": "one\ntwo\n"}
    assert second["content"] == "2\n0\n\n[exit status 1]", "no token in what it runs"
    assert set(last["messages"][1]["content"][0]) == {"type", "text"}
    assert out["usage"]["input_tokens"] == sum(len(json.dumps(s["body"]["messages"])) // 4 for s in api.seen)
    assert "$ rm gone.txt" in ran.printed and "wrote new/deep.txt" in ran.printed and "Turn 0." in ran.printed


async def test_tools_that_are_used_wrongly_say_so(api: MessagesApi, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    wrong = [
        call("read_file", path="../outside"), call("read_file", path="/etc/passwd"), call("read_file", path="none"),
        call("write_file", path="../outside", text="x"), call("write_file", path="link/x", text="x"),
        call("edit_file", path="a.txt", old="a", new="b"), call("edit_file", path="a.txt", old="", new="b"),
        call("run_command"), call("run_command", command="sleep 60", timeout_seconds=1), call("dance"),
    ]  # fmt: skip
    turns = script([call("run_command", command=f"ln -s {tmp_path} link")], wrong)
    ran = await run(WORKER, api, tmp_path / "work", {"prompt": turns, "files": {"a.txt": "aa"}})
    answers = api.seen[-1]["body"]["messages"][4]["content"]
    assert [bool(answer.get("is_error")) for answer in answers] == [True] * 8 + [False, True]
    assert all("not below the work directory" in answers[i]["content"] for i in (0, 1, 3, 4))
    assert "2 times, not once" in answers[5]["content"] and "killed after 1 seconds" in answers[8]["content"]
    assert (tmp_path / "outside").read_text() == "secret" and ran.outputs["finished"]


async def test_much_output_is_cut_in_the_middle(api: MessagesApi, tmp_path: Path) -> None:
    turns = script([call("run_command", command="echo first; head -c 100000 /dev/zero | tr '\\0' x; echo; echo last")])
    await run(WORKER, api, tmp_path, {"prompt": turns})
    (answer,) = api.seen[-1]["body"]["messages"][2]["content"]
    assert len(answer["content"]) < 31_000 and "bytes left out" in answer["content"]
    assert answer["content"].startswith("first\n") and "last\n" in answer["content"]


@pytest.mark.parametrize(
    ("inputs", "limit"),
    [({"max_turns": 2}, "max_turns"), ({"max_total_tokens": 10}, "max_total_tokens")],
)
async def test_limits_end_it(api: MessagesApi, tmp_path: Path, inputs: dict[str, Any], limit: str) -> None:
    turns = script(*[[call("write_file", path=f"{n}.txt", text="x")] for n in range(9)])
    ran = await run(WORKER, api, tmp_path / "a", {"prompt": turns, **inputs})
    assert ran.code == 1 and f"not finished after {len(api.seen)} turns: {limit}" in ran.said
    kept = await run(WORKER, api, tmp_path / "b", {"prompt": turns, "on_limit": "keep", **inputs})
    assert (kept.outputs["finished"], kept.outputs["stop_reason"]) == (False, limit)
    assert "0.txt" in kept.outputs["files"]


async def test_files_that_would_lie_elsewhere_are_refused(api: MessagesApi, tmp_path: Path) -> None:
    ran = await run(WORKER, api, tmp_path / "work", {"prompt": "hi", "files": {"../x": "y"}})
    assert ran.code == 2 and "not below the work directory" in ran.said and not api.seen


def test_who_is_meant_by_claude() -> None:
    """`WHERE name LIKE '%claude%' LIMIT 1` finds the one that was registered first."""
    names = [agents.read(directory).name for directory in agents.builtin()]
    assert names.index("claude") < names.index("claude-agent")
    assert CLAUDE.network == WORKER.network == "gateway" and CLAUDE.requirements == WORKER.requirements
