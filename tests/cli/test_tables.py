"""How a table finds room: what stays, what is shortened, what leaves; ages; what a terminal counts as wide."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest

from swarm.cli.sandbox import name_and_id
from swarm.cli.ui.table import Column, ago, laid_out, shortened, width_of
from swarm.model import Sandbox, SandboxState

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_names_ids_and_states_are_whole_at_every_width() -> None:
    choose = random.Random(7)
    letters = "abc -日本語é\u0301🙂"
    for _ in range(300):
        columns = [
            Column(
                f"C{number}", drop=choose.choice((0, 0, number + 1)), least=choose.choice((0, 0, 8)),
                right=choose.random() < 0.3,
            )
            for number in range(choose.randint(1, 8))
        ]  # fmt: skip
        rows = [
            ["".join(choose.choices(letters, k=choose.randint(0, 30))).strip() for _ in columns]
            for _ in range(choose.randint(1, 4))
        ]
        room = choose.randint(20, 140)
        lines, gone = laid_out(columns, rows, room)
        heading = [given for _, given in lines[0]]
        assert [c.name for c in columns if not c.drop] == [n for n in heading if not columns[int(n[1:])].drop]
        assert set(gone) <= {c.name for c in columns if c.drop} - set(heading)
        needed = [
            min(least, natural) if (least := c.least) else natural
            for i, c in enumerate(columns)
            if not c.drop and (natural := max(map(width_of, [c.name, *(row[i] for row in rows)]))) >= 0
        ]
        fits = sum(needed) + 2 * (len(needed) - 1) <= room
        for line in lines:
            assert not fits or sum(width_of(text) for text, _ in line) + 2 * (len(line) - 1) <= room
            for (text, given), name in zip(line, heading, strict=True):
                assert columns[int(name[1:])].least or text.strip() == given


@pytest.mark.parametrize("names", [["n" * 40], ["n" * 40, ""]])
def test_a_list_of_what_has_names_and_ids_fits_a_narrow_terminal(names: list[str]) -> None:
    found = [Sandbox(id="i" * 36, name=name or None, state=SandboxState.STARTING) for name in names]
    rows = [[one.name or "", one.id, one.state] for one in found]
    lines, _ = laid_out([*name_and_id(found), Column("STATE")], rows, 60)
    for line in lines[1:]:
        assert sum(width_of(text) for text, _ in line) + 2 * (len(line) - 1) <= 60
        assert any(text == given in (one.name, one.id) for text, given in line for one in found), "whole"


def test_without_an_end_everything_is_whole() -> None:
    columns = [Column("A", drop=1), Column("B", least=8)]
    lines, gone = laid_out(columns, [["a" * 300, "b" * 300]], None)
    assert lines[1] == [("a" * 300, "a" * 300), ("b" * 300, "b" * 300)] and gone == []


def test_what_leaves_for_a_wide_column_comes_back_if_that_leaves_too() -> None:
    columns = [Column("NAME"), Column("SIZE", drop=1), Column("ID", drop=2)]
    lines, gone = laid_out(columns, [["n" * 10, "1 KiB", "i" * 36]], 20)
    assert [given for _, given in lines[0]] == ["NAME", "SIZE"] and gone == ["ID"]


def test_a_column_that_leaves_is_named_only_if_it_says_something() -> None:
    columns = [Column("NAME"), Column("ERROR", drop=1)]
    assert laid_out(columns, [["n" * 20, ""]], 20)[1] == []
    assert laid_out(columns, [["n" * 20, "no"]], 20)[1] == ["ERROR"]


@pytest.mark.parametrize(
    ("text", "cells"), [("", 0), ("abc", 3), ("日本", 4), ("e\u0301", 1), ("🙂", 2), ("\N{REPLACEMENT CHARACTER}", 1)]
)
def test_the_width_of_text(text: str, cells: int) -> None:
    assert width_of(text) == cells
    assert width_of(shortened(text * 20, 7)) <= 7


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "now"), (0.9, "now"), (-0.9, "now"),
        (1, "1 s ago"), (59, "59 s ago"), (60, "1 min ago"), (210, "3 min ago"),
        (3600, "1 h ago"), (86399, "23 h ago"), (86400, "1 day ago"), (59 * 86400, "59 days ago"),
        (61 * 86400, "2025-12-30"), (-150, "in 2 min"), (-5400, "in 1 h"), (-90 * 86400, "2026-05-30"),
    ],
)  # fmt: skip
def test_ages(seconds: float, said: str) -> None:
    at = NOW - timedelta(seconds=seconds)
    assert ago(at.isoformat(timespec="milliseconds").replace("+00:00", "Z"), NOW) == said
    assert ago(at.isoformat(timespec="milliseconds"), NOW) == said  # as older versions wrote it


@pytest.mark.parametrize(
    "text", ["", "disabled", "2026-13-01T00:00:00Z", "2026-03-01", "0001-01-01T00:00:00+14:00", "42"]
)
def test_what_is_no_time_is_left_alone(text: str) -> None:
    assert ago(text, NOW) == text
