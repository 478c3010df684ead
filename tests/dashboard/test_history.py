"""Events as lines for people."""

from __future__ import annotations

from swarm.dashboard.history import told
from swarm.model import Event


def test_a_yes_is_no_word_of_a_programming_language() -> None:
    event = Event(ticket_id="t", kind="cleanup", data={"kept": True, "whole": False, "files": 1})
    assert told(event) == "kept yes, whole no, files 1"
