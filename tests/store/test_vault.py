"""Secrets of a database that several hosts use: one key opens them all, and no host makes another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from swarm.admin.vault import Vault
from swarm.errors import HostError
from swarm.store.store import Store


async def test_no_host_makes_a_key_beside_the_one_there_is(store: Store, tmp_path: Path) -> None:
    first, second = (Vault(store, key_file=tmp_path / name) for name in ("a.key", "b.key"))
    assert await first.check() == await second.check() == 0
    await first.set("TOKEN", "a value of a secret")
    assert await first.check() == 1
    for work in (second.check, lambda: second.set("OTHER", "another value"), lambda: second.get("TOKEN")):
        with pytest.raises(HostError, match=r"b\.key"):
            await work()
    assert not (tmp_path / "b.key").exists()
    shutil.copy(tmp_path / "a.key", tmp_path / "b.key")
    await second.set("OTHER", "another value")
    assert await first.get("OTHER") == "another value" and await second.check() == 2


async def test_a_key_that_is_none_is_called_so(store: Store, tmp_path: Path) -> None:
    ours = Vault(store, key_file=tmp_path / "a.key")
    await ours.set("TOKEN", "a value of a secret")
    (tmp_path / "a.key").chmod(0o644)
    with pytest.raises(HostError, match="others can read the key"):
        await ours.set("OTHER", "another value")
    (tmp_path / "a.key").chmod(0o600)
    (tmp_path / "a.key").write_text("AAAA")
    with pytest.raises(HostError, match="does not hold a key"):
        await ours.check()


async def test_a_lost_key_is_replaced_once_nothing_is_sealed_with_it(store: Store, tmp_path: Path) -> None:
    key = tmp_path / "a.key"
    ours = Vault(store, key_file=key)
    await ours.set("ONE", "a value of a secret")
    await ours.set("TWO", "another value")
    key.unlink()
    with pytest.raises(HostError, match="none of the 1 secrets here can be opened"):
        await ours.set("ONE", "a new value")
    await ours.remove("TWO")
    await ours.set("ONE", "a new value")
    assert await ours.get("ONE") == "a new value"
