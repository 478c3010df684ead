"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"  # works, but not fully or not well
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """``detail`` says what was found; ``fix`` is the command that fixes it, '' if nothing is to be fixed."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def ok(name: str, detail: str) -> Check:
    return Check(name=name, status=Status.OK, detail=detail)


def warn(name: str, detail: str, fix: str = "") -> Check:
    return Check(name=name, status=Status.WARN, detail=detail, fix=fix)


def fail(name: str, detail: str, fix: str = "") -> Check:
    return Check(name=name, status=Status.FAIL, detail=detail, fix=fix)
