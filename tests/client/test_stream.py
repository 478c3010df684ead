"""Events and lines, cut anywhere."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from swarm.client import AsyncSwarm, Event, ServerError, Unreachable
from swarm.client.stream import Following, Lines
from tests.client.faulty import Answer, faulty

TEXTS = ["one\n", "tw", "o\r", "\nthr\ree\n\n", "ü\N{LINE SEPARATOR}x\n", "rest"]


def sent(after: int) -> bytes:
    """What the server sends from there on."""
    events = [
        {"seq": seq, "kind": "output", "data": {"stream": "stdout", "text": text}, "step_id": "main", "at": "now"}
        for seq, text in enumerate(TEXTS, 1)
    ]
    blocks = [f"id: {one['seq']}\nevent: output\ndata: {json.dumps(one)}\n\n" for one in events if one["seq"] > after]  # type: ignore[operator]
    return (": open\n\n" + "".join(blocks) + ": \n\nevent: end\ndata: {}\n\n").encode()


def test_a_connection_that_breaks_anywhere_costs_nothing() -> None:
    for size, step in ((1, 23), (7, 5), (4096, 1)):  # several pieces: not at each place, that takes 10 s
        for cut in range(0, len(sent(0)), step):
            following, seen = Following("t"), list[Event]()
            data = sent(0)[:cut]
            while not following.ended:
                assert following.call.headers["last-event-id"] == str(len(seen))
                for at in range(0, len(data), size):
                    seen += following.take(data[at : at + size])
                data = sent(len(seen))
            assert [event.data["text"] for event in seen] == TEXTS


def test_pieces_become_lines() -> None:
    lines = Lines()
    following = Following("t")
    told = [line for event in following.take(sent(0)) for line in lines.take(event)]
    assert [str(line) for line in [*told, *lines.end()]] == [
        "one",
        "two",
        "thr",
        "ee",
        "",
        "ü\N{LINE SEPARATOR}x",
        "rest",
    ]
    for step, stream, text in (
        ("a", "stdout", "a1"),
        ("b", "stdout", "b1"),
        ("a", "stderr", "oops"),
        ("a", "stdout", "a2\n"),
    ):
        data = {"stream": stream, "text": text}
        told = list(lines.take(Event(seq=1, kind="output", step_id=step, data=data)))
    assert [(line.step, line.text) for line in told] == [("a", "a1a2")]
    ended = Event(seq=2, kind="transition", step_id="a", data={"of": "step", "to": "completed"})
    assert [line.text for line in lines.take(ended)] == ["oops"] and [line.text for line in lines.end()] == ["b1"]
    (long,) = lines.take(Event(seq=1, kind="output", data={"text": "x" * 100_000}))
    assert len(long.text) == 100_000 and not list(lines.end()), "a line without an end isn't kept"


def test_a_long_event_is_copied_once() -> None:
    """It comes in very many pieces: to copy what there is with each of them would take minutes."""
    following, piece = Following("t"), b"x" * 64
    until = time.process_time() + 20  # a hundred times what it takes
    for _ in range((8 << 20) // len(piece) - 1):
        assert not list(following.take(piece)) and time.process_time() < until
    with pytest.raises(ServerError, match="more than 8,388,608 bytes"):
        list(following.take(piece * 2))


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answer(200, b"<html>\n\n", {"Content-Type": "text/html"}), ServerError),
        (Answer(200, b"id: 1\ndata: {\n\n", {"Content-Type": "text/event-stream"}), ServerError),
        (Answer(200, b"id: 1\ndata: []\n\n", {"Content-Type": "text/event-stream"}), ServerError),
        (Answer(200, b"x" * (9 << 20), {"Content-Type": "text/event-stream"}), ServerError),
        # It lets everybody in and then ends.
        (Answer(200, b": open\n\n", {"Content-Type": "text/event-stream"}), Unreachable),
        (Answer(503, {"detail": "busy"}), ServerError),
    ],
    ids=["html", "no JSON", "no event", "endless", "ends", "busy"],
)
async def test_what_is_no_stream_of_events(answer: Any, kind: type[Exception]) -> None:
    found = Answer(200, {"ticket": {"id": "t"}})
    async with faulty([found, answer]) as server, AsyncSwarm(server.url, retry_seconds=0.5) as s:
        ticket = await s.tickets.get("t")
        with pytest.raises(kind):
            async for _ in ticket.events():
                pass
