"""The agent claude: its program, with Anthropic's own SDK, before a real HTTP server.

As a plain process. In a VM, through the gateway, tests of the gateway run it.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swarm import agents
from swarm.agents import check
from swarm.config import Settings
from swarm.errors import StepError
from swarm.model import Agent
from tests.agents.warm import Ran, connected, perform, warmed
from tests.gateway.messages_api import HAIKU, MessagesApi

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

CLAUDE = agents.read(next(directory for directory in agents.builtin() if directory.name == "claude"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An agentd of this host, its warm interpreter with all that the manifest preloads: each run is a fork of it."""
    with warmed(CLAUDE, tmp_path_factory.mktemp("warm")) as place:
        yield place


@pytest.fixture
async def api() -> AsyncIterator[MessagesApi]:
    async with MessagesApi(key="token").serving() as serving:
        yield serving


Run = Callable[..., Awaitable[Ran]]


@pytest.fixture
async def run(root: Path, api: MessagesApi) -> AsyncIterator[Run]:
    """Run an agent's program as its VM does: inputs checked, with the environment that the gateway gives."""

    async def run(
        agent: Agent,
        inputs: Mapping[str, Any],
        *,
        description: str | None = None,
        heard: Callable[[str, bytes], None] = lambda *_: None,
        **env: str,
    ) -> Ran:
        return await perform(
            channel,
            root,
            agent,
            inputs,
            ticket={"description": description},
            env={"ANTHROPIC_BASE_URL": api.url, "ANTHROPIC_API_KEY": "token", **env},
            timeout_seconds=60,
            heard=heard,
        )

    async with connected(root, seconds=60) as channel:
        yield run


# --- claude -----------------------------------------------------------------------------------------------------------


async def test_a_prompt_and_its_answer(run: Run, api: MessagesApi) -> None:
    ran = await run(CLAUDE, {"prompt": "Write a haiku", "system": "Be brief", "max_tokens": 50})
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


async def test_the_tickets_description_or_a_conversation_in_place_of_a_prompt(run: Run, api: MessagesApi) -> None:
    await run(CLAUDE, {}, description="from the ticket")
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "one"}]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    more = {"messages": conversation, "model": "claude-haiku-4-5", "temperature": 0.5}
    await run(CLAUDE, more, description="not this")
    first, second = (seen["body"] for seen in api.seen)
    assert first["messages"] == [{"role": "user", "content": "from the ticket"}]
    assert second["messages"] == conversation and second["temperature"] == 0.5
    assert second["model"] == "claude-haiku-4-5"


async def test_it_prints_while_the_answer_comes(run: Run, root: Path) -> None:
    """The first word arrives even if the answer is incomplete."""
    there: list[bool] = []
    ran = await run(
        CLAUDE,
        {"prompt": "words=6 delay=0.2"},
        heard=lambda stream, data: there.append((root / "work/output.json").exists()),
    )
    assert ran.printed == "word " * 6 + "\n" and len(there) >= 3 and there[0] is False


@pytest.mark.parametrize(
    ("agent", "inputs", "env", "code", "said"),
    [
        (CLAUDE, {"prompt": "scenario=429"}, {}, 3, "429 rate_limit_error: slow down"),
        (CLAUDE, {"prompt": "scenario=529"}, {}, 3, "529 overloaded_error: Overloaded"),
        (CLAUDE, {"prompt": "scenario=cut"}, {}, 4, "the answer is incomplete"),
        (CLAUDE, {"prompt": "scenario=malformed"}, {}, 4, "the answer is incomplete"),
        (CLAUDE, {"prompt": "hi"}, {"ANTHROPIC_API_KEY": "dead"}, 3, "401 authentication_error: invalid x-api-key"),
        (CLAUDE, {"prompt": "hi"}, {"ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}, 4, "can't be reached"),
        (CLAUDE, {"prompt": "hi"}, {"ANTHROPIC_BASE_URL": ""}, 2, "can't reach a model: the gateway has not set"),
        (CLAUDE, {"prompt": "hi"}, {"ANTHROPIC_API_KEY": ""}, 2, "can't reach a model: the gateway has not set"),
        (CLAUDE, {"prompt": "  "}, {}, 2, "nothing to ask"),
    ],
)
async def test_failures_are_one_line_and_a_status(
    run: Run, root: Path, agent: Agent, inputs: dict[str, Any], env: dict[str, str], code: int, said: str
) -> None:
    ran = await run(agent, {"max_retries": 0, **inputs}, **env)
    assert ran.code == code and ran.said.startswith(f"{agent.name}: ") and said in ran.said, ran.said
    assert len(ran.said.splitlines()) == 1 and not (root / "work/output.json").exists()


async def test_a_busy_api_is_asked_again(run: Run, api: MessagesApi) -> None:
    ran = await run(CLAUDE, {"prompt": "scenario=529 times=2"})
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


# What an agent finds that is forked from an interpreter which has made its first call, and has called once itself.
LOOK = """
import gc, json, os, random, sys, threading
import anthropic, first_call, httpx2
from anthropic.types import Message
found = {
    "made": [Message.__pydantic_complete__, anthropic.types.TextBlock.__pydantic_complete__],
    "threads": threading.active_count(),
    "sockets": [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(p := f"/proc/self/fd/{fd}")
                and os.readlink(p).startswith("socket")],
    "open": [repr(c) for c in gc.get_objects() if isinstance(c, httpx2.Client) and not c.is_closed],
}
keys = []
def answer(request):
    keys.append(request.headers.get("idempotency-key") or request.headers["x-stainless-retry-count"])
    return httpx2.Response(500)
client = anthropic.Anthropic(api_key="k", base_url="http://x", max_retries=0,
    http_client=anthropic.DefaultHttpxClient(transport=httpx2.MockTransport(answer)))
found["key"] = client._idempotency_key()
found["random"] = random.random()
json.dump(found, open("output.json", "w"))
"""


async def test_what_the_first_call_leaves_to_every_agent(run: Run, root: Path, tmp_path: Path) -> None:
    """Schemas, and nothing that could tie two clones together, or to anything that was open in the template."""
    (tmp_path / "look.py").write_text(LOOK)
    looking = replace(CLAUDE, path=tmp_path, entry=("look.py",), outputs_schema=None)
    one, two = [(await run(looking, {"prompt": "look"})).outputs for _ in range(2)]
    assert one["made"] == [True, True] and one["threads"] == 1
    assert one["sockets"] == one["open"] == []
    assert one["key"] != two["key"] and one["random"] != two["random"]


async def test_who_is_meant_by_claude(settings: Settings) -> None:
    """By what users type: the one that asks once, though others have it in their names."""
    with contextlib.closing(sqlite3.connect(settings.data_dir / "swarm.db", timeout=60)) as database:
        named = "SELECT name FROM agents WHERE name LIKE '%claude%'"
        assert database.execute(f"{named} LIMIT 1").fetchall() == [("claude",)]
        assert ("claude-code",) in database.execute(named).fetchall()
        columns = database.execute("SELECT id, name FROM agents WHERE name LIKE '%claude%' LIMIT 1").fetchone()
    assert columns == (CLAUDE.id, "claude") and CLAUDE.network == "gateway"
