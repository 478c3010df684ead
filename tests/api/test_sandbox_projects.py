"""Sandboxes by the API: who may work in one that starts from a snapshot, and what a project's token leaves."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from swarm.model import Role
from swarm.store.registry.tokens import Actor, new_token
from tests.api.holding import holding
from tests.api.served import ECHO, Served


async def test_a_start_makes_nothing_open_and_its_end_closes_nothing(
    served: Served, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """An agent's secrets are in its sandbox whatever that starts from; and a clean one stays clean when its snapshot
    has gone, as what a fork starts from does."""
    await served.store.put_agent(replace(ECHO, id="keeper", name="keeper", secrets=("KEY",)))
    async with holding(served.store, tmp_path_factory.mktemp("e")):
        path = "/v1/sandboxes"
        await served.operator.post(path, json={"name": "box"})
        clean = {"name": "clean", "without_secrets": True}
        kept = (await served.operator.post(f"{path}/box/snapshot", json=clean)).json()
        assert not kept["secrets"] and kept["expires_at"] is None
        for given in ({"name": "child"}, {"name": "keeps", "agent": "keeper"}):
            made = await served.admin.post(path, json={**given, "snapshot": "clean"})
            assert made.status_code == 201, made.text
        asked: dict[str, Any] = {"argv": ["true"]}
        for gone in (False, True):
            if gone:
                removed = await served.operator.delete(f"/v1/snapshots/{kept['id']}")
                assert removed.status_code == 200, removed.text
            for one, client, status in (
                ("keeps", served.operator, 403), ("keeps", served.admin, 200), ("child", served.operator, 200),
            ):  # fmt: skip
                answer = await client.post(f"{path}/{one}/exec", json=asked)
                assert answer.status_code == status, (gone, one, answer.text)


async def test_a_projects_snapshot_goes_by_itself(served: Served, tmp_path_factory: pytest.TempPathFactory) -> None:
    token = new_token()
    await served.store.add_token(token, Actor(name="team", role=Role.OPERATOR, project_id="p"), by="test")
    bearer = {"authorization": f"Bearer {token}"}
    async with holding(served.store, tmp_path_factory.mktemp("e")):
        await served.nobody.post("/v1/sandboxes", json={"name": "theirs"}, headers=bearer)
        cases: tuple[tuple[dict[str, Any], int], ...] = (({}, 30), ({"keep_seconds": 90 * 86400}, 90))
        for given, days in cases:
            made = await served.nobody.post("/v1/sandboxes/theirs/snapshot", json=given, headers=bearer)
            assert made.status_code == 201, made.text
            left = made.json()["expires_at"] / 1000 - time.time()
            assert (days - 1) * 86400 < left < (days + 1) * 86400
