"""Files on their way to a guest, and a directory that came from one."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from swarm.base import trees
from swarm.base.trees import Entry
from swarm.channel.frames import MAX_HEADER_BYTES, printable
from swarm.errors import ChannelError, UsageError

MAX_PUT_BYTES: Final = 256 << 20  # agentd's limit for one request
MAX_NAMES_BYTES: Final = 2 << 20  # of all files that an agent leaves
ENTRY: Final = struct.Struct(">IIQ")

T = TypeVar("T")
File = tuple[str, bytes, int]  # relative path (a directory's ends in '/'), contents, mode


def read_tree(top: Path) -> list[File]:
    files: list[File] = []
    total = 0
    for path in sorted(top.rglob("*")):
        name = path.relative_to(top)
        if "__pycache__" in name.parts:
            continue
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            files.append((f"{name}/", b"", 0o755))
            continue
        if stat.S_ISLNK(mode):
            target = os.readlink(path)  # noqa: PTH115  its text, as it stands
            if not trees.stays_within(str(name), target):
                raise UsageError(f"{path} is a link that leads out of {top}: it can't be sent to a VM")
            files.append((str(name), os.fsencode(target), stat.S_IFLNK | 0o777))
            continue
        if not stat.S_ISREG(mode):
            raise UsageError(f"{path} is a special file; only files, links and directories can be sent to a VM")
        data = path.read_bytes()
        total += len(data)
        if total > MAX_PUT_BYTES:
            raise UsageError(f"{top} holds more than {MAX_PUT_BYTES >> 20} MiB")
        files.append((str(name), data, 0o755 if mode & 0o111 else 0o644))
    return files


def batches(items: Iterable[T], about: Callable[[T], tuple[str, int]]) -> Iterator[list[T]]:
    """Split into requests whose file table fits into a header and whose contents fit agentd's limit. ``about``: an
    item's name and size. Raises UsageError for what can't be sent."""
    batch: list[T] = []
    names = contents = 0
    for item in items:
        name, size = about(item)
        check(name, size)
        length = len(json.dumps(name)) + 32
        if batch and (names + length > MAX_HEADER_BYTES // 2 or contents + size > MAX_PUT_BYTES):
            yield batch
            batch, names, contents = [], 0, 0
        batch.append(item)
        names, contents = names + length, contents + size
    if batch:
        yield batch


def check(name: str, size: int) -> None:
    """Raises UsageError for what can't be sent."""
    if not trees.is_plain(name):
        raise UsageError(f"{printable(name)!r} is not a plain relative path")
    if size > MAX_PUT_BYTES:
        raise UsageError(f"{printable(name)} has {size} bytes; the limit is {MAX_PUT_BYTES}")


class Received:
    """What a guest sent of a directory, in a file of this host, as agentd's `Sender` writes it. The names, types and
    sizes in it are a guest's: `entries` checks them. ``left_out``: names and sizes of what it did not send."""

    def __init__(self, spool: BinaryIO) -> None:
        self._spool = spool
        self.left_out: list[tuple[str, int]] = []

    def entries(self) -> Iterator[tuple[Entry, Iterable[bytes]]]:
        """For `trees.pack`. Raises ChannelError. The contents of each must be read before the next."""
        self._spool.seek(0)
        seen: set[str] = set()
        while header := self._spool.read(ENTRY.size):
            if len(header) < ENTRY.size:
                raise ChannelError("the guest's list of files ends too early")
            length, mode, size = ENTRY.unpack(header)
            name = os.fsdecode(self._spool.read(min(length, MAX_NAMES_BYTES)))
            if not trees.is_plain(name) or name in seen:
                raise ChannelError(f"the guest sent a file named {printable(name)!r}")
            if len(seen) >= trees.MAX_ENTRIES:
                raise ChannelError(f"the guest sent more than {trees.MAX_ENTRIES:,} files")
            seen.add(name)
            if mode == 0:
                self.left_out.append((name, size))
                continue
            yield self._entry(name, mode, size), self._contents(size)

    @staticmethod
    def _entry(name: str, mode: int, size: int) -> Entry:
        entry = Entry(name, stat.S_IFMT(mode) | mode & 0o777, size)
        if not trees.is_sane(entry):
            raise ChannelError(f"what the guest says of the file {printable(name)!r} makes no sense")
        return entry

    def _contents(self, size: int) -> Iterator[bytes]:
        while size > 0:
            data = self._spool.read(min(size, trees.PART_BYTES))
            if not data:
                raise ChannelError("the guest's list of files ends too early")
            size -= len(data)
            yield data
