"""Options that several commands have, and the values as they are typed: inputs of a ticket, ages and times."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final

import typer

from swarm.base import jsontext
from swarm.errors import UsageError

Inputs = Annotated[
    str | None, typer.Option("--inputs", metavar="JSON|@FILE", help="All inputs, as a JSON object. @- is stdin.")
]
InputJson = Annotated[Path | None, typer.Option("--input-json", metavar="FILE", help="The same as --inputs @FILE.")]
Input = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", metavar="NAME=VALUE", help="One input. VALUE is JSON, or else text."),
]
NewId = Annotated[str | None, typer.Option("--id", metavar="ID", help="Id of the ticket. Default: a new UUID.")]
Priority = Annotated[int, typer.Option("--priority", metavar="N", help="Higher runs earlier.")]
Timeout = Annotated[float | None, typer.Option("--timeout", metavar="S", help="Seconds that it may take.", min=0.001)]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, metavar="N", help="At most this many.")]

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def read_inputs(inputs: str | None, input_json: Path | None, single: list[str] | None) -> dict[str, object]:
    """The inputs given by ``--inputs`` or ``--input-json``, overridden by each ``--input``. Raises UsageError."""
    if inputs is not None and input_json is not None:
        raise UsageError("--inputs and --input-json both give all inputs: use one of them")
    text = inputs if input_json is None else f"@{input_json}"
    result: dict[str, object] = {}
    if text is not None:
        if text.startswith("@"):
            try:
                text = sys.stdin.read() if text == "@-" else Path(text[1:]).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"--inputs {text}: {error}") from None
        try:
            value = jsontext.loads(text)
        except ValueError as error:
            raise UsageError(f"--inputs is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise UsageError('--inputs must be a JSON object, such as {"name": "world"}')
        result |= value
    for pair in single or ():
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--input {pair!r}: write NAME=VALUE")
        try:
            result[name] = jsontext.loads(text)
        except ValueError:
            result[name] = text
    return result


def age_seconds(text: str) -> float:
    """'30d', '12h', '90m', '60s' or '2w' in seconds. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])", text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not an age: write a number and s, m, h, d or w, such as 30d")
    return float(match[1]) * _UNITS[match[2]]


def moment(text: str) -> str:
    """An ISO-8601 time, or an age before now, as the database writes times; '' for ''. Raises UsageError."""
    if not text:
        return ""
    try:
        try:
            at = datetime.fromisoformat(text)
        except ValueError:
            at = datetime.now(UTC) - timedelta(seconds=age_seconds(text))
        at = (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC)
    except (UsageError, OverflowError):
        raise UsageError(f"{text!r} is not a time: write 2026-01-31, 2026-01-31T12:00, or an age such as 7d") from None
    return at.isoformat(timespec="milliseconds")[:-6] + "Z"
