"""One fixture chooses the database (see databases.py); all tests here run on each of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from swarm.store.store import Store
from tests.store.databases import Backend, Outside, SqliteBackend


@pytest.fixture(scope="session", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.needs("postgres"))])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    if request.param == "postgresql":
        yield request.getfixturevalue("postgresql")
        return
    backend = SqliteBackend(tmp_path_factory.mktemp("databases"))
    yield backend
    backend.close()


@pytest.fixture(autouse=True)
def _given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "backend" in request.fixturenames:
        request.getfixturevalue("backend").done()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "sqlite(*cases): only for SQLite, since it is about its files, locks or untyped columns (these cases)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if _is_for_sqlite_alone(item)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def _is_for_sqlite_alone(item: pytest.Item) -> bool:
    _, _, case = item.name.partition("[postgresql")
    marks = list(item.iter_markers("sqlite")) if case else []
    case = case.removeprefix("-").removesuffix("]")
    return any(not mark.args or any(f"{case}-".startswith(f"{one}-") for one in mark.args) for mark in marks)


@pytest.fixture
def url(backend: Backend) -> str:
    return backend.new()


@pytest.fixture
def planning_seconds() -> float:
    """How long decisions may hold the write lock: on a slow machine too, they are made at once. Tests that go both ways
    set it by a parameter."""
    return 60.0


@pytest.fixture
async def store(url: str, planning_seconds: float) -> AsyncIterator[Store]:
    async with Store.open(url, planning_seconds=planning_seconds) as store:
        yield store


@pytest.fixture
def outside(backend: Backend, url: str) -> Iterator[Outside]:
    outside = backend.outside(url)
    yield outside
    outside.close()
