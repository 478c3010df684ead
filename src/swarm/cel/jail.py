"""Runs expressions that could be expensive in a confined process (`swarm.base.confined`); `jail_process` is the code
inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swarm.base.confined import Confined, Stopped
from swarm.cel import evaluate
from swarm.cel.expression import Expression, ExpressionError
from swarm.cel.jail_process import CPU_SECONDS, MEMORY_BYTES


class Jail(Confined):
    """An `Evaluator` for untrusted expressions. Thread-safe. The process starts when first needed."""

    def __init__(self) -> None:
        super().__init__("swarm.cel.jail_process", cpu_seconds=CPU_SECONDS, memory_bytes=MEMORY_BYTES)

    def evaluate(self, expression: Expression, names: Mapping[str, Any]) -> Any:
        return self.allowance().evaluate(expression, names)

    def allowance(self, cpu_seconds: float = 2.0) -> Allowance:
        """An `Evaluator` whose expressions share this much of the jail's CPU time: for one decision of a planner, which
        may have thousands."""
        return Allowance(self, cpu_seconds)

    def value(self, source: str, data: Mapping[str, Any]) -> tuple[Any, float]:
        """The value, and the CPU seconds it took. Raises ExpressionError."""
        try:
            reply, _ = self.ask({"source": source, "data": data})
        except Stopped as error:
            raise ExpressionError(str(error)) from None
        if "error" in reply:
            raise ExpressionError(str(reply["error"]))
        return reply["value"], float(reply["cpu_seconds"])


class Allowance:
    """An `Evaluator` with a limited amount of CPU time. Not thread-safe."""

    def __init__(self, jail: Jail, cpu_seconds: float) -> None:
        self._jail = jail
        self._left = cpu_seconds

    def evaluate(self, expression: Expression, names: Mapping[str, Any]) -> Any:
        done, value, data = evaluate.attempt(expression, names)
        if done:
            return value
        if self._left <= 0:
            raise ExpressionError("the expressions before it used up the CPU time that they share")
        try:
            value, spent = self._jail.value(expression.source, data)
        except ExpressionError:
            self._left -= CPU_SECONDS  # the most it can have used; a failure ends its step, so failures are few
            raise
        self._left -= spent
        return value
