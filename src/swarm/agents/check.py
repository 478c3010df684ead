"""Check an agent's inputs before its VM starts, and its outputs before its ticket is done. Pure, with bounded cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swarm import schema
from swarm.errors import OutputInvalid, StepError
from swarm.model import Agent, FailureReason


def inputs(agent: Agent, given: Any) -> Any:
    """The inputs with the schema's defaults. Raises StepError (INPUT_INVALID) that names each bad JSON path."""
    if agent.inputs_schema is None:
        return given
    given = schema.with_defaults(given, schema.parsed(agent.inputs_schema))
    if wrong := _wrong(given, agent.inputs_schema):
        raise StepError(
            f"the inputs don't fit the agent {agent.name}@{agent.version}: {wrong}",
            reason=FailureReason.INPUT_INVALID,
            retryable=False,
        )
    return given


def outputs(agent: Agent, made: Any) -> None:
    """Raises OutputInvalid that names each bad JSON path."""
    if agent.outputs_schema is not None and (wrong := _wrong(made, agent.outputs_schema)):
        raise OutputInvalid(f"the agent {agent.name}@{agent.version} left outputs that don't fit its schema: {wrong}")


def _wrong(value: Any, text: str) -> str:
    try:
        return "; ".join(map(str, schema.issues(value, text)))
    except schema.SchemaError as error:  # only in a row that was edited manually
        return f"the schema itself can't be used: {error}"


def differences(expected: Any, actual: Any, path: str = "$") -> list[str]:
    """Where outputs differ from those of an example, by JSON path. Objects may have keys that the example omits."""
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        found = [f"{path}.{key}: is missing" for key in expected if key not in actual]
        for key in expected:
            if key in actual:
                found += differences(expected[key], actual[key], f"{path}.{key}")
        return found
    if isinstance(expected, list) and isinstance(actual, list):
        if len(expected) != len(actual):
            return [f"{path}: has {len(actual)} items, not {len(expected)}"]
        pairs = enumerate(zip(expected, actual, strict=True))
        return [line for i, (one, other) in pairs for line in differences(one, other, f"{path}[{i}]")]
    same = expected == actual and isinstance(expected, bool) == isinstance(actual, bool)
    return [] if same else [f"{path}: is {_short(actual)}, not {_short(expected)}"]


def _short(value: Any) -> str:
    said = schema.text(value)
    return said if len(said) <= 120 else said[:117] + "…"
