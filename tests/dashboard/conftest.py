from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.api.served import Served, serving
from tests.conftest import need
from tests.dashboard.browser import Browser, browser


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path / "home") as served:
        yield served


@pytest.fixture(scope="package")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One for all tests of this directory, and gone before others look at what is left. `Browser.log_in` begins with
    nothing of the test before."""
    need("netns", "browser")
    with browser(tmp_path_factory.mktemp("browser")) as one:
        yield one
