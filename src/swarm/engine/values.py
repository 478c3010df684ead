"""What an agent is given and what it leaves: JSON that may be large, hostile, or both.

Small values are read where they are. Large ones are read in a confined process (this module run as a program): in a
thread, Python's one lock would still make every other ticket wait.
"""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

from swarm.agents import check
from swarm.base import confined, jsontext, priority
from swarm.base.confined import Confined, Stopped
from swarm.base.redact import Redactor
from swarm.engine import files
from swarm.errors import OutputInvalid, StepError
from swarm.model import FILES, Agent, Claim, FailureReason
from swarm.store.tickets import validation
from swarm.store.tickets.validation import BadRow

OUTPUT_FILE: Final = "output.json"
# Up to this size a value is read here: even one of small things takes less than 5 ms.
SMALL_BYTES: Final = 64 << 10
# Values up to this size never wait for larger ones: there are two processes.
_MEDIUM_BYTES: Final = 1 << 20
CPU_SECONDS: Final = 20.0
MEMORY_BYTES: Final = 2 << 30
_PATIENCE_SECONDS: Final = 600.0  # on a host whose VMs take all CPUs


class Values:
    """``async with`` ends the processes, which start when they are first needed."""

    def __init__(self) -> None:
        self._processes = [
            Confined(
                "swarm.engine.values",
                cpu_seconds=CPU_SECONDS,
                memory_bytes=MEMORY_BYTES,
                lower_by=priority.BELOW_VMS,
                patience_seconds=_PATIENCE_SECONDS,
            )
            for _ in range(2)
        ]
        self._turns = [asyncio.Lock() for _ in self._processes]  # fair, and one thread for each process at most

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        for process in self._processes:
            await asyncio.to_thread(process.close)

    @property
    def pids(self) -> list[int]:
        """Of the processes that run now."""
        return [process.pid for process in self._processes if process.pid is not None]

    async def input_json(self, claim: Claim) -> tuple[bytes, dict[str, str]]:
        """The agent's input.json, and the files that it is given (`files.places`). Raises StepError (INPUT_INVALID)."""
        size = len(claim.inputs) + len(claim.ticket.description or "")
        if size <= SMALL_BYTES:
            given, places = input_json(claim)
        else:
            given, places = await self._ask_for_input(size, claim)
        return given, json.loads(places)

    async def fault(self, inputs: str) -> str | None:
        """What is wrong with a ticket's inputs, whatever its agent; None if they can be read."""
        try:
            await self._ask(len(inputs), "read", inputs)
        except Stopped as error:
            return _unreadable(len(inputs), error)
        except StepError as error:
            return str(error)
        return None

    async def _ask_for_input(self, size: int, claim: Claim) -> list[bytes]:
        try:
            return await self._ask(size, "input_json", claim)
        except Stopped as error:
            raise _invalid(_unreadable(size, error)) from None

    async def outputs(
        self,
        agent: Agent,
        made: bytes,
        secrets: Mapping[str, str],
        limit_bytes: int,
        trees: Mapping[str, str] | None = None,
    ) -> str:
        """What the agent left, as it is stored. ``trees``: its files, by place. Raises OutputInvalid."""
        given = (agent, made, secrets, limit_bytes, trees)
        if len(made) <= SMALL_BYTES:
            return outputs(*given)[0].decode()
        try:
            return (await self._ask(len(made), "outputs", *given))[0].decode()
        except Stopped as error:
            raise OutputInvalid(f"{OUTPUT_FILE}, of {len(made):,} bytes, can't be read: that {error}") from None

    async def _ask(self, size: int, task: str, *arguments: Any) -> list[bytes]:
        number = 0 if size <= _MEDIUM_BYTES else 1
        async with self._turns[number]:
            reply, parts = await asyncio.to_thread(_ask, self._processes[number], task, arguments)
        if error := reply.get("error"):
            raise StepError(error["message"], reason=FailureReason(error["reason"]), retryable=error["retryable"])
        return parts


def _ask(process: Confined, task: str, arguments: Sequence[Any]) -> confined.Message:
    return process.ask({"task": task}, [pickle.dumps(arguments)])


def _unreadable(size: int, error: Stopped) -> str:
    return f"its inputs, of {size:,} characters, can't be read: that {error}"


def _invalid(message: str) -> StepError:
    return StepError(message, reason=FailureReason.INPUT_INVALID, retryable=False)


def read(text: str) -> dict[str, Any]:
    """A ticket's inputs. Raises StepError (INPUT_INVALID)."""
    try:
        return validation.parsed_inputs(text)
    except BadRow as error:
        raise _invalid(str(error)) from None


def input_json(claim: Claim, inputs: dict[str, Any] | None = None) -> list[bytes]:
    """The agent's input.json, and its files as JSON. ``inputs``: if they were read before. Raises StepError
    (INPUT_INVALID)."""
    ticket = claim.ticket
    inputs = read(claim.inputs) if inputs is None else inputs
    places = files.places(inputs)
    document = {
        "inputs": check.inputs(claim.agent, inputs),
        "ticket": {
            "id": ticket.id,
            "title": ticket.title,
            "description": ticket.description,
            "project_id": ticket.project_id,
        },
        "step": {"id": claim.step_id, "attempt": claim.attempt_number, "timeout_seconds": claim.timeout_seconds},
    }
    # ASCII: every text arrives unchanged, even a lone surrogate
    return [json.dumps(document).encode(), json.dumps(places).encode()]


def outputs(
    agent: Agent, made: bytes, secrets: Mapping[str, str], limit_bytes: int, trees: Mapping[str, str] | None
) -> list[bytes]:
    """An agent's output.json, as it is stored. Raises OutputInvalid."""
    value, text = _canonical(made)
    if isinstance(value, dict) and FILES in value:  # only the engine writes it
        del value[FILES]
        text = _compact(value)
    redactor = Redactor(secrets)
    if redactor and (clean := redactor.value(value)) != value:
        value, text = clean, _compact(clean)
    if len(text) > limit_bytes:  # 1e15 becomes 1000000000000000.0, and a secret its mark
        message = f"{OUTPUT_FILE} takes {len(text)} bytes as it is stored; the limit is {limit_bytes}"
        raise OutputInvalid(message, reason=FailureReason.OUTPUT_TOO_LARGE)
    check.outputs(agent, value)
    if trees and isinstance(value, dict):
        text = _compact({**value, FILES: dict(trees)})
    return [text]


def _canonical(data: bytes) -> tuple[Any, bytes]:
    """An agent's output.json, and the same as compact JSON text. Raises OutputInvalid."""
    if data.count(b"{") + data.count(b"[") > jsontext.MAX_CONTAINERS:
        raise OutputInvalid(f"{OUTPUT_FILE} has more than {jsontext.MAX_CONTAINERS:,} objects and lists")
    try:
        value = jsontext.loads(data.decode())
        return value, _compact(value)
    except UnicodeDecodeError as error:
        raise OutputInvalid(f"{OUTPUT_FILE} is not UTF-8: {error}") from None
    except jsontext.TooDeep as error:
        raise OutputInvalid(f"{OUTPUT_FILE} is {error}") from None
    except ValueError as error:
        raise OutputInvalid(f"{OUTPUT_FILE} is not JSON: {error}") from None


def _compact(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:
        # A lone surrogate ("\\ud800") is valid JSON, but databases refuse it as text, so it stays escaped.
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


# --- in the confined process ------------------------------------------------------------------------------------------


class _Answers:
    """Keeps what `fault` has read for the attempt that most likely follows, until something else is asked."""

    def __init__(self) -> None:
        self._read: tuple[str, dict[str, Any]] | None = None

    def to(self, task: str, arguments: tuple[Any, ...]) -> list[bytes]:
        kept, self._read = self._read, None
        if task == "input_json" and kept is not None and kept[0] == arguments[0].inputs:
            return input_json(arguments[0], kept[1])
        del kept  # its memory is needed
        if task == "input_json":
            return input_json(*arguments)
        if task == "outputs":
            return outputs(*arguments)
        self._read = arguments[0], read(arguments[0])
        return []


_answers: Final = _Answers()


def answer(request: dict[str, Any], parts: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
    try:
        return {}, _answers.to(request["task"], pickle.loads(parts.pop()))  # pickled by `Values`, which started us
    except StepError as error:
        said = {"message": str(error), "reason": str(error.reason), "retryable": error.retryable}
    except MemoryError:
        reason = FailureReason.OUTPUT_INVALID if request["task"] == "outputs" else FailureReason.INPUT_INVALID
        what = f"a value takes more than {MEMORY_BYTES >> 20} MiB of memory when it is read"
        said = {"message": what, "reason": str(reason), "retryable": False}
    return {"error": said}, []


if __name__ == "__main__":
    from swarm.schema import validator  # noqa: F401  loaded before the limits

    confined.serve(answer, cpu_seconds=CPU_SECONDS, memory_bytes=MEMORY_BYTES)
