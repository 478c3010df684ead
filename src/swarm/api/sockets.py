"""What needs a stream both ways: a command with its terminal, one that runs already, a port of the guest.

Over WebSockets (RFC 6455), with the tokens, sessions and roles of all requests. docs/api.md describes the messages.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final, Literal, cast

from pydantic import Field
from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from swarm.api.endpoint import Call, Context, Fields, NamedSocketRoute, validated
from swarm.api.problem import Refused, of, problem
from swarm.api.v1.guests import Command, live_of, order_of
from swarm.api.v1.sandboxes import forbidden
from swarm.base import jsontext
from swarm.base.aio import first
from swarm.base.log import logger
from swarm.channel import ports, processes
from swarm.channel.ports import Dialled
from swarm.channel.processes import Process
from swarm.errors import SwarmError, UsageError
from swarm.model import Role

log = logger(__name__)

FIRST_SECONDS: Final = 30.0  # for the message that says what to run
_STREAMS: Final[Mapping[str, bytes]] = {"stdout": b"\1", "stderr": b"\2"}
_NORMAL, _POLICY, _BROKEN = 1000, 1008, 1011  # why it was closed; RFC 6455, 7.4.1
_MAX_TAKEN: Final = 1 << 53  # what a client that counts in doubles can tell
Window = Annotated[int, Field(ge=1 << 16, le=1 << 24)]
Size = tuple[Annotated[int, Field(ge=1, le=10_000)], Annotated[int, Field(ge=1, le=10_000)]]


class LiveCommand(Command):
    """The first message. ``pty``: columns and rows of a terminal; ``window_bytes``: see `_Window`."""

    pty: Size | None = None
    window_bytes: Window | None = None


class Said(Fields):
    """A text message of the client while its command runs."""

    op: Literal["end", "resize", "signal", "taken"]
    size: Size | None = None
    bytes: int = Field(default=0, ge=0, le=_MAX_TAKEN)
    signal: str = Field(default="INT", pattern=r"^[A-Z0-9]{2,10}$")


class AttachQuery(Fields):
    after: int | None = Field(default=None, ge=0, lt=1 << 63)
    window_bytes: Window | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Socket:
    """A route for WebSockets. ``handler`` accepts once it is certain that it can serve it: until then, a refusal is an
    answer as that of any request."""

    path: str
    handler: Callable[[Call, WebSocket], Awaitable[None]]
    role: Role = Role.OPERATOR
    query: type[Fields] | None = None


def route(one: Socket, context: Context) -> BaseRoute:
    async def serve(socket: WebSocket) -> None:
        try:
            await _serve(one, context, socket)
        except WebSocketDisconnect:
            pass
        except SwarmError as error:
            await _refuse(socket, of(error))
        except Refused as error:
            await _refuse(socket, Refused(error.status, error.detail, headers=error.headers))
        except Exception as error:
            log.error("a WebSocket failed by a bug in Swarm", error=f"{type(error).__name__}: {error}")
            await _refuse(socket, Refused(500, "an internal error; the server's log has details"))

    return NamedSocketRoute(one.path, serve)


async def _serve(one: Socket, context: Context, socket: WebSocket) -> None:
    actor = await context.auth.actor(socket, one.role)
    with context.auth.turn(actor):
        call = Call(
            context=context,
            request=cast(Request, socket),  # of which a WebSocket has all that is asked for
            actor=actor,
            path=socket.path_params,
            query=validated(one.query, dict(socket.query_params), "the query") if one.query is not None else None,
            body=None,
        )
        await one.handler(call, socket)


async def _refuse(socket: WebSocket, why: Refused) -> None:
    """Before it is accepted, by a response; then by a text, and the end."""
    with suppress(WebSocketDisconnect, RuntimeError):  # it has been closed already
        if socket.application_state.name == "CONNECTING":
            await socket.send_denial_response(problem(why.status, why.detail, headers=why.headers))
        else:
            await socket.send_text(json.dumps({"error": why.detail}))
            await socket.close(_BROKEN if why.status >= 500 else _POLICY)


# --- commands ---------------------------------------------------------------------------------------------------------


async def exec_live(call: Call, socket: WebSocket) -> None:
    live = await live_of(call)
    await socket.accept()
    try:
        async with asyncio.timeout(FIRST_SECONDS):
            given: LiveCommand = _read(LiveCommand, await socket.receive_text())
    except TimeoutError:
        raise Refused(408, f"no command came within {FIRST_SECONDS:g} s") from None
    except KeyError:
        raise UsageError("the first message must be a text, which says what to run") from None
    order = order_of(given, pty=given.pty, open_stdin=True)
    async with processes.start(live.open, order) as process:
        await _talk(call, socket, process, given.window_bytes)


async def attach_live(call: Call, socket: WebSocket) -> None:
    live = await live_of(call)
    async with processes.attach(live.open, call.path["process"], after=call.query.after) as process:
        await socket.accept()
        await _talk(call, socket, process, call.query.window_bytes)


class _Window:
    """How much output may be on its way to a client that says what it has taken (None: any). A browser's script reads
    all that comes, whether it can show it or not: what it can't would fill its memory."""

    def __init__(self, size: int | None) -> None:
        self._size, self._sent, self._taken = size, 0, 0
        self._typing = False
        self._open = asyncio.Event()
        self._look()

    def _look(self) -> None:
        if self._size is None or self._typing or self._sent - self._taken < self._size:
            self._open.set()
        else:
            self._open.clear()

    async def send(self, socket: WebSocket, stream: str, data: bytes) -> None:
        await self._open.wait()
        self._sent += len(data)
        self._look()
        await socket.send_bytes(_STREAMS[stream] + data)

    def took(self, count: int) -> None:
        if not self._taken <= count <= self._sent:
            raise UsageError("`bytes` is all output that was taken so far, of what was sent")
        self._taken = count
        self._look()

    @contextmanager
    def typing(self) -> Iterator[None]:
        """While input waits for the program. It may wait for its output to be taken, and what the client has taken is
        told behind that input: so the window does not hold meanwhile."""
        self._typing = True
        self._look()
        try:
            yield
        finally:
            self._typing = False
            self._look()


async def _talk(call: Call, socket: WebSocket, process: Process, window_bytes: int | None) -> None:
    await socket.send_text(json.dumps({"started": process.name, "dropped_bytes": process.dropped_bytes}))
    window = _Window(window_bytes)
    await first(_output(socket, process, window), _input(socket, process, window), forbidden(call))


async def _output(socket: WebSocket, process: Process, window: _Window) -> None:
    async for stream, data in process:
        await window.send(socket, stream, data)
    await socket.send_text(json.dumps({"exit": asdict(await process.exit())}))
    await socket.close(_NORMAL)


async def _input(socket: WebSocket, process: Process, window: _Window) -> None:
    """Until the client goes away: then the command ends, unless it is in the background."""
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        if (data := message.get("bytes")) is not None:
            if data:
                with window.typing():
                    await process.write(data)
            continue
        said: Said = _read(Said, message["text"])
        if said.op == "taken":
            window.took(said.bytes)
        elif said.op == "end":
            await process.close_stdin()
        elif said.op == "signal":
            await process.signal(said.signal)
        elif said.size is not None:
            await process.resize(*said.size)


def _read(model: type[Any], text: str) -> Any:
    try:
        return validated(model, jsontext.loads(text), "the message")
    except jsontext.TooDeep as error:
        raise UsageError(f"the message is {error}") from None
    except ValueError as error:
        raise UsageError(f"the message is not JSON ({error})") from None


# --- ports ------------------------------------------------------------------------------------------------------------


async def port_live(call: Call, socket: WebSocket) -> None:
    text = call.path["port"]
    if not text.isdecimal() or not 0 < int(text[:6]) < 65_536:
        raise UsageError("a port is a number from 1 to 65535")
    live = await live_of(call)
    async with ports.dial(live.open, int(text)) as dialled:
        await socket.accept()
        await first(_from_port(socket, dialled), _to_port(socket, dialled), forbidden(call))


async def _from_port(socket: WebSocket, dialled: Dialled) -> None:
    """An empty message says that the port sends no more, and may still listen."""
    ended = False
    while not dialled.ended:
        try:
            data = await dialled.read()
        except ConnectionResetError:
            raise Refused(409, "the port reset the connection") from None
        if data or not ended:
            ended = ended or not data
            await socket.send_bytes(data)
    await socket.close(_NORMAL)


async def _to_port(socket: WebSocket, dialled: Dialled) -> None:
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        data = message.get("bytes")
        if data is None:
            raise UsageError("a port takes binary messages only")
        await (dialled.write(data) if data else dialled.write_end())


SOCKETS: Final[Sequence[Socket]] = (
    Socket(path="/v1/sandboxes/{id}/exec/live", handler=exec_live),
    Socket(path="/v1/sandboxes/{id}/processes/{process}/live", handler=attach_live, query=AttachQuery),
    Socket(path="/v1/sandboxes/{id}/ports/{port}/live", handler=port_live),
)
