"""Real clients, unchanged, do real work through the gateway on a small budget, and give up at once when it is used up.

They come from PyPI (`tools/fetch-clients`), and find gateway and token by the variables that an agent has. The services
behind the gateway are the tests' own.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from swarm.gateway.policy import Policy
from swarm.gateway.process import Server
from tests.clients_here import directory
from tests.gateway.conftest import KEY, Harness
from tests.gateway.messages_api import HAIKU, MessagesApi
from tests.gateway.openai_api import OpenAiApi

pytestmark = pytest.mark.needs("clients")

SCRIPTS = Path(__file__).with_name("clients")
MODEL = "claude-haiku-4-5"  # prices are by model, whatever dialect it is called in
MAKE, SUBMIT = "echo done > made.txt", "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && cat made.txt"
SECONDS = 300  # some hundred times what they need on an idle machine


async def run(argv: list[str], client: str, listener: Server, place: Path, **more: str) -> tuple[int, str]:
    """Exit status and output of a client, with the environment of an agent and no way but the gateway."""
    home = place / "home"
    home.mkdir(exist_ok=True)
    environment = {
        **listener.env, "PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8",
        "PYTHONPATH": str(directory(client)), "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "MSWEA_MODEL_RETRY_STOP_AFTER_ATTEMPT": "1", **more,
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        *argv, env=environment, cwd=place, start_new_session=True, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(SECONDS):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, said.decode(errors="replace")


def codex(listener: Server) -> list[str]:
    provider = {
        "name": "swarm", "base_url": listener.env["OPENAI_BASE_URL"], "env_key": "OPENAI_API_KEY",
        "wire_api": "responses",
    }  # fmt: skip
    settings = {"model": MODEL, "model_provider": "swarm", "web_search": "disabled"}
    settings |= {f"model_providers.swarm.{name}": value for name, value in provider.items()}
    return [
        str(directory("codex") / "codex_cli_bin/bin/codex"), "exec", "--skip-git-repo-check", "--ephemeral",
        "--dangerously-bypass-approvals-and-sandbox",
        *(word for name, value in settings.items() for word in ("-c", f"{name}={json.dumps(value)}")),
        "Make made.txt",
    ]  # fmt: skip


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPTS / name), *arguments]


@pytest.fixture
async def openai_api() -> AsyncIterator[OpenAiApi]:
    async with OpenAiApi(key=KEY).serving() as serving:
        yield serving


@asynccontextmanager
async def openai_listener(harness: Harness, api: OpenAiApi, usd: float) -> AsyncIterator[Server]:
    claim = await harness.claim(budget_usd=usd)
    async with harness.listener(claim, Policy(upstreams=("openai",)), base_url=api.url) as listener:
        yield listener


async def books_equal(harness: Harness, used: list[dict[str, int]], *, usd: float) -> None:
    """Each call is booked with what the service said that it used, and all of them are within the budget."""
    await harness.booked(len(used))
    rows = harness.sql("SELECT input_tokens + cache_read_tokens, output_tokens, note FROM model_calls")
    assert sorted(rows) == sorted((one["input"], one["output"], None) for one in used)
    [(cost,)] = harness.sql("SELECT sum(cost_usd) FROM model_calls")
    assert 0 < cost < usd


async def all_answered(harness: Harness, *, usd: float) -> None:
    rows = await harness.booked(2)
    assert {(row[0], row[3]) for row in rows} == {(200, None)}
    assert 0 < sum(row[2] for row in rows) < usd


async def test_the_openai_sdk(harness: Harness, openai_api: OpenAiApi, tmp_path: Path) -> None:
    async with openai_listener(harness, openai_api, 0.2) as listener:
        status, said = await run(script("openai_sdk.py"), "openai", listener, tmp_path)
        assert status == 0, said
        assert json.loads(said) == {"said": [HAIKU] * 4, "used": 30}
        await books_equal(harness, openai_api.used, usd=0.2)


async def test_mini_swe_agent_by_litellm(harness: Harness, openai_api: OpenAiApi, tmp_path: Path) -> None:
    openai_api.script = [MAKE, SUBMIT]
    async with openai_listener(harness, openai_api, 0.2) as listener:
        argv = script("mini_swe.py", f"openai/{MODEL}", "Make made.txt")
        status, said = await run(argv, "mini-swe-agent", listener, tmp_path)
        assert (status, "'exit_status': 'Submitted'" in said) == (0, True), said
        assert (tmp_path / "made.txt").read_text() == "done\n", said
        await books_equal(harness, openai_api.used, usd=0.2)


async def test_mini_swe_agent_by_litellm_with_claude(harness: Harness, tmp_path: Path) -> None:
    turns = json.dumps([[{"name": "bash", "input": {"command": command}}] for command in (MAKE, SUBMIT)])
    async with harness.listener(await harness.claim(budget_usd=0.5)) as listener:
        argv = script("mini_swe.py", f"anthropic/{MODEL}", f"scenario=script script={turns}")
        status, said = await run(argv, "mini-swe-agent", listener, tmp_path)
        assert (status, "'exit_status': 'Submitted'" in said) == (0, True), said
        assert (tmp_path / "made.txt").read_text() == "done\n", said
        await all_answered(harness, usd=0.5)


async def test_codex(harness: Harness, openai_api: OpenAiApi, tmp_path: Path) -> None:
    openai_api.script = [MAKE]
    async with openai_listener(harness, openai_api, 0.1) as listener:
        status, said = await run(codex(listener), "codex", listener, tmp_path, CODEX_HOME=str(tmp_path))
        assert (status, HAIKU in said) == (0, True), said
        assert (tmp_path / "made.txt").read_text() == "done\n", said
        await books_equal(harness, openai_api.used, usd=0.1)


async def test_claude_code(harness: Harness, api: MessagesApi, tmp_path: Path) -> None:
    turns = json.dumps([[{"name": "Bash", "input": {"command": MAKE, "description": "makes it"}}]])
    claim = await harness.claim(budget_usd=0.5)
    async with harness.listener(claim) as listener:
        argv = script("claude_code.py", f"scenario=script script={turns}")
        status, said = await run(argv, "claude-agent-sdk", listener, tmp_path, IS_SANDBOX="1")
        assert (status, HAIKU in said) == (0, True), said
        assert (tmp_path / "made.txt").read_text() == "done\n", said
        await all_answered(harness, usd=0.5)


@pytest.mark.parametrize("client", ["openai", "codex", "claude-agent-sdk"])
async def test_a_client_gives_up_when_its_budget_is_used_up(
    harness: Harness, openai_api: OpenAiApi, tmp_path: Path, client: str
) -> None:
    """Without trying again for ever, and with the gateway's own words."""
    policy = Policy(upstreams=("openai", "anthropic"))
    async with harness.listener(await harness.claim(budget_usd=0.00001), policy) as listener:
        argv = {
            "openai": script("openai_sdk.py"),
            "codex": codex(listener),
            "claude-agent-sdk": script("claude_code.py", "A haiku"),
        }[client]
        status, said = await run(argv, client, listener, tmp_path, IS_SANDBOX="1", CODEX_HOME=str(tmp_path))
        assert (status != 0, "budget" in said) == (True, True), said
        assert listener.exceeded.done()
    assert [one["path"] for one in harness.api.seen if "_tokens" not in one["path"]] == []  # counting costs nothing
