"""Sandboxes whose programs call a model: their budget, their bills, their story."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from swarm.config import Settings
from tests.engine.sandboxing import Desk, run
from tests.gateway.conftest import KEY
from tests.gateway.messages_api import HAIKU, MessagesApi
from tests.gateway.test_tickets import PRELUDE

pytestmark = pytest.mark.slow  # starts programs


@pytest.fixture
async def gated(
    settings: Settings, api: MessagesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Desk]:
    """Sandboxes as plain processes, on a host that has a key."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_BASE_URL", api.url)
    async with Desk.at({**settings.model_dump(), "home": tmp_path / "home", "driver": "process"}) as desk:
        yield desk
        await desk.settled()


async def test_a_budget_stops_its_calls_and_not_the_sandbox(gated: Desk) -> None:
    async with gated.engine() as engine:
        gated.insert("s", network="gateway", budget_tokens=1000)
        await gated.running("s")

        async def call(prompt: str) -> str:
            code = PRELUDE + f"print(call({prompt!r}))"
            done = await run(engine, "s", "/usr/bin/env", "python3", "-c", code)
            assert done.ended.code == 0, done.stderr
            return done.stdout.decode().strip()

        assert await call("Write a haiku") == HAIKU
        answers = [await call("words=80") for _ in range(12)]
        assert "over budget: the sandbox's budget is 1,000 tokens" in answers[-1], answers
        gated.sql("UPDATE sandboxes SET budget_tokens = 100000 WHERE id = 's'")
        assert "over budget" not in await call("Write a haiku"), "a budget that is raised applies at once"
        calls = await gated.told("s", "model_call")
        ((spent, others),) = gated.sql(
            "SELECT sum(tokens), sum(sandbox_id IS NULL OR ticket_id IS NOT NULL) FROM model_calls"
        )
        assert spent and not others and len(calls) == len(gated.sql("SELECT 1 FROM model_calls"))
        assert json.dumps(calls).count("claude-haiku") >= len(calls)
        await engine.end("s", by="test")
