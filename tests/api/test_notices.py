"""Notices: signed, once each, again until they are taken, and never to where they may not go."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Network, ip_address
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from swarm import config
from swarm.api.feed import Feed
from swarm.api.notices import Sender, check_url
from swarm.app import serve
from swarm.errors import UsageError
from swarm.gateway.proxy import EgressRules
from swarm.model import Event, Failed, FailureReason, Succeeded
from swarm.store.registry.notices import position_of
from tests.api.served import Served
from tests.api.test_actions import waiting
from tests.api.test_auth import refused
from tests.api.test_serve import run
from tests.conftest import PATIENCE_SECONDS
from tests.serving import serving

LOOPBACK = (IPv4Network("127.0.0.0/8"),)


class Receiver:
    """``answers``: the next statuses; 204 when there are none left."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, Any], dict[str, str], bytes]] = []
        self.asked = 0
        self.answers: list[int] = []
        self.came = asyncio.Event()

    async def answer(self, request: web.Request) -> web.Response:
        self.asked += 1
        body = await request.read()
        status = self.answers.pop(0) if self.answers else 204
        if status == 204:
            self.got.append((json.loads(body), {name.lower(): text for name, text in request.headers.items()}, body))
            self.came.set()
        headers = {"location": "/elsewhere"} if 300 <= status < 400 else {}
        return web.Response(status=status, headers=headers)

    async def until(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(self.got) < count:
                self.came.clear()
                await self.came.wait()


def sender(served: Served, within: tuple[IPv4Network, ...] = LOOPBACK) -> Sender:
    settings = served.settings.model_copy(update={"notices_private": within})
    return serve.sender(settings, served.store)


@asynccontextmanager
async def sending(served: Served, **more: int) -> AsyncIterator[None]:
    """As the server does, to this host too."""
    async with Feed.of(served.store) as feed:
        task = asyncio.create_task(sender(served).run(feed, **more))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def added(served: Served, url: str, *kinds: str, **more: str) -> tuple[str, str]:
    answer = await served.admin.post("/v1/notices", json={"url": url, "on": list(kinds), **more})
    assert answer.status_code == 201, answer.text
    return answer.json()["notice"]["id"], answer.json()["secret"]


async def end(served: Served, id: str, *, failed: str = "", project: str | None = None) -> None:
    await served.add(id, project_id=project)
    (claim,) = await served.store.claim("w", lease_seconds=60)
    outcome = Failed(reason=FailureReason(failed), message="too bad") if failed else Succeeded(outputs="{}")
    await served.store.finish(claim.attempt_id, outcome, timings={}, vm_time_ms=1)


async def test_who_is_told_what(served: Served) -> None:
    receiver = Receiver()
    await end(served, "before")
    async with serving(receiver.answer) as url:
        id, secret = await added(served, f"{url}/hook?x=1", "ended", "approval", "budget")
        only, _ = await added(served, f"{url}/failed", "failed", project="night")
        assert secret not in (await served.admin.get("/v1/notices")).text
        receiver.answers = [500, 302]  # it is sent again, redirects are not followed
        async with sending(served):
            await end(served, "good")
            await end(served, "bad", failed="agent_failed")
            await end(served, "night", failed="agent_failed", project="night")
            await end(served, "dear", failed="over_budget")
            await waiting(served, "asks", "steps: [{id: a, agent: echo, approval: 'A?'}]")
            await receiver.until(7)
            async with asyncio.timeout(PATIENCE_SECONDS):
                while await served.store.position(position_of(id)) < seq_of(receiver.got, id):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                # Not their errors: the server of this fixture sends too, may not send to this host, and says so.
                while not all(row.sent_at for row in await served.store.notices()):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        told = [(body["event"], body["ticket"]["id"]) for body, _, _ in receiver.got if body["id"].startswith(id)]
        assert told == [
            ("ended", "good"), ("ended", "bad"), ("ended", "night"), ("budget", "dear"), ("ended", "dear"),
            ("approval", "asks"),
        ]  # fmt: skip
        others = [body for body, _, _ in receiver.got if body["id"].startswith(only)]
        assert [(body["event"], body["ticket"]["id"]) for body in others] == [("failed", "night")]
        assert others[0]["ticket"]["error"] == "too bad"
        for body, headers, raw in receiver.got:
            assert headers["idempotency-key"] == body["id"]
            if body["id"].startswith(id):
                signed = hmac.new(secret.encode(), f"{headers['x-swarm-timestamp']}.".encode() + raw, hashlib.sha256)
                assert headers["x-swarm-signature"] == f"sha256={signed.hexdigest()}"
        assert len({body["id"] for body, _, _ in receiver.got}) == len(receiver.got) == 7
        assert receiver.asked == 9, "seven, and two that were not taken"
        # Another server goes on where that one was.
        await end(served, "later")
        async with sending(served):
            await receiver.until(8)
        assert receiver.got[-1][0]["ticket"]["id"] == "later"
        assert (await served.admin.delete(f"/v1/notices/{id}")).status_code == 200
        assert [row["id"] for row in (await served.admin.get("/v1/notices")).json()] == [only]
        assert await served.store.sealed_secrets(["SIGNING_KEY"])


def seq_of(got: list[tuple[dict[str, Any], dict[str, str], bytes]], id: str) -> int:
    """Of the newest event that this notice has told of."""
    return max(int(body["id"].rsplit("-", 1)[1]) for body, _, _ in got if body["id"].startswith(id))


async def test_many_notices_read_what_happens_once(served: Served) -> None:
    receiver = Receiver()
    async with serving(receiver.answer) as url:
        for number in range(20):
            id, _ = await added(served, f"{url}/{number}", "ended")
            await served.store.position(position_of(id))
        await end(served, "first")
        await served.store.append([Event(ticket_id="first", kind="note", data={}) for _ in range(500)])
        await end(served, "last")
        before = served.store.use()["read"]["transactions"]
        async with sending(served, at_once=10):  # without a pause between two reads
            await receiver.until(40)
        assert served.store.use()["read"]["transactions"] - before < 300, "each of 20 notices for itself: 1000"
    assert len({body["id"] for body, _, _ in receiver.got}) == 40


async def test_never_to_where_they_may_not_go(served: Served) -> None:
    receiver = Receiver()
    async with serving(receiver.answer) as url:
        port = url.rsplit(":", 1)[1]
        for place in (
            url,
            f"http://localhost:{port}/",
            f"http://[::ffff:127.0.0.1]:{port}/",
            f"http://2130706433:{port}/",
        ):
            id, _ = await added(served, place, "ended")
            said = (await served.admin.post(f"/v1/notices/{id}/test")).json()
            assert not said["taken"] and "private or special" in said["error"], place
        assert receiver.asked == 0
        # What a name leads to is what counts, when it is connected to.
        notice = await served.store.notice(id)
        for address in ("169.254.169.254", "10.0.0.1", "192.168.0.1", "::1", "fe80::1", "100.64.0.1", "0.0.0.0"):

            async def leads(host: str, port: int, to: str = address) -> list[Any]:
                return [ip_address(to)]

            rules = EgressRules(resolve=leads)
            why = await Sender(store=served.store, vault=sender(served).vault, rules=rules).test(notice)
            assert "special address" in why or "of this host" in why, (address, why)
        assert await sender(served).test(notice) == "" and receiver.asked == 1


async def test_what_is_refused(served: Served) -> None:
    for url in ("ftp://x", "http://", "https://u:p@x/", "http://x y/", "http://x:99999/", "javascript:1", "http://ü/"):
        refused(await served.admin.post("/v1/notices", json={"url": url, "on": ["ended"]}), 400, "http")
        with pytest.raises(UsageError):
            check_url(url)
    refused(await served.admin.post("/v1/notices", json={"url": "http://x", "on": ["all"]}), 400, "on")
    refused(await served.admin.delete("/v1/notices/none"), 404, "no notice")
    assert (await served.operator.get("/v1/notices")).status_code == 403


async def test_the_commands(served: Served, tmp_path: Path) -> None:
    receiver = Receiver()
    settings = config.load(home=served.settings.home)
    async with serving(receiver.answer) as url:
        status, said = await run(settings, "notice", "add", url, "--on", "ended", "--on", "failed")
        named, warned, secret = said.splitlines()
        (row,) = await served.store.notices()
        assert status == 0 and len(secret) == 64 and named == f"notice {row.id}"
        assert "127.0.0.1 is a private or special address; SWARM_NOTICES_PRIVATE names" in warned
        assert row.kinds == ("ended", "failed")
        status, said = await run(settings, "notice", "list")
        assert status == 0 and "ended, failed" in said and secret.strip() not in said
        status, said = await run(settings, "notice", "test", row.id, SWARM_NOTICES_PRIVATE='["127.0.0.0/8"]')
        assert status == 0 and receiver.got[0][0]["event"] == "test"
        assert (await run(settings, "notice", "rm", row.id))[0] == 0
        assert await served.store.notices() == []
