"""What files and settings from users have in common: names, versions, bounded numbers, and pydantic's errors in our
words, which quote no pattern and no class."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Annotated, Any, Final, get_args

import pydantic
from pydantic import BaseModel, Field, StrictBool, StrictInt, StringConstraints

from swarm.model import BOUNDS, RetryPolicy

NAME: Final = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
VERSION: Final = r"^\d{1,9}\.\d{1,9}\.\d{1,9}([-+][0-9A-Za-z.-]{1,40})?$"
LABEL: Final = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}$"
VARIABLE: Final = r"^[A-Za-z_][A-Za-z0-9_]{0,127}$"
NO_NUL: Final = r"^[^\x00]*$"
MODULE: Final = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"
DOMAIN: Final = r"^(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,63}$"
SERVICE: Final = r"^[a-z][a-z0-9_-]{0,62}$"
STEP: Final = r"^[A-Za-z_][A-Za-z0-9_-]{0,63}$"
REFERENCE: Final = r"^[A-Za-z0-9][A-Za-z0-9.+-]{0,80}(@[0-9A-Za-z.+-]{1,60})?$"
HEADER: Final = r"^[A-Za-z][A-Za-z0-9-]{0,63}$"
PRICED: Final = r"^[a-z0-9_.]+=[a-z0-9_-]+$"
_PORT: Final = r"([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
HOST_PORT: Final = rf"^(([A-Za-z0-9.-]{{1,253}}|\[[0-9a-fA-F:.]{{2,45}}\]):{_PORT})?$"
PATH: Final = r"^(/[A-Za-z0-9._~/-]+)?$"
# Packages that an agent may require: pinned for PyPI, and never an option, a path or an address for pip or apt.
REQUIREMENT: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,100}(\[[A-Za-z0-9,._-]{1,100}\])?==[0-9][0-9A-Za-z.+!_-]{0,60}$"
NPM_PACKAGE: Final = (
    r"^(@[a-z0-9][a-z0-9._-]{0,100}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,100}"
    r"@[0-9]{1,9}\.[0-9]{1,9}\.[0-9]{1,9}([-+][0-9A-Za-z.+-]{1,60})?$"
)
DEBIAN_PACKAGE: Final = r"^[a-z0-9][a-z0-9+.-]{1,80}(=[0-9][0-9A-Za-z.+:~-]{0,60})?$"
# Each pattern in words, as "must be …". Error messages show these, never the pattern.
IN_WORDS: Final = {
    NAME: "lower-case letters, digits and inner hyphens, at most 63",
    VERSION: "a version such as 1.2.3 or 1.2.3-rc1",
    LABEL: "letters, digits, '_', '.' and '-', at most 63, with a letter, a digit or '_' first",
    VARIABLE: "letters, digits and underscores, at most 128, with no digit first",
    NO_NUL: "text without NUL characters",
    MODULE: "the name of a Python module, such as urllib.request",
    DOMAIN: "a domain such as api.example.com, or *.example.com for all below it",
    SERVICE: "lower-case letters, digits, hyphens and underscores, at most 63, with a letter first",
    REQUIREMENT: "a PyPI package with its exact version, such as requests==2.32.3",
    STEP: "letters, digits, underscores and hyphens, at most 64, with a letter or an underscore first",
    REFERENCE: "a name, or NAME@VERSION",
    HEADER: "the name of an HTTP header, such as X-Event",
    PRICED: "NAME=VALUE in lower case, such as speed=fast",
    HOST_PORT: "an address with a port, such as 192.168.7.5:7717, or nothing",
    PATH: "a path such as /v1/count, or nothing",
    NPM_PACKAGE: "an npm package with its exact version, such as cowsay@1.6.0",
    DEBIAN_PACKAGE: "a Debian package such as git, or with its version, nodejs=18.19.0+dfsg-6",
}


def no_domain(text: str) -> str:
    """Why this can't be in a network policy's `allow`, and what to write instead; '' if it can."""
    if re.fullmatch(DOMAIN.removesuffix("$"), text):
        return ""
    shown, bare = text[:80], text.removeprefix("*.").strip("[]")
    if re.fullmatch(DOMAIN.removesuffix("$"), text.lower().rstrip(".")):
        return f"{shown!r}: write it as {text.lower().rstrip('.')!r}"
    if re.fullmatch(r"[0-9.]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*", bare):
        return f"{shown!r} is an address: agents reach hosts by name; `network: open` allows every public address"
    if "://" in text or "/" in text:
        return f"{shown!r} is a URL: only its host belongs here, such as api.example.com"
    if re.fullmatch(r"[^:]+:[0-9]+", text):
        return f"{shown!r} has a port: only the host's name belongs here"
    if "." not in bare:
        return f"{shown!r} has one label only: give the full name, such as api.example.com"
    return f"{shown!r} is no domain: give {IN_WORDS[DOMAIN].removeprefix('a domain ')}"


MAX_LABELS: Final = 8
MOST_NUMBER: Final = 2**53
Name = Annotated[str, StringConstraints(pattern=NAME)]
Version = Annotated[str, StringConstraints(pattern=VERSION)]
_Label = Annotated[str, StringConstraints(strict=True, pattern=LABEL)]
_Whole = Annotated[StrictInt, Field(ge=-MOST_NUMBER, le=MOST_NUMBER)]
# Of a host, or what is required of one.
Labels = Annotated[dict[_Label, StrictBool | _Whole | _Label], Field(max_length=MAX_LABELS)]
# The name of an environment variable, or of a secret, which becomes one.
Variable = Annotated[str, StringConstraints(pattern=VARIABLE)]


def bounded(name: str, default: Any = ..., **more: Any) -> Any:
    """A pydantic field for the number ``name``, within the bounds that apply to it everywhere."""
    least, most = BOUNDS[name]
    return Field(default=default, ge=least, le=most, **more)


class RetryFields(BaseModel):
    """The numbers of a `retry:` block."""

    max_attempts: int = bounded("max_attempts", RetryPolicy().max_attempts)
    delay_seconds: float = bounded("delay_seconds", RetryPolicy().delay_seconds)
    factor: float = bounded("factor", RetryPolicy().factor)
    max_delay_seconds: float = bounded("max_delay_seconds", RetryPolicy().max_delay_seconds)


_TOLD: Final = 20  # errors of one value: a field that doesn't exist is compared with all that do
_NAME_CHARS: Final = 100

# --- pydantic's errors in our words -----------------------------------------------------------------------------------

_KINDS: Final = {
    "string": "text", "int": "a whole number", "float": "a number", "finite": "a number", "bool": "true or false",
    "tuple": "a list", "list": "a list", "dict": "a mapping", "model": "a mapping", "uuid": "a UUID",
    "path": "a path", "ip": "a network such as 192.168.7.0/24",
}  # fmt: skip


def place(value: Any, loc: Sequence[str | int]) -> tuple[str | int, ...]:
    """The path of an error in the file's value: pydantic's ``loc`` without the names of union branches."""
    path: list[str | int] = []
    for part in loc:
        known = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
        if part in known:
            value = value[part]
            path.append(part)
    return tuple(path)


def complaint(errors: Sequence[Any]) -> str:
    """The errors that pydantic has with one value (one for each branch of a union), as one phrase: "must be …"."""
    own = [str(one["msg"]).removeprefix("Value error, ") for one in errors if one["type"] == "value_error"]
    if own:
        return "; ".join(own)
    given, kinds = errors[0]["input"], {one["type"] for one in errors}
    wanted = f"must be {', or '.join(dict.fromkeys(map(_wanted, errors)))}"
    if not isinstance(given, str | int | float | bool):
        return wanted
    if isinstance(given, int | float) and not isinstance(given, bool) and errors[0]["type"] == "string_type":
        return f"{wanted}, but is the number {given}: put it in quotes"
    shown = json.dumps(given, ensure_ascii=False)[:80]
    hint = f": write [{shown}]" if isinstance(given, str) and kinds & {"tuple_type", "list_type"} else ""
    return f"{wanted}, but is {shown}{hint}"


def unknown(name: str, known: Iterable[str], *, page: str = "") -> str:
    """What to say of a field that doesn't exist: the nearest that does, or all, or the page that lists them."""
    names = sorted(set(known) - {name})
    near = difflib.get_close_matches(name[:_NAME_CHARS], names, n=1)
    if near:
        return f"unknown field; did you mean {near[0]!r}?"
    return f"unknown field; {page} lists all" if page else f"unknown field; there are {', '.join(names)}"


def sentence(error: pydantic.ValidationError, model: type[BaseModel]) -> str:
    """The errors of a value that has no lines, such as a table in TOML: each with its key, and at most `_TOLD`."""
    found: dict[str, list[Any]] = {}
    for one in error.errors(include_url=False):
        found.setdefault(".".join(map(str, one["loc"])), []).append(one)
    told = [f"{where[:200]}: {_sentence(errors, model)}" for where, errors in islice(found.items(), _TOLD)]
    more = [f"and {len(found) - _TOLD:,} more"] if len(found) > _TOLD else []
    return "; ".join(one.removeprefix(": ") for one in (*told, *more))


def _sentence(errors: list[Any], model: type[BaseModel]) -> str:
    match errors[0]["type"]:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            return unknown(str(errors[0]["loc"][-1]), _names(model, errors[0]["loc"]))
    return complaint(errors)


def _names(model: type[BaseModel], loc: Sequence[str | int]) -> set[str]:
    """The fields at the place of an error: of the model that is nested there."""
    for part in loc[:-1]:
        inner = model.model_fields.get(str(part))
        inside = _classes(inner.annotation) if inner else [model]
        model = inside[0] if inside else model
    return set(model.model_fields)


def _classes(annotation: Any) -> list[type[BaseModel]]:
    """The models in ``dict[str, Model]``, ``Model | None`` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [one for part in get_args(annotation) for one in _classes(part)]


def _wanted(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    name = next((str(part) for part in reversed(error["loc"]) if part in BOUNDS), "")
    if kind == "string_pattern_mismatch":
        return IN_WORDS.get(context["pattern"], "text of another form")
    if kind in ("literal_error", "enum"):
        return str(context["expected"])
    if kind == "string_too_long":
        return f"text of at most {context['max_length']} characters"
    if kind == "too_long":
        return f"a list of at most {context['max_length']} items"
    if kind in ("string_too_short", "too_short"):
        assert context["min_length"] == 1
        return "text that isn't empty" if kind == "string_too_short" else "a list that isn't empty"
    if name and kind.partition("_")[0] in ("int", "float", "finite", "greater", "less"):
        least, most = BOUNDS[name]
        whole = "whole " if isinstance(least, int) and isinstance(most, int) else ""
        return f"a {whole}number from {least:,.16g} to {most:,.16g}"
    for bound, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
        if bound in context:
            return f"{words} {context[bound]:,.16g}"
    return _KINDS.get(kind.partition("_")[0], "of another kind")


def reason(error: Exception) -> str:
    """Why a file in TOML can't be read, with advice for what is often meant."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8"
    said = str(error)
    advice = '; texts need quotes, as in NAME = "VALUE"' if said.startswith("Invalid value") else ""
    return f"it is not TOML: {said[:1].lower()}{said[1:]}{advice}"
