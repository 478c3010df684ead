"""The real API, when a person sets a key and enables it; it costs a fraction of a cent, and needs a way out:

SWARM_TEST_LIVE=1 ANTHROPIC_API_KEY=… .venv/bin/python -m pytest tests/gateway/test_live.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swarm.gateway import upstreams
from swarm.gateway.policy import Policy
from swarm.gateway.upstreams import Services, UpstreamKeys
from swarm.ledger import Limit
from swarm.store.store import Store
from tests.gateway.conftest import Harness, WatchedLedger, ask, client_of, open_gateways
from tests.gateway.messages_api import MessagesApi

pytestmark = pytest.mark.skipif(
    not (os.environ.get("SWARM_TEST_LIVE") and os.environ.get("ANTHROPIC_API_KEY")),
    reason="calls the real API, for money: set SWARM_TEST_LIVE=1 and ANTHROPIC_API_KEY, outside the sandbox",
)


async def test_a_real_call_is_what_it_was_booked_as(tmp_path: Path) -> None:
    async with Store.open(f"sqlite:///{tmp_path / 'swarm.db'}") as store:
        await store.migrate()
        services = Services(upstreams=upstreams.load(None, os.environ), keys=UpstreamKeys())
        async with open_gateways(store, Limit(usd=0.05)) as (gateway, here):
            harness = Harness(
                store=store,
                ledger=WatchedLedger(store),
                database=tmp_path / "swarm.db",
                api=MessagesApi(key=""),
                services=services,
                gateway=gateway,
                here=here,
                dir=tmp_path,
            )
            async with (
                harness.listener(await harness.claim(), Policy(upstreams=("anthropic",))) as listener,
                client_of(listener) as client,
            ):
                async with client.messages.stream(**ask("Say hello.", max_tokens=20)) as stream:
                    message = await stream.get_final_message()
                [(status, tokens, cost, note)] = await harness.booked(1)
    assert (status, tokens, note) == (200, message.usage.input_tokens + message.usage.output_tokens, None)
    assert 0 < cost < 0.01
