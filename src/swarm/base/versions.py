"""Find the agent or workflow that a reference names: `echo`, `echo@1`, `echo@1.0`, `echo@1.0.0`, or an id."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Protocol, TypeVar


class Released(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...


_R = TypeVar("_R", bound=Released)


def pick(reference: str, among: Iterable[_R]) -> _R | None:
    """The one with that id, else the newest version that matches, else None.

    A pre-release (1.0.0-rc1) is chosen only if it is named, or if nothing else matches.
    """
    found = list(among)
    for one in found:
        if one.id == reference:
            return one
    name, _, wanted = reference.partition("@")
    matching = [one for one in found if one.name == name and _matches(one.version, wanted)]
    return max(matching, key=lambda one: ("-" not in one.version, order(one.version)), default=None)


def did_you_mean(reference: str, names: Iterable[str]) -> str:
    """The end of an error: '; did you mean …?' if one of these is near, else ''. Texts of any length may be given."""
    import difflib

    known = list(itertools.islice(names, 500))
    near = difflib.get_close_matches(reference, known, n=1) if len(reference) <= 80 else []
    return f"; did you mean {near[0]!r}?" if near else ""


def _matches(version: str, wanted: str) -> bool:
    core = version.partition("+")[0]
    return not wanted or wanted in (version, core) or core.startswith(f"{wanted}.")


def order(version: str) -> tuple[object, ...]:
    """A sort key by semantic versioning 2.0.0: numbers sort as numbers, a pre-release before its release."""
    core, _, before = version.partition("+")[0].partition("-")
    numbers = tuple(int(part) if _is_number(part) else 0 for part in core.split("."))
    parts = tuple((0, int(p), "") if _is_number(p) else (1, 0, p) for p in before.split(".")) if before else ()
    return (numbers, not before, parts)


def _is_number(part: str) -> bool:
    return part.isdecimal() and len(part) <= 4000  # Python reads no longer one, and another program may have written it
