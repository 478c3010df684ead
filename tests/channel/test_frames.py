"""The decoder against arbitrary bytes: a Frame or ChannelError, never a hang, never an allocation past the limits."""

from __future__ import annotations

import asyncio
import json
import re
import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import swarm
from swarm.channel import frames
from swarm.errors import ChannelError
from tests.conftest import PATIENCE_SECONDS

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def decode(data: bytes) -> tuple[list[frames.Frame], str]:
    """All frames in ``data``, and the error that ended it."""

    async def read() -> tuple[list[frames.Frame], str]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        found = []
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                try:
                    found.append(await frames.read(reader))
                except ChannelError as error:
                    return found, str(error)

    return asyncio.run(read())


@given(st.binary(max_size=300))
@example(struct.pack(">II", 2, 0) + b"[]")
@example(struct.pack(">II", 60_000, 0) + b"[" * 60_000)
@example(struct.pack(">II", 5000, 0) + b"9" * 5000)
@example(struct.pack(">II", 3, 0) + b"\xff\xfe\xfd")
def test_arbitrary_bytes(data: bytes) -> None:
    found, error = decode(data)
    assert error
    assert all(isinstance(frame.head, dict) for frame in found)


@given(st.dictionaries(st.text(max_size=20), json_values, max_size=5), st.binary(max_size=300), st.data())
def test_round_trip_and_truncation(head: dict[str, object], payload: bytes, data: st.DataObject) -> None:
    encoded = frames.encode(head, payload)
    (frame,), _ = decode(encoded)
    assert (frame.head, frame.payload) == (head, payload)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    assert decode(encoded[:cut]) == ([], "the guest closed the connection")


@pytest.mark.parametrize("sizes", [(1 << 32) - 1, frames.MAX_HEADER_BYTES + 1, 1, 0])
def test_an_announced_header_that_is_too_long(sizes: int) -> None:
    assert "announced a frame" in decode(struct.pack(">II", sizes, 0))[1]


def test_an_announced_payload_that_is_too_long() -> None:
    assert "announced a frame" in decode(struct.pack(">II", 2, frames.MAX_PAYLOAD_BYTES + 1) + b"{}")[1]


def test_what_is_too_long_is_not_sent() -> None:
    frames.encode({"x": "y" * (frames.MAX_HEADER_BYTES - 20)}, b"x" * frames.MAX_PAYLOAD_BYTES)
    with pytest.raises(ValueError, match="the limits are"):
        frames.encode({"x": "y" * frames.MAX_HEADER_BYTES})
    with pytest.raises(ValueError, match="the limits are"):
        frames.encode({}, b"x" * (frames.MAX_PAYLOAD_BYTES + 1))


@given(json_values)
def test_accessors_give_what_they_say_or_channel_error(value: object) -> None:
    frame = frames.Frame(head={"x": value}, payload=b"")
    for get, kind in (
        (frame.text, str), (frame.flag, bool), (frame.number, int), (frame.texts, tuple), (frame.mapping, dict)
    ):  # fmt: skip
        try:
            assert isinstance(get("x"), kind)
        except ChannelError as error:
            assert len(str(error)) < 500
            assert str(error).isprintable()


@given(st.text(max_size=2000))
def test_words_of_a_guest_are_fit_for_a_terminal(text: str) -> None:
    shown = frames.printable(text)
    assert shown.isprintable()
    assert len(shown) <= 301


def test_both_ends_have_the_same_limits() -> None:
    """agentd.py can't import them: it says them again."""
    source = (Path(swarm.__file__).parent / "guest" / "agentd.py").read_text()
    said = {name: eval(value) for name, value in re.findall(r"^(MAX_\w+|PROTOCOL) = ([\d <]+)", source, re.M)}
    from swarm.channel import client, files

    assert said["MAX_HEADER"] == frames.MAX_HEADER_BYTES
    assert said["MAX_PAYLOAD"] == frames.MAX_PAYLOAD_BYTES
    assert said["MAX_PUT"] == files.MAX_PUT_BYTES
    assert said["PROTOCOL"] == client.PROTOCOL
    assert json.dumps(said)
