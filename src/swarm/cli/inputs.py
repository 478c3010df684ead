"""Inputs as they are given on a command line: `--inputs` with all of them, `--input NAME=VALUE` for each."""

from __future__ import annotations

import sys
from pathlib import Path

from swarm.base import jsontext
from swarm.errors import UsageError


def inputs_text(inputs: str | None, input_json: Path | None) -> str | None:
    """All inputs, as `read_inputs` takes them, of a command that knows both options."""
    if inputs is not None and input_json is not None:
        raise UsageError("--inputs and --input-json both give all inputs: use one of them")
    return inputs if input_json is None else f"@{input_json}"


def read_inputs(inputs_text: str | None, single: list[str]) -> dict[str, object]:
    """The inputs object from ``--inputs`` and the ``--input``s, the latter winning."""
    result: dict[str, object] = {}
    if inputs_text is not None:
        if inputs_text.startswith("@"):
            try:
                inputs_text = (
                    sys.stdin.read() if inputs_text == "@-" else Path(inputs_text[1:]).read_text(encoding="utf-8")
                )
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"--inputs {inputs_text}: {error}") from None
        try:
            value = jsontext.loads(inputs_text)
        except ValueError as error:
            raise UsageError(f"--inputs is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise UsageError('--inputs must be a JSON object, such as {"name": "world"}')
        result |= value
    for pair in single:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--input {pair!r}: write NAME=VALUE")
        try:
            result[name] = jsontext.loads(text)
        except ValueError:
            result[name] = text
    return result
