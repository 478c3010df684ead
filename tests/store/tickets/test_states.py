"""docs/states.md and the code's transition tables say the same."""

from __future__ import annotations

import re
from pathlib import Path

from swarm.model import STEP_TRANSITIONS, TICKET_TRANSITIONS

PAGE = Path(__file__).parents[3] / "docs" / "states.md"


def arrows(section: str) -> set[tuple[str, str]]:
    text = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return {(a, b) for a, b in re.findall(r"^ +(\S+) --> ([^\s:]+)", text, re.MULTILINE) if "[*]" not in (a, b)}


def test_ticket_diagram() -> None:
    assert arrows("Ticket") == {(a, b) for a, after in TICKET_TRANSITIONS.items() for b in after}


def test_step_diagram() -> None:
    assert arrows("Step") == {(a, b) for a, after in STEP_TRANSITIONS.items() for b in after}
