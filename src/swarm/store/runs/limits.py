"""What one decision may cost, by where it is made: under the write lock, on a thread, or in a process of its own."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from swarm.base import jsontext
from swarm.cel import evaluate
from swarm.cel.evaluate import Evaluator
from swarm.cel.expression import Expression
from swarm.cel.jail import Jail


class TooExpensive(Exception):
    """Must not be done here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one decision may read, evaluate and make; for more, TooExpensive is raised.

    ``locked``: the write lock is held. Then no artifact is read, no workflow is prepared, and the jail isn't used.
    """

    locked: bool = False
    context_bytes: int = sys.maxsize  # JSON of the run's inputs that is read
    data_bytes: int = sys.maxsize  # of its steps and artifacts
    steps: int = sys.maxsize  # that are read; and entries of a list, which may become one's items
    items: int = sys.maxsize  # of fan-outs that begin
    expressions: int = sys.maxsize
    value_bytes: int = sys.maxsize  # JSON of all that they give
    cpu_seconds: float = math.inf  # of this thread, from the first of them until the last begins


IN_TRANSACTION: Final = Limits(
    locked=True,
    context_bytes=64 << 10,
    data_bytes=64 << 10,
    steps=1000,
    items=100,
    expressions=500,
    value_bytes=1 << 20,
)
# While one thread of the engine reads JSON, its other threads wait.
ON_THREAD: Final = replace(IN_TRANSACTION, locked=False, context_bytes=2 << 20, items=1000, cpu_seconds=0.1)
IN_PROCESS: Final = Limits()


def evaluator(limits: Limits, jail: Jail | None) -> Evaluator:
    """For one decision. ``jail``: for expressions that aren't cheap; None: they are too expensive."""
    allowance = jail.allowance() if jail is not None else None
    return allowance if allowance is not None and limits is IN_PROCESS else _Limited(limits, allowance)


class _Limited:
    def __init__(self, limits: Limits, jail: Evaluator | None) -> None:
        self._expressions, self._bytes, self._entries = limits.expressions, limits.value_bytes, limits.steps
        self._seconds, self._until, self._jail = limits.cpu_seconds, math.inf, jail

    def evaluate(self, expression: Expression, names: Mapping[str, Any]) -> Any:
        self._expressions -= 1
        now = time.thread_time()
        self._until = min(self._until, now + self._seconds)
        if self._expressions < 0 or now > self._until:
            raise TooExpensive
        value = self._value(expression, names)
        if isinstance(value, list) and len(value) > self._entries:
            raise TooExpensive
        if isinstance(value, str | dict | list):
            self._bytes -= len(value) if isinstance(value, str) else len(jsontext.dumps(value))
            if self._bytes < 0:
                raise TooExpensive
        return value

    def _value(self, expression: Expression, names: Mapping[str, Any]) -> Any:
        if self._jail is not None:
            return self._jail.evaluate(expression, names)
        if not (expression.plain or expression.cheap):
            raise TooExpensive
        done, value, _ = evaluate.attempt(expression, names)
        if not done:
            raise TooExpensive
        return value
