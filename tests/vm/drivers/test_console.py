"""The serial console: bounded whatever the guest prints, the end never lost, nothing reaches the terminal raw."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from swarm.vm.drivers.console import HEAD_BYTES, TAIL_BYTES, Console, last_lines, printable
from tests.conftest import PATIENCE_SECONDS


async def test_a_flood_keeps_its_head_and_its_tail(tmp_path: Path) -> None:
    console = Console(tmp_path / "console.log")
    fd = os.dup(console.fileno())
    console.started()
    total = 2 << 20

    def flood() -> None:
        os.write(fd, b"first\n")
        for _ in range(total // 4096):
            os.write(fd, b"x" * 4095 + b"\n")
        os.write(fd, b"Kernel panic - not syncing\n")
        os.close(fd)

    await asyncio.gather(asyncio.to_thread(flood), console.printed(b"Kernel panic"))
    console.close()
    console.close()
    log = (tmp_path / "console.log").read_bytes()
    assert log.startswith(b"first\n")
    assert log.endswith(b"Kernel panic - not syncing\n")
    assert b"bytes dropped" in log
    assert len(log) <= HEAD_BYTES + TAIL_BYTES + 100
    assert last_lines(tmp_path / "console.log")[-1] == "Kernel panic - not syncing"


async def test_text_that_was_printed_before_the_wait(tmp_path: Path) -> None:
    console = Console(tmp_path / "console.log")
    os.write(console.fileno(), b"hello swarm-init: up\n")
    async with asyncio.timeout(PATIENCE_SECONDS):
        await console.printed(b"swarm-init")
        await console.printed(b"hello")
    console.close()


def test_control_characters_are_taken_out() -> None:
    assert printable(b"a\x1b[31mred\x07\r\nb\x00\xff") == "a[31mred\nb\ufffd"


def test_no_log_no_lines(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "none") == []
