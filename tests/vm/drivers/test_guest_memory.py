"""The memory of a guest, copied from outside its VMM: here a program that maps a file as QEMU maps a template's."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.errors import BootFailed
from swarm.vm.drivers.guest_memory import GuestMemory

pytestmark = pytest.mark.slow  # starts programs

SIZE = 8 << 20
PAGE = mmap.PAGESIZE
# Maps the file named first privately, reads some of it, writes what each line of its input says, and answers.
PROGRAM = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
memory[0:1], memory[5 << 20: (5 << 20) + 1]
print("mapped", flush=True)
for line in sys.stdin:
    at, size, byte = map(int, line.split())
    memory[at : at + size] = bytes([byte]) * size
    print("written", flush=True)
"""


class Vmm:
    def __init__(self, file: Path) -> None:
        self.content = bytearray(file.read_bytes())
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout and self._process.stdout.readline() == "mapped\n"
        self.memory = GuestMemory(pid=self._process.pid, file=os.open(file, os.O_RDONLY))

    def write(self, at: int, size: int, byte: int) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{at} {size} {byte}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "written\n"
        self.content[at : at + size] = bytes([byte]) * size

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        os.close(self.memory.file)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    with path.open("wb") as out:
        out.write(os.urandom(2 << 20))
        out.truncate(SIZE)
        out.seek(5 << 20)
        out.write(os.urandom(1 << 20))
    return path


@pytest.fixture
def vmm(file: Path) -> Iterator[Vmm]:
    vmm = Vmm(file)
    yield vmm
    vmm.end()


def overlay(vmm: Vmm, target: Path) -> int:
    fd = os.open(target, os.O_RDWR)
    try:
        return vmm.memory.overlay(fd, lambda: None)
    finally:
        os.close(fd)


@pytest.mark.needs("root")
def test_a_copy_is_what_the_process_sees(vmm: Vmm, file: Path, tmp_path: Path) -> None:
    before, copy = file.read_bytes(), tmp_path / "copy"
    copy.write_bytes(before)
    assert overlay(vmm, copy) == 0, "it has written nothing"
    chance = random.Random(7)
    for turn in range(6):
        for _ in range(20):
            at = chance.randrange(SIZE - 1)
            vmm.write(at, min(chance.choice((1, PAGE, 50 * PAGE)), SIZE - at), chance.randrange(256))
        written = overlay(vmm, copy)
        assert copy.read_bytes() == vmm.content, turn
        assert overlay(vmm, copy) == 0
        assert written <= 20 * (50 * PAGE + 2 * (64 << 10))
    assert file.read_bytes() == before
    # A page that was written with zeros, where the file has data and where it has a hole.
    vmm.write(0, PAGE, 0)
    vmm.write(3 << 20, PAGE, 0)
    overlay(vmm, copy)
    assert copy.read_bytes() == vmm.content


@pytest.mark.needs("root")
def test_also_when_nobody_has_the_file_by_name_any_more(vmm: Vmm, file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    file.unlink()
    vmm.write(PAGE, PAGE, 9)
    overlay(vmm, copy)
    assert copy.read_bytes() == vmm.content


def test_a_process_that_has_ended_or_maps_something_else_is_told(vmm: Vmm, file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    fd = os.open(copy, os.O_RDWR)
    try:
        with pytest.raises(BootFailed, match="not found in its VMM"):
            GuestMemory(pid=os.getpid(), file=vmm.memory.file).overlay(fd, lambda: None)
        child = subprocess.Popen(["true"])
        child.wait()
        with pytest.raises(BootFailed, match="ended meanwhile"):
            GuestMemory(pid=child.pid, file=vmm.memory.file).overlay(fd, lambda: None)
    finally:
        os.close(fd)


def test_it_can_be_stopped(vmm: Vmm, tmp_path: Path) -> None:
    vmm.write(0, PAGE, 1)

    def stop() -> None:
        raise asyncio.CancelledError

    target = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(asyncio.CancelledError):
            vmm.memory.overlay(target, stop)
    finally:
        os.close(target)
