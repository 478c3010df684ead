"""The agent claude-code as a user has it: Claude Code in a VM, through the gateway, with a scripted model behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swarm import config
from swarm.app import setup, wiring
from swarm.config import Settings
from swarm.engine import engine
from swarm.engine.run_once import run_ticket
from swarm.vm.driver import Image
from tests.agents import claude_code_here
from tests.agents.scripted_api import Answer, ScriptedApi
from tests.conftest import missing
from tests.engine.conftest import Bench
from tests.gateway.conftest import KEY

pytestmark = pytest.mark.needs("qemu")

# All that a task may need is there, and the program lacks no library.
LOOK = """id -un; for one in git rg gcc make patch less ps pip3; do command -v $one; done
ldd /usr/local/lib/python3*/dist-packages/claude_agent_sdk/_bundled/claude | grep 'not found'
echo 'int main() { return 0; }' > /tmp/x.c && gcc -o /tmp/x /tmp/x.c && /tmp/x && echo compiles"""
EDIT = "echo two >> a.txt; mkdir locked; echo x > locked/x; chmod 000 locked/x locked"


def bash(command: str, **more: object) -> Answer:
    return {"text": "Next.", "calls": [{"name": "Bash", "input": {"command": command}}], **more}


async def test_claude_code_in_a_vm(
    settings: Settings, image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works, costs what is booked, and leaves its work when the budget ends it."""
    if lacks := await claude_code_here.guest_lacks(settings, image):
        missing("claude-code", lacks)
    script = [bash(LOOK), bash(EDIT), {"text": "All done."}, bash(EDIT, input_tokens=99_000), {"text": "Never."}]
    async with ScriptedApi(script, key=KEY).serving() as api:
        monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
        monkeypatch.setenv("ANTHROPIC_BASE_URL", api.url)
        monkeypatch.setattr(engine, "_OVER_BUDGET_SECONDS", 600.0)  # emulated, beside others, it takes its time to end
        own = config.load(**{**settings.model_dump(), "home": tmp_path / "home", "templates_dir": settings.templates})
        await setup.init(own, image=False)
        async with wiring.store(own) as store, wiring.worker(own, store) as worker:
            bench = Bench(settings=own, store=store, worker=worker, dir=tmp_path)
            agent = await store.agent("claude-code")
            inputs = json.dumps({"files": {"a.txt": "one\n"}})
            bench.insert("t", agent.id, description="Do it.", inputs=inputs, budget_usd=5)
            ticket = await run_ticket(store, worker, "t")
            bench.insert("u", agent.id, description="Do it.", inputs=inputs, budget_usd=0.2)
            poor = await run_ticket(store, worker, "u")
            printed = [e for e in await store.events("t") if e.kind == "output"]
            refused = [e.data for one in "tu" for e in await store.events(one) if e.kind == "egress"]
            [attempt], [last] = await bench.attempts("t"), await bench.attempts("u")
    out = json.loads(ticket.outputs or "{}")
    assert ticket.state == "done" and out["finished"] and out["text"] == "All done.", ticket.error or out
    # The gateway itself has prompts counted, for the budget.
    assert set(api.others) <= {"POST /v1/messages/count_tokens"}, "calls of the model, and no other traffic"
    looked = json.dumps(api.seen[1]["messages"])
    for name in ("agent", "/usr/bin/git", "/usr/bin/rg", "/usr/bin/gcc", "/usr/bin/make", "compiles", "/usr/bin/pip3"):
        assert name in looked, name
    assert "not found" not in json.dumps(api.seen[1]["messages"][-1])
    changes = {change["path"]: change["status"] for change in out["changes"]}
    assert changes == {"a.txt": "changed", "locked/x": "added"} and out["left_out"] == []
    assert len(printed) > 3 and printed[0].at < printed[-1].at, "while it works"

    assert poor.state == "failed" and (poor.error or "").startswith("over budget: the ticket's budget is $0.2")
    half = json.loads(poor.outputs or "{}")
    assert (half["finished"], half["stop_reason"]) == (False, "budget") and "+two" in half["diff"]
    assert [data.get("refused") for data in refused] == ["budget"]
    assert attempt.cost_usd == pytest.approx(out["cost_usd"], abs=1e-6), "as Claude Code counts"
    assert last.cost_usd == pytest.approx(half["cost_usd"], abs=1e-6)
