"""What Swarm has told anybody is still true after a power failure, whatever was not flushed by then (power.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.store import power

pytestmark = [pytest.mark.slow, pytest.mark.needs("cc")]  # starts programs, or tries very many cases


def test_what_was_told_survives(tmp_path: Path) -> None:
    found = list(power.cuts(tmp_path, count=40, tickets=15, seed=7))
    assert [wrong for _, _, wrong in found if wrong] == []
    assert max(told for _, told, _ in found) > 40  # something was at stake
