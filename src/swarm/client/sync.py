"""`Swarm`. Made from aio.py by `make docs`: change that file."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self, Unpack

import httpx

from swarm.client import calls
from swarm.client.archive import packed, placed, text_of, unpack
from swarm.client.errors import TicketFailed, TimedOut
from swarm.client.stream import Following, Lines
from swarm.client.sync_sandboxes import Sandboxes
from swarm.client.values import (
    Agent,
    ApprovalFields,
    Comparison,
    Costs,
    Details,
    Event,
    File,
    Filters,
    Line,
    Problem,
    Submission,
    TicketFields,
    Workflow,
    read,
    read_all,
)
from swarm.client.where import LIMITS, ShortPath, find, options


class Swarm:
    """A server. Without arguments: that of `SWARM_URL` and `SWARM_TOKEN`, else the one of this host, by its Unix
    socket. Close it, or use it in a `with`.

    ``timeout_seconds``: for one answer; ``retry_seconds``: how long a call that fails because of the network, or of a
    server that starts anew or has too much to do, is sent again. Raises Unreachable, Invalid.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        home: str | os.PathLike[str] | None = None,
        timeout_seconds: float = 30.0,
        retry_seconds: float = 30.0,
    ) -> None:
        where = find(url, token, home)
        self._server = calls.Server(where=where, retry_seconds=retry_seconds)
        self._path = ShortPath(where.socket) if where.socket is not None else None
        transport = httpx.HTTPTransport(uds=self._path.name, limits=LIMITS) if self._path is not None else None
        self._http = httpx.Client(**options(where, timeout_seconds), transport=transport, limits=LIMITS)
        self._waits = threading.Semaphore(calls.WAITS)
        self.tickets = Tickets(self)
        self.agents = Agents(self)
        self.workflows = Workflows(self)
        self.approvals = Approvals(self)
        self.sandboxes = Sandboxes(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()
        if self._path is not None:
            self._path.close()

    def costs(self, by: str = "agent", *, since: str = "30d") -> list[Costs]:
        """Of model calls, by agent, workflow, ticket, model or day; ``since``: a time, or an age such as 7d;
        empty: all."""
        return read_all(Costs, self._do(calls.get("/v1/costs", by=by, since=since)))

    def status(self) -> dict[str, Any]:
        """What runs and what waits, as `swarm-engine status --json` prints it."""
        return dict(self._do(calls.get("/v1/status")))

    def request(self, method: str, path: str, *, query: Mapping[str, Any] | None = None, body: Any = None) -> Any:
        """Whatever else the API has (`/v1/openapi.json` describes it): what it answers, as JSON. What is no GET is not
        sent again once it may have been done."""
        return self._do(calls.Call(method=method, path=path, query=query or {}, body=body, repeatable=method == "GET"))

    def _do(self, call: calls.Call) -> Any:
        tries = self._server.tries(call)
        while True:
            delay: float | None
            try:
                response = self._http.send(call.request(self._http))
            except httpx.TransportError as error:
                delay = tries.broke(error)
            else:
                if (delay := tries.answered(response)) is None:
                    return tries.value(response)
            time.sleep(delay)

    def _save(self, call: calls.Call, file: BinaryIO) -> None:
        tries = self._server.tries(call)
        while True:
            delay: float | None
            try:
                response = self._http.send(call.request(self._http), stream=True)
                with closing(response):
                    if (delay := tries.answered(response)) is None:
                        if response.status_code != 200:
                            response.read()
                            tries.value(response)
                        file.truncate(file.seek(0))
                        for data in response.iter_bytes():
                            file.write(data)
                        return
            except httpx.TransportError as error:
                delay = tries.broke(error)
            time.sleep(delay)

    def _follow(self, id: str, after: int) -> Iterator[Event]:
        following = Following(id, after)
        tries = self._server.tries(following.call)
        while not following.ended:
            delay: float | None
            try:
                response = self._http.send(following.call.request(self._http), stream=True)
                with closing(response):
                    if (delay := tries.answered(response)) is None:
                        if response.status_code != 200:
                            response.read()
                            tries.value(response)
                        following.check(response.headers.get("content-type", ""))
                        for data in response.iter_bytes():
                            yield from following.take(data)
                            if following.flows:
                                tries.went_well()
                        delay = tries.cut() if not following.ended else 0.0
            except httpx.TransportError as error:
                delay = tries.broke(error)
            time.sleep(delay)


@dataclass(frozen=True, kw_only=True)
class Ticket(TicketFields):
    """A ticket as it was when the server answered; its methods ask the server again. One from a list has no inputs and
    outputs: `refresh` reads them."""

    _swarm: Swarm = field(repr=False, compare=False)

    def refresh(self) -> Ticket:
        return self._swarm.tickets.get(self.id)

    def details(self) -> Details:
        """Its runs, steps and attempts."""
        return Details.of(self._swarm._do(calls.get(calls.ticket(self.id))))

    def wait(self, timeout: float | None = None, *, raise_on_failure: bool = False) -> Ticket:
        """Return it when it has ended. Raises TimedOut after so many seconds (it goes on); with ``raise_on_failure``,
        TicketFailed unless it is done."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._swarm._waits:
                left = calls.POLL_SECONDS if end is None else end - time.monotonic()
                data = self._swarm._do(calls.wait(self.id, max(0.0, min(left, calls.POLL_SECONDS))))
            ticket = read(Ticket, data["ticket"], _swarm=self._swarm)
            if ticket.ended:
                if raise_on_failure and ticket.state != "done":
                    raise TicketFailed(ticket)
                return ticket
            if left <= 0:
                raise TimedOut(f"the ticket {self.id} has not ended within {timeout:g} s: it is {ticket.state}")

    def result(self, timeout: float | None = None) -> Any:
        """Its outputs, when it is done. Raises TicketFailed, TimedOut."""
        return (self.wait(timeout, raise_on_failure=True)).outputs

    def events(self, *, after: int = 0, follow: bool = True) -> Iterator[Event]:
        """What happened to it, and happens, until it has ended; with ``follow`` False, until now. Each event once, also
        if the server starts anew. ``after``: only those with a greater `seq`."""
        if follow:
            yield from self._swarm._follow(self.id, after)
            return
        while True:
            page = self._swarm._do(calls.get(calls.ticket(self.id, "events"), after=after))
            yield from read_all(Event, page["events"])
            if not page["events"]:
                return
            after = page["after"]

    def output(self, *, follow: bool = True) -> Iterator[Line]:
        """What its agents print, line by line, until it has ended; with ``follow`` False, until now."""
        lines = Lines()
        for event in self.events(follow=follow):
            yield from lines.take(event)
        yield from lines.end()

    def files(self) -> list[File]:
        """What its agents left in /work/out; of a workflow, below the names of its steps."""
        return read_all(File, (self._swarm._do(calls.get(calls.ticket(self.id, "files"))))["files"])

    def diff(self, other: str, attempt: str = "") -> Comparison:
        """Compare an attempt of this ticket with one of another, as TICKET, TICKET:STEP or TICKET:STEP:NUMBER.
        ``attempt``: which of this ticket's: STEP, NUMBER or STEP:NUMBER; by default the last."""
        query = {"other": other, "attempt": attempt or None}
        return Comparison.of(self._swarm._do(calls.get(calls.ticket(self.id, "diff"), **query)))

    def download(self, to: str | os.PathLike[str], pattern: str = "", *, replace: bool = False) -> list[Path]:
        """Write these files below the directory ``to``; returns their paths. ``pattern``: a name, a directory, or a
        pattern with *. Raises Conflict for a file that is there, unless ``replace``."""
        with tempfile.TemporaryFile() as file:
            self._swarm._save(calls.get(calls.ticket(self.id, "archive"), pattern=pattern), file)
            return unpack(file, to, replace=replace)

    def cancel(self) -> Ticket:
        return self._told(calls.cancel(self.id))

    def retry(self, *, step: str | None = None) -> Ticket:
        """Run it once more; with ``step``, from that step of its workflow on."""
        return self._told(calls.act(self.id, "retry", step=step))

    def ready(self) -> Ticket:
        """Let a draft run."""
        return self._told(calls.act(self.id, "ready"))

    def approve(
        self,
        why: str = "",
        *,
        step: str | None = None,
        budget_usd: float | None = None,
        budget_tokens: int | None = None,
    ) -> Ticket:
        """Let the step that waits go on; with a new budget if it used up the old one. ``step``: if several wait."""
        more = {"budget_usd": budget_usd, "budget_tokens": budget_tokens}
        return self._told(calls.act(self.id, "approve", step=step, why=why, **more))

    def reject(self, why: str, *, step: str | None = None) -> Ticket:
        """Let the step that waits fail."""
        return self._told(calls.act(self.id, "reject", step=step, why=why))

    def delete(self, *, force: bool = False) -> None:
        """Delete it and all that it left. ``force``: also if it runs, or others need it."""
        self._swarm._do(calls.delete(self.id, force=force))

    def _told(self, call: calls.Call) -> Ticket:
        data = self._swarm._do(call)
        return read(Ticket, data.get("ticket", data), _swarm=self._swarm)


class Tickets:
    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm

    def submit(self, agent: str | None = None, /, **given: Unpack[Submission]) -> Ticket:
        """A new ticket for this agent, or for the `workflow` that is given. It is submitted once, also if the
        connection breaks. Raises NotFound, Invalid."""
        sent, id = dict[str, str](), calls.new_id(given)
        for place, path in given.get("files", {}).items():
            archive = packed(path)
            sent[placed(place, path)] = (self._swarm._do(calls.send_files(id, archive)))["digest"]
        return read(Ticket, self._swarm._do(calls.submit(agent, given, id, sent)), _swarm=self._swarm)

    def get(self, id: str) -> Ticket:
        """``id``: or how it begins. Raises NotFound."""
        return read(Ticket, (self._swarm._do(calls.get(calls.ticket(id))))["ticket"], _swarm=self._swarm)

    def list(self, **filters: Unpack[Filters]) -> Iterator[Ticket]:
        """All that fit, newest first, a page at a time."""
        after = None
        while True:
            page = self._swarm._do(calls.page(filters, after))
            yield from read_all(Ticket, page["tickets"], _swarm=self._swarm)
            if (after := page.get("after")) is None:
                return


class Agents:
    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm

    def get(self, agent: str) -> Agent:
        """By name, name@version or id. Raises NotFound."""
        return read(Agent, self._swarm._do(calls.get(calls.named("agents", agent))))

    def upload(self, directory: str | os.PathLike[str], *, dev: bool = False) -> Agent:
        """Register the agent in this directory; its packages are installed first, which may take minutes. ``dev``:
        replace this version if it has another content. Raises Invalid with each problem, Conflict."""
        archive = packed(directory, mode="w:gz")
        return read(Agent, self._swarm._do(calls.upload_agent(archive, dev=dev)))

    def list(self) -> Sequence[Agent]:
        """Each version of each."""
        return read_all(Agent, self._swarm._do(calls.get("/v1/agents")))


class Workflows:
    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm

    def run(self, workflow: str, /, **inputs: Any) -> Ticket:
        """A new ticket that runs it, once, as `tickets.submit`; which, with `workflow=…`, also takes a title, a budget
        and so on. Raises NotFound, Invalid."""
        return read(Ticket, self._swarm._do(calls.run(workflow, inputs)), _swarm=self._swarm)

    def get(self, workflow: str) -> Workflow:
        """By name, name@version or id. Raises NotFound."""
        return read(Workflow, self._swarm._do(calls.get(calls.named("workflows", workflow))))

    def add(self, file: str | os.PathLike[str]) -> Workflow:
        """Register this file. Raises Invalid with each problem, and Conflict if this version has another content."""
        return read(Workflow, self._swarm._do(calls.upload_workflow(text_of(file))))

    def validate(self, file: str | os.PathLike[str]) -> Sequence[Problem]:
        """What is wrong with this file; nothing is registered."""
        call = calls.upload_workflow(text_of(file), "/validate")
        return read_all(Problem, (self._swarm._do(call))["problems"])

    def list(self) -> Sequence[Workflow]:
        """Each version of each."""
        return read_all(Workflow, self._swarm._do(calls.get("/v1/workflows")))


@dataclass(frozen=True, kw_only=True)
class Approval(ApprovalFields):
    _swarm: Swarm = field(repr=False, compare=False)

    def approve(self, why: str = "") -> Ticket:
        return self._told("approve", why)

    def reject(self, why: str) -> Ticket:
        return self._told("reject", why)

    def _told(self, verb: str, why: str) -> Ticket:
        data = self._swarm._do(calls.act(self.ticket_id, verb, step=self.step_id, why=why))
        return read(Ticket, data["ticket"], _swarm=self._swarm)


class Approvals:
    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm

    def list(self) -> Iterator[Approval]:
        """Each step that waits for a person."""
        for ticket in self._swarm.tickets.list(state="waiting"):
            for step in (ticket.details()).steps:
                if step.status == "waiting":
                    yield Approval(
                        ticket_id=ticket.id,
                        title=ticket.title,
                        step_id=step.step_id,
                        question=step.question,
                        _swarm=self._swarm,
                    )
