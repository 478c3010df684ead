"""Nothing unprintable reaches a terminal, whichever way text takes: as JSON, in the log, on a line."""

from __future__ import annotations

import contextlib
import io
import json
import unicodedata
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from swarm.base import log
from swarm.base.printable import escaped
from swarm.cli.ui.output import Out, first_line

# One of each kind: C0, DEL, C1 (CSI, NEL), bidi, line and paragraph ends, zero width, a lone surrogate, unassigned.
HOSTILE = "\x00\x1b[2J\x07\r\x7f\x85\x9b2J\u202e\u2066\u2028\u2029\u200b\ufeff\ud800\U000e0001\U0010ffff"
SAFE = "plain é 漢字 🦊 'quoted' \\\\ {[,:]}"


def shown(text: str, *, lines: bool = True) -> None:
    """Fails if any character of it is one that a terminal acts on."""
    odd = {c for c in text if not c.isprintable() and not (lines and c == "\n")}
    assert not odd, [unicodedata.name(c, repr(c)) for c in odd]


@given(st.recursive(st.text(st.characters()) | st.sampled_from(list(HOSTILE)), lambda inner: st.lists(inner)))
def test_escaped_json_is_the_same_value(value: Any) -> None:
    text = escaped(json.dumps(value, ensure_ascii=False))
    shown(text, lines=False)
    assert json.loads(text) == value


def test_what_can_be_shown_is_not_escaped() -> None:
    assert escaped(SAFE) == SAFE
    assert escaped("a\nb\tc\x9b", keep="\n\t") == "a\nb\tc\\u009b"


@pytest.mark.parametrize(
    "print_", ["dump", "dump_line", "line", "text", "json_text", "note", "error", "table", "fields"]
)
def test_every_way_to_print(print_: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, value = Out(), {HOSTILE: [HOSTILE, SAFE]}
    arguments: dict[str, tuple[object, ...]] = {
        "dump": (value,),
        "dump_line": (value,),
        "json_text": (json.dumps(value, ensure_ascii=False),),
        "table": ((HOSTILE,), [(HOSTILE,), (SAFE,)]),
        "fields": ({"name": HOSTILE},),
    }
    getattr(out, print_)(*arguments.get(print_, (HOSTILE,)))
    printed = capsys.readouterr()
    assert len(printed.out + printed.err) >= len(HOSTILE)
    shown(printed.out + printed.err)
    if print_ in ("dump", "dump_line", "json_text"):
        assert json.loads(printed.out) == value


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end_is_shown_as_one(end: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, text = Out(), f"Publish?{end}second{end}third\x1b[2J"
    out.note(text)
    out.error(text)
    out.fields({"asks": text})
    out.text(text)
    out.line(text)
    printed = capsys.readouterr()
    hostile = "third\N{REPLACEMENT CHARACTER}[2J"
    assert printed.err == f"Publish?\n  second\n  {hostile}\nerror: Publish?\n  second\n  {hostile}\n"
    as_fields, as_text = f"asks  Publish?\n      second\n      {hostile}\n", f"Publish?\nsecond\n{hostile}"
    assert printed.out == f"{as_fields}{as_text}Publish? second {hostile}\n"
    assert first_line(f"{end}{text}") == "Publish?"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_log_line_is_one_line(as_json: bool) -> None:
    said = io.StringIO()
    try:
        log.configure(as_json=as_json)
        with contextlib.redirect_stderr(said):
            structlog.get_logger().warning(f"event {HOSTILE}", **{f"key{HOSTILE}": f"a\n{HOSTILE}", "inner": [HOSTILE]})
            log.LINES.finish()
    finally:
        structlog.reset_defaults()
    assert said.getvalue().count("\n") == 1 and said.getvalue().endswith("\n")
    shown(said.getvalue())
    if as_json:
        assert json.loads(said.getvalue())["inner"] == [HOSTILE]


@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_in_the_log_keeps_its_lines(as_json: bool) -> None:
    said = io.StringIO()
    try:
        log.configure(as_json=as_json)
        with contextlib.redirect_stderr(said):
            try:
                raise ValueError(HOSTILE)
            except ValueError:
                structlog.get_logger().error("where", exc_info=True)
            log.LINES.finish()
    finally:
        structlog.reset_defaults()
    shown(said.getvalue())
    assert "Traceback" in said.getvalue() and "test_printable.py" in said.getvalue()
