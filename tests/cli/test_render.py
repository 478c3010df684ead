"""What the commands print of rows."""

from __future__ import annotations

import pytest

from swarm.cli.ui import render
from swarm.cli.ui.output import Out


def test_a_lost_attempt_has_no_total(capsys: pytest.CaptureFixture[str]) -> None:
    render.show_timings(Out(), {})
    assert capsys.readouterr().out == ""
    render.show_timings(Out(), {"boot": 300.0, "total": 300.0})
    assert "boot" in capsys.readouterr().out
