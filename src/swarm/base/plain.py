"""Values as JSON has them: what the command line prints with --json and what the API answers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any, Final

from swarm.base import jsontext

# Columns that hold JSON as text.
JSON_TEXTS: Final = frozenset(
    {
        "inputs",
        "outputs",
        "trigger_data",
        "verdict",
        "inputs_schema",
        "outputs_schema",
        "definition",
        "requires",
        *("secrets", "env", "labels", "spec"),  # of sandboxes and snapshots
    }
)


def plain(value: object) -> Any:
    """A value as JSON has it: dataclasses as objects, enums by value, paths and addresses as text; and what a row holds
    as JSON text as that JSON, unless it is none: other programs write rows too."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: _parsed(each) if name in JSON_TEXTS else plain(each) for name, each in named}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return str(value) if not isinstance(value, PurePath) else value.as_posix()


def _parsed(value: object) -> Any:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return jsontext.loads(value)
    return plain(value)
