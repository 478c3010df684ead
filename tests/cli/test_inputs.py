"""`--input NAME=VALUE`: what a user types is what the agent gets, by the schema of its inputs. And no path is empty."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from swarm import schema
from swarm.cli import cleanup, engine, main, vm
from swarm.cli.inputs import read_inputs, required
from swarm.errors import UsageError

SCHEMA = schema.expand(
    {
        "text": "string",
        "number": "number",
        "flag": "boolean",
        "list": ["string"],
        "either": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
        "choice": {"enum": ["1", "two"]},
        "maybe": {"type": ["string", "null"]},
        "named": {"$ref": "#/$defs/version"},
    }
) | {"$defs": {"version": {"type": "string"}}}


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("text=1.10", "1.10"), ("text=007", "007"), ("text=true", "true"), ("text=null", "null"), ("text=", ""),
        ("text=[1]", "[1]"), ('text={"a": 1}', '{"a": 1}'), ('text="quoted"', "quoted"), ("text=a=b", "a=b"),
        ("number=1.10", 1.1), ("number=x", "x"), ("flag=true", True), ('list=["a"]', ["a"]), ("either=1.10", "1.10"),
        ("either=true", "true"), ('either=["a"]', ["a"]), ("choice=1", "1"), ("maybe=null", None), ("maybe=3", "3"),
        ("named=1.10", "1.10"), ("unknown=1.10", 1.1), ("unknown=x", "x"), ("text=@@home", "@home"),
    ],
)  # fmt: skip
def test_values(given: str, value: object) -> None:
    found = read_inputs(None, None, [given], SCHEMA)
    assert list(found.values()) == [value] and type(next(iter(found.values()))) is type(value)


def test_without_a_schema_it_is_json_or_text() -> None:
    assert read_inputs(None, None, ["a=1.10", "b=x"], {}) == {"a": 1.1, "b": "x"}


def test_labels_that_are_required() -> None:
    given = ["zone=a", "gpu=true", "spot=false", "rack=7", "v=1.10", "n=007", "none=null", 'text="7"', "list=[1]"]
    values = {"zone": "a", "gpu": True, "spot": False, "rack": 7, "v": "1.10", "n": "007", "none": "null", "text": "7"}
    assert json.loads(required(given) or "") == values | {"list": "[1]"}
    assert required(None) is required([]) is None
    for bad in (["zone"], ["=a"], ["zone=a", "zone=a"]):
        with pytest.raises(UsageError, match="--require"):
            required(bad)


def test_from_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("1.10\n")
    (tmp_path / "list").write_text(json.dumps(["a", "b"]))
    (tmp_path / "binary").write_bytes(b"\xff")
    given = [f"text=@{tmp_path / 'text'}", f"list=@{tmp_path / 'list'}"]
    assert read_inputs(None, None, given, SCHEMA) == {"text": "1.10\n", "list": ["a", "b"]}
    for name in ("binary", "not-there"):
        with pytest.raises(UsageError, match="@@ stands for"):
            read_inputs(None, None, [f"text=@{tmp_path / name}"], SCHEMA)


def _with_paths(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, list[str]]]:
    """Each argument and option that is a path, with a command line that has an empty text for it."""
    for name, below in sorted(getattr(command, "commands", {}).items()):
        yield from _with_paths(below, (*words, name))
    signature = inspect.signature(command.callback)
    for param in command.params:
        annotation = signature.parameters[param.name].annotation if param.name in signature.parameters else None
        if not re.search(r"\bPath\b", repr(annotation).split("typer.models")[0]):
            continue
        options: list[str] = []
        arguments: list[str] = []
        for other in command.params:
            text = "" if other is param else "1"
            if (other is param or other.required) and other.param_type_name == "option":
                options += [max(other.opts, key=len), text]
            elif other is param or other.required:
                arguments.append(text)
        yield " ".join((*words, param.name)), command, [*options, *arguments]


@pytest.mark.parametrize("app", [main.app, engine.app, vm.spawn_ns, cleanup.app], ids=lambda app: app.info.name)
def test_no_path_is_empty(app: typer.Typer) -> None:
    """`put build "$DIR"`, of a variable that is not set, must not send this directory."""
    found = list(_with_paths(typer.main.get_command(app)))
    assert len(found) >= (100 if app is main.app else 1)
    for name, command, args in found:
        with pytest.raises(typer.BadParameter, match=r"is empty|file '' is"):
            command.make_context(name, args)
            pytest.fail(f"{name}: {args}")
