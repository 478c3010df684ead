"""Prepare files for sending to a guest."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from swarm.channel.frames import MAX_HEADER_BYTES, printable
from swarm.errors import UsageError

MAX_PUT_BYTES: Final = 256 << 20  # agentd's limit for one request

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
        if not stat.S_ISREG(mode):
            raise UsageError(f"{path} is a link or a special file; only regular files can be sent to a VM")
        data = path.read_bytes()
        total += len(data)
        if total > MAX_PUT_BYTES:
            raise UsageError(f"{top} holds more than {MAX_PUT_BYTES >> 20} MiB")
        files.append((str(name), data, 0o755 if mode & 0o111 else 0o644))
    return files


def batches(files: Sequence[File]) -> Iterator[list[File]]:
    """Split into requests whose file table fits into a header and whose contents fit agentd's limit."""
    batch: list[File] = []
    names = contents = 0
    for name, data, mode in files:
        parts = name.removesuffix("/").split("/")
        if not name or "\0" in name or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts):
            raise UsageError(f"{printable(name)!r} is not a plain relative path")
        if len(data) > MAX_PUT_BYTES:
            raise UsageError(f"{printable(name)} has {len(data)} bytes; the limit is {MAX_PUT_BYTES}")
        length = len(json.dumps(name)) + 32
        if batch and (names + length > MAX_HEADER_BYTES // 2 or contents + len(data) > MAX_PUT_BYTES):
            yield batch
            batch, names, contents = [], 0, 0
        batch.append((name, data, mode))
        names, contents = names + length, contents + len(data)
    if batch:
        yield batch
