"""Inputs as they are given on a command line: `--inputs` with all of them, `--input NAME=VALUE` for each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from swarm.errors import UsageError


def read_inputs(whole: str | None, single: list[str]) -> dict[str, object]:
    """The inputs object from ``--inputs`` and the ``--input``s, the latter winning."""
    result: dict[str, object] = {}
    if whole is not None:
        if whole.startswith("@"):
            try:
                whole = sys.stdin.read() if whole == "@-" else Path(whole[1:]).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"--inputs {whole}: {error}") from None
        try:
            value = json.loads(whole)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--inputs is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise UsageError('--inputs must be a JSON object, such as {"name": "world"}')
        result |= value
    for pair in single:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--input {pair!r}: write NAME=VALUE")
        try:
            result[name] = json.loads(text)
        except (ValueError, RecursionError):
            result[name] = text
    return result
