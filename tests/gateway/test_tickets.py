"""Tickets whose agents call a model, end to end but for the VM: engine, worker, store, gateway, server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web

from swarm import config
from swarm.app import setup, wiring
from swarm.config import Settings
from swarm.engine.run_once import run_ticket
from swarm.errors import UsageError
from swarm.gateway import policy
from swarm.model import FailureReason, RetryPolicy
from tests.engine.conftest import Bench, engine_process, proved
from tests.gateway.conftest import KEY
from tests.gateway.messages_api import HAIKU, MessagesApi

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

# What an agent does, without an SDK. `call` answers with the text, or the error's message.
PRELUDE = """
import json, os, time, urllib.error, urllib.request

def call(prompt, **more):
    body = {"model": "claude-haiku-4-5", "max_tokens": 100, "messages": [{"role": "user", "content": prompt}], **more}
    headers = {"x-api-key": os.environ["ANTHROPIC_API_KEY"], "content-type": "application/json"}
    url = os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages"
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["content"][0]["text"]
    except urllib.error.HTTPError as error:
        return json.load(error)["error"]["message"]

def done(value):
    json.dump(value, open("output.json", "w"))
"""


@pytest.fixture
async def gated(
    settings: Settings, api: MessagesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    """Agents as plain processes, on a host that has a key."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_BASE_URL", api.url)
    own = config.load(**{**settings.model_dump(), "home": tmp_path / "home", "driver": "process"})
    await setup.init(own, image=False)
    async with wiring.store(own) as store, wiring.worker(own, store) as worker:
        yield Bench(settings=own, store=store, worker=worker, dir=tmp_path)


async def test_an_answer_and_its_bill(gated: Bench) -> None:
    ticket = await gated.run(PRELUDE + "done({'text': call('Write a haiku')})", network="gateway")
    assert (ticket.state, json.loads(ticket.outputs or "")) == ("done", {"text": HAIKU})
    [attempt] = await gated.attempts()
    [run] = await gated.store.runs("t")
    assert attempt.api_tokens_used == run.total_api_tokens > 0
    assert attempt.cost_usd == run.total_cost_usd > 0
    shown = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "swarm.cli.main", "ticket", "show", "t", "--home", str(gated.settings.home)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert f"model calls: {attempt.api_tokens_used} tokens, $0.0" in shown.stdout
    [event] = [e for e in await gated.store.events("t") if e.kind == "model_call"]
    assert event.attempt_id == attempt.id
    await proved(gated)


async def test_one_off_runs_are_booked_and_stopped(gated: Bench, api: MessagesApi) -> None:
    """`swarm agent run` has no ticket; what it spends is the installation's money all the same."""
    place = gated.dir / "tried"
    place.mkdir()
    (place / "agent.yaml").write_text(
        "name: tried\nversion: 1.0.0\nentry: [main.py]\nnetwork: gateway\nbudget_tokens: 1000\n"
    )
    (place / "main.py").write_text(
        PRELUDE + "done([call(p) for p in json.load(open('input.json'))['inputs']['prompts']])"
    )

    async def swarm(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "swarm.cli.main", *words, "--home", str(gated.settings.home)],
            capture_output=True, text=True, timeout=300, env={**os.environ, **environment},
        )  # fmt: skip

    run = ("agent", "run", str(place), "--no-vm", "--input")
    done = await swarm(*run, 'prompts=["Write a haiku"]')
    assert json.loads(done.stdout) == [HAIKU], done.stderr
    [(tokens, cost, ticket)] = gated.sql("SELECT tokens, cost_usd, ticket_id FROM model_calls")
    assert isinstance(tokens, int) and tokens > 0 and ticket is None
    [by_ticket] = json.loads((await swarm("cost", "--by", "ticket", "--json")).stdout)
    [by_agent] = json.loads((await swarm("cost", "--json")).stdout)
    assert (by_ticket["name"], by_agent["name"]) == ("(one-off runs)", "tried")
    assert by_ticket["cost_usd"] == by_agent["cost_usd"] == cost
    # The budget of the day, and the agent's own.
    day = await swarm(*run, 'prompts=["a"]', SWARM_BUDGET_TOKENS_PER_DAY=str(tokens))
    assert day.returncode == 1 and "over budget: this installation's budget for today (UTC)" in day.stderr
    own = await swarm(*run, f"prompts={json.dumps(['words=80'] * 12)}")
    assert own.returncode == 1 and "over budget: " in own.stderr
    assert "the budget of agent tried for a step is 1,000 tokens" in own.stderr
    made = sum(one["path"] == "/v1/messages" for one in api.seen)
    assert len(gated.sql("SELECT 1 FROM model_calls")) == made < 13, "what was refused was not made"
    # Without a key: one sentence, and nothing is started.
    none = await swarm(*run, 'prompts=["a"]', ANTHROPIC_API_KEY="")
    [said] = [line for line in none.stderr.splitlines() if not line.startswith("note: it runs without a VM")]
    assert none.returncode == 1 and "no key for anthropic on this host" in said and "swarm secret set" in said
    assert sum(one["path"] == "/v1/messages" for one in api.seen) == made


async def test_a_service_of_ones_own_has_its_key_outside_too(gated: Bench) -> None:
    """A table entry and a secret; no code, no bill. Its key is in the header that the table names."""
    seen = []

    async def answer(request: web.BaseRequest) -> web.Response:
        seen.append((request.method, request.path_qs, request.headers.get("Authorization")))
        return web.json_response({"issues": 3})

    server = await asyncio.get_running_loop().create_server(web.Server(answer), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    (gated.settings.home / "upstreams.toml").write_text(
        f'[github]\nbase_url = "http://127.0.0.1:{port}"\nkey = "github_token"\n'
        'header = { Authorization = "Bearer {key}" }\nenv = { GITHUB_API = "{url}", GITHUB_TOKEN = "{token}" }\n'
        'paths = ["GET /repos/*/*/issues"]\n'
    )
    await wiring.vault(gated.settings, gated.store).set("github_token", "ghp-the-real-one")
    code = """
def get(path):
    headers = {"Authorization": "Bearer " + os.environ["GITHUB_TOKEN"]}
    try:
        with urllib.request.urlopen(urllib.request.Request(os.environ["GITHUB_API"] + path, headers=headers)) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code
done([get("/repos/me/it/issues?state=open"), get("/user"), "ghp" in str(os.environ)])
"""
    async with server:
        ticket = await gated.run(PRELUDE + code, network="gateway:github")
    assert json.loads(ticket.outputs or "null") == [{"issues": 3}, 404, False], ticket.error
    assert seen == [("GET", "/repos/me/it/issues?state=open", "Bearer ghp-the-real-one")]
    assert gated.sql("SELECT 1 FROM model_calls") == []


async def test_an_agent_without_the_policy_is_told_nothing(gated: Bench) -> None:
    ticket = await gated.run("import json, os; json.dump(sorted(os.environ), open('output.json', 'w'))")
    assert "ANTHROPIC_BASE_URL" not in json.loads(ticket.outputs or "")


async def test_no_key_is_said_before_a_vm_is_started(gated: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    ticket = await gated.run("", network="gateway", retry=RetryPolicy(max_attempts=5))
    assert ticket.state == "failed"
    assert ticket.error == (
        "the agent 'agent' can't run here: no key for anthropic on this host: set ANTHROPIC_API_KEY in the "
        "environment of the engine, or run `swarm secret set anthropic_api_key` (the VM never gets it: the "
        "gateway adds it)"
    )
    [attempt] = await gated.attempts()
    assert (attempt.vm_id, attempt.reason) == (None, "not_configured")


async def test_over_budget_fails_the_ticket_with_the_sums_and_is_not_tried_again(gated: Bench) -> None:
    """Also when the agent takes no notice and says that it is done."""
    code = PRELUDE + "said = ''\nwhile 'over budget' not in said: said = call('words=100')\ndone({'half': said})"
    agent = await gated.agent(
        code, network="gateway", retry=RetryPolicy(max_attempts=5, delay_seconds=0.01, on=frozenset(FailureReason))
    )
    gated.insert("t", agent.id, budget_usd=0.002)
    ticket = await run_ticket(gated.store, gated.worker, "t")
    assert ticket.state == "failed"
    assert ticket.error is not None
    assert ticket.error.startswith("over budget: ") and "the ticket's budget is $0.002, " in ticket.error
    [attempt] = await gated.attempts()
    assert attempt.reason == "over_budget"
    assert 0.001 < attempt.cost_usd < 0.002
    refused = [e.data for e in await gated.store.events("t") if e.kind == "egress"]
    assert [data["refused"] for data in refused] == ["budget"]
    assert json.loads(ticket.outputs or "{}")["half"].startswith("over budget"), "what it left was paid for"
    await proved(gated)


async def test_over_budget_waits_for_a_higher_one_by_policy(gated: Bench) -> None:
    code = PRELUDE + "done({'text': call('Write a haiku')})"
    agent = await gated.agent(code, network="gateway", over_budget="wait")
    gated.insert("t", agent.id, budget_usd=0.00001)
    running = asyncio.create_task(run_ticket(gated.store, gated.worker, "t", timeout_seconds=60))

    async def waits() -> bool:
        return running.done() or (await gated.store.ticket("t")).state == "waiting"

    await gated.until(waits)
    waiting = await gated.store.ticket("t")
    assert (waiting.error or "").startswith("over budget: the ticket's budget is $0.00001, $0 ")
    assert json.loads(waiting.outputs or "{}")["text"].startswith("over budget"), "what there is, for who decides"
    await proved(gated)

    async def swarm(*words: str) -> str:
        argv = [sys.executable, "-m", "swarm.cli.main", "ticket", *words, "--home", str(gated.settings.home)]
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=300)
        return done.stdout + done.stderr

    assert "main: `swarm ticket approve t`, or reject" in await swarm("show", "t")
    assert "would allow no more" in await swarm("approve", "t", "--by", "ann", "--budget-usd", "0.00001")
    said = await swarm("approve", "t", "--by", "ann", "--budget-usd", "1")
    assert said.startswith("step main is approved; ticket t is in_progress\n")
    ticket = await running
    assert (ticket.state, json.loads(ticket.outputs or "")) == ("done", {"text": HAIKU})
    assert [a.reason for a in await gated.attempts()] == ["over_budget", None]
    await proved(gated)


async def test_an_agent_that_goes_on_over_budget_is_ended(gated: Bench) -> None:
    cast(Any, gated.worker)._engine.over_budget_seconds = 8.0
    code = PRELUDE + "call('Write')\nprint('and on', flush=True)\ntime.sleep(1000)"
    agent = await gated.agent(code, network="gateway")
    gated.insert("t", agent.id, budget_usd=0.00001)
    ticket = await run_ticket(gated.store, gated.worker, "t", timeout_seconds=60)
    assert (ticket.state, (ticket.error or "")[:11]) == ("failed", "over budget")
    assert (ticket.error or "").endswith("  and on")


async def test_what_an_agent_prints_of_its_token_is_not_kept(gated: Bench) -> None:
    code = PRELUDE + "t = os.environ['ANTHROPIC_API_KEY']\nprint(t[:9], end='', flush=True)\ntime.sleep(0.2)\n"
    code += "print(t[9:])\nprint('again ' + t)\ndone({t: ['x' + t]})"
    ticket = await gated.run(code, network="gateway")
    mark = "[the gateway's token]"
    assert json.loads(ticket.outputs or "") == {mark: ["x" + mark]}
    printed = "".join(str(e.data["text"]) for e in await gated.store.events("t") if e.kind == "output")
    assert printed == f"{mark}\nagain {mark}\n"


async def test_an_engine_that_dies_in_the_middle_of_a_call(gated: Bench, api: MessagesApi) -> None:
    """The cost of that call is unknown: its whole reservation counts, so the next attempt is over budget."""
    agent = await gated.agent(PRELUDE + "done(call('scenario=hold'))", network="gateway")
    gated.insert("t", agent.id, budget_usd=0.0007)  # a call may cost $0.0005 and some
    async with engine_process(gated) as engine:
        await asyncio.wait_for(api.held.wait(), 60)
        engine.kill()
        await engine.wait()
    api.release.set()
    await gated.store.shift_clock(3_600_000)
    ticket = await run_ticket(gated.store, gated.worker, "t")
    assert (ticket.state, (ticket.error or "")[:11]) == ("failed", "over budget")
    assert [a.reason for a in await gated.attempts()] == [None, "over_budget"]
    assert gated.sql("SELECT status FROM model_calls") == [(None,)]
    assert sum(one["path"] == "/v1/messages" for one in api.seen) == 1


async def test_a_policy_that_nobody_knows(gated: Bench) -> None:
    """It can only come from a row, and a row can't change what was added."""
    agent = await gated.agent("")
    gated.sql("UPDATE agents SET network = 'everything' WHERE id = ?", agent.id)
    gated.insert("t", agent.id)
    ticket = await run_ticket(gated.store, gated.worker, "t")
    assert ticket.state == "failed" and "its row has another network" in (ticket.error or "")
    with pytest.raises(UsageError, match="the network policy 'everything' is unknown: use none, gateway"):
        policy.parse("everything")
