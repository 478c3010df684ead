"""Every store of these tests is audited when its test has ended."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from swarm.store.store import Store
from tests.store.databases import Outside
from tests.store.runs.workflows import proved


@pytest.fixture
async def store(store: Store, outside: Outside) -> AsyncIterator[Store]:
    yield store
    await proved(store, outside)
