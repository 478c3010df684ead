"""The agent mini-swe: mini-swe-agent and LiteLLM, unchanged, against a server of ours, as a process of this host.

tests/gateway/test_in_vm.py runs it in a VM, behind the gateway.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swarm import agents, config
from swarm.app import wiring
from swarm.errors import LayerMissing
from tests.agents.warm import Ran, connected, perform, warmed
from tests.channel.agentd_here import SPEC
from tests.conftest import missing
from tests.gateway.messages_api import MessagesApi

pytestmark = pytest.mark.slow  # starts programs that import for seconds

SWE = agents.read(next(place for place in agents.builtin() if place.name == "mini-swe"))
SUBMIT = [{"name": "bash", "input": {"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"}}]


@pytest.fixture(scope="module")
def modules() -> Path:
    """What it requires, for this host's Python."""
    try:
        layer = asyncio.run(wiring.layers(config.load(driver="process")).find(SWE, SPEC.image))
    except LayerMissing:
        missing("mini-swe", "needs mini-swe-agent, 150 MB from PyPI: run `make ready AGENTS=mini-swe`")
    assert layer is not None
    return layer.path


@pytest.fixture(scope="module")
def root(modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An agentd of this host that has made the agent's imports, as in a template: each run is a fork of it."""
    with warmed(SWE, tmp_path_factory.mktemp("warm"), modules) as place:
        yield place


Run = Callable[..., Awaitable[Ran]]


@pytest.fixture
async def api() -> AsyncIterator[MessagesApi]:
    async with MessagesApi(key="token").serving() as serving:
        yield serving


@pytest.fixture
async def run(root: Path, api: MessagesApi) -> AsyncIterator[Run]:
    async def run(*turns: Any, seconds: float = 120, key: str = "token", **inputs: Any) -> Ran:
        if turns:
            inputs["prompt"] = f"scenario=script script={json.dumps(turns)}"
        return await perform(
            channel,
            root,
            SWE,
            inputs,
            ticket={},
            step={"timeout_seconds": seconds},
            env={"ANTHROPIC_BASE_URL": api.url, "ANTHROPIC_API_KEY": key},
            timeout_seconds=240,
        )

    async with connected(root, seconds=180) as channel:
        yield run


def bash(command: str) -> dict[str, Any]:
    return {"name": "bash", "input": {"command": command}}


def changes(ran: Ran) -> dict[str, str]:
    assert ran.outputs, ran.said
    return {change["path"]: change["status"] for change in ran.outputs["changes"]}


async def test_it_works_on_files_and_brings_them_back(run: Run, api: MessagesApi, root: Path) -> None:
    ran = await run(
        [bash("cat a.txt; env | grep -c -e ANTHROPIC -e token; pwd; echo $HOME; sleep 300 & echo $!")],
        [bash("sed -i s/one/two/ a.txt; git commit -qam mine; echo x > b"), bash("echo \ud800")],
        [bash("head -c 3000000 /dev/zero | tr '\\0' y")],
        SUBMIT,
        files={"a.txt": "one\n"},
        branch="swarm/t",
    )
    first = [block for message in api.seen[1]["body"]["messages"] for block in message["content"]][-1]
    said = json.loads(first["content"] if isinstance(first["content"], str) else first["content"][0]["text"])
    text, tokens, place, home, _ = said["output"].split()  # what was left running held nothing up
    work = root / "work"
    assert (text, tokens, place, home) == ("one", "0", str(work / "repo"), str(work / ".home"))
    out = ran.outputs
    assert (out["finished"], out["stop_reason"], out["why"], out["turns"]) == (True, "submitted", "", 4)
    assert changes(ran) == {"a.txt": "changed", "b": "added"} and out["commits"] == 2
    assert "-one\n+two\n" in out["diff"] and out["text"] == "Turn 3."
    assert out["usage"]["prompt_tokens"] > 0 and out["usage"]["completion_tokens"] > 0
    names = {"changes.patch", "branch.bundle", "transcript.json"}
    assert {place.name for place in (work / "out").iterdir()} == names
    transcript = (work / "out/transcript.json").read_text()
    assert "sed -i s/one/two/" in transcript and '"token"' not in transcript
    assert all(len(json.dumps(seen["body"])) < 200_000 for seen in api.seen), "what was printed is cut"
    assert api.seen[-1]["body"]["max_tokens"] == 8192


CHANGE = [bash("echo done > work.txt")]


@pytest.mark.parametrize(
    ("turns", "inputs", "reason", "why"),
    [
        ([CHANGE, {"status": 529, "times": 2, "then": SUBMIT}], {}, "submitted", ""),
        ([CHANGE, {"status": 500, "times": 1, "then": SUBMIT}], {}, "submitted", ""),
        ([CHANGE, {"status": 429, "times": 1, "then": SUBMIT}], {}, "submitted", ""),
        ([CHANGE, {"status": 400, "then": SUBMIT}], {}, "api_error_400", "prompt is too long"),
        ([CHANGE, {"status": 402, "then": SUBMIT}], {}, "api_error_402", "Internal server error"),
        ([CHANGE, {"status": 529, "then": SUBMIT}], {"seconds": 20}, "api_error_5..|time", ""),
        ([CHANGE, [bash("sleep 600")], SUBMIT], {"seconds": 20}, "time", "nearly used up"),
        ([CHANGE, CHANGE, CHANGE], {"max_turns": 2}, "max_turns", "after 2 answers"),
        ([CHANGE], {}, "format", "answers in a row had no complete command"),
        ([CHANGE, [bash("cd ..; rm -rf repo/.git; chmod 0 repo/work.txt repo")], SUBMIT], {}, "submitted", ""),
    ],
)
async def test_work_that_was_done_comes_back(
    run: Run, turns: list[Any], inputs: dict[str, Any], reason: str, why: str
) -> None:
    ran = await run(*turns, **inputs)
    assert changes(ran) == {"work.txt": "added"} and ran.outputs["bundle"] == "branch.bundle"
    assert ran.outputs["finished"] is (reason == "submitted"), ran.outputs
    assert re.fullmatch(reason, ran.outputs["stop_reason"]) and why in ran.outputs["why"], ran.outputs


@pytest.mark.parametrize(
    ("inputs", "key", "code", "said"),
    [
        ({}, "token", 2, "nothing to do"),
        ({"prompt": "x", "files": {"../x": ""}}, "token", 2, "not a path below"),
        ({"prompt": "x"}, "", 2, "can't reach a model"),
        ({"prompt": "x"}, "dead", 3, "invalid x-api-key"),
    ],
)
async def test_what_never_began_is_one_line_and_a_status(
    run: Run, inputs: dict[str, Any], key: str, code: int, said: str
) -> None:
    ran = await run(key=key, **inputs)
    assert ran.code == code and ran.said.startswith("mini-swe: ") and said in ran.said and not ran.outputs, ran
