"""Options that several commands have, and the values as they are typed: inputs of a ticket."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.base import jsontext
from swarm.errors import UsageError

if TYPE_CHECKING:
    from swarm.model import Agent
    from swarm.store.registry.workflows import WorkflowRow

Inputs = Annotated[
    str | None, typer.Option("--inputs", metavar="JSON|@FILE", help="All inputs, as a JSON object. @- is stdin.")
]
InputJson = Annotated[Path | None, typer.Option("--input-json", metavar="FILE", help="The same as --inputs @FILE.")]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        metavar="NAME=VALUE",
        help="One input. VALUE is text where its schema says so, else JSON or text. @FILE reads it from a file.",
    ),
]
TicketId = Annotated[str, typer.Argument(metavar="ID", help="The ticket's id, or the beginning of a generated one.")]
NewId = Annotated[str | None, typer.Option("--id", metavar="ID", help="Id of the ticket. Default: a new UUID.")]
Require = Annotated[
    list[str] | None,
    typer.Option("--require", metavar="LABEL=VALUE", help="A label that its host must have; can be repeated."),
]
Priority = Annotated[int, typer.Option("--priority", metavar="N", help="Higher runs earlier.")]
Timeout = Annotated[float | None, typer.Option("--timeout", metavar="S", help="Seconds that it may take.", min=0.001)]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, max=10**9, metavar="N", help="At most this many.")]


def required(given: list[str] | None) -> str | None:
    """For a column `requires`. VALUE is true, false or a whole number as JSON has it, else text. Raises UsageError."""
    found = dict[str, object]()
    for pair in given or ():
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--require {pair!r}: write LABEL=VALUE")
        if name in found:
            raise UsageError(f"--require {pair!r}: {name} is there twice, and no host has both")
        try:
            value = jsontext.loads(text)
        except ValueError:
            value = text
        found[name] = value if isinstance(value, bool | int | str) else text
    return json.dumps(found) if found else None


def schema_of(agent: Agent | None, workflow: WorkflowRow | None) -> Mapping[str, Any]:
    """Of the inputs; {} if it says nothing, or is broken."""
    from swarm import schema
    from swarm.errors import StoreError

    found: Any = None
    if workflow is not None:
        with contextlib.suppress(StoreError):  # the ticket will fail, and say why
            found = workflow.parsed().inputs_schema
    elif agent is not None and agent.inputs_schema is not None:
        found = schema.parsed(agent.inputs_schema)
    return found if isinstance(found, Mapping) else {}


def read_inputs(
    inputs: str | None, input_json: Path | None, single: list[str] | None, schema: Mapping[str, Any]
) -> dict[str, object]:
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
        result[name] = _value(name, text, schema)
    return result


def _value(name: str, text: str, schema: Mapping[str, Any]) -> object:
    """As JSON or as text: what fits the schema. If both do, JSON; `1.10` is text only where no number may be."""
    if text.startswith("@@"):
        text = text[1:]
    elif text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
            raise UsageError(f"--input {name}={text}: {why}; @@ stands for an @ at the beginning") from None
    try:
        value = jsontext.loads(text)
    except ValueError:
        return text
    return value if _fits(name, value, schema) or not _fits(name, text, schema) else text


def _fits(name: str, value: object, whole: Mapping[str, Any]) -> bool:
    from swarm import schema

    one = (whole.get("properties") or {}).get(name)
    if one is None:
        return True
    defs = {key: whole[key] for key in ("$defs", "definitions") if key in whole}
    try:
        return not schema.issues({name: value}, schema.text({**defs, "type": "object", "properties": {name: one}}))
    except schema.SchemaError:
        return True
