"""Which shared libraries programs and modules need (elf(5)), and which of those a guest would not find."""

from __future__ import annotations

import re
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Final

_X86_64: Final = 62
_LOAD, _DYNAMIC = 1, 2  # types of segments
_END, _NEEDED, _STRINGS = 0, 1, 5  # tags of the dynamic section
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_ENTRY: Final = struct.Struct("<qQ")
# A sane file is far below these. They bound what a hostile one costs: 1 MiB is read of it.
_MOST_SEGMENTS, _MOST_ENTRIES, _LONGEST_NAME = 128, 4096, 256
_LARGEST: Final = 1 << 40
_MOST_MISSING: Final = 50
# Debian's packages that aren't named after their library.
_PACKAGES: Final = {
    "libglib-2.0.so.0": "libglib2.0-0", "libgobject-2.0.so.0": "libglib2.0-0", "libgthread-2.0.so.0": "libglib2.0-0",
    "libnspr4.so": "libnspr4", "libnss3.so": "libnss3", "libxslt.so.1": "libxslt1.1",
    "libc.musl-x86_64.so.1": "",  # another C library, which Debian does not use
}  # fmt: skip


def lacks(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """Library -> one of ``files`` that needs it, for those that are nowhere below ``root``: wheels bring libraries in
    directories of their own, and find them in many ways."""
    there = {path.name for path in root.rglob("*")}
    missing: dict[str, str] = {}
    for path in files:
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode) and (".so" in path.name or mode & 0o111):
            for name in needed(path):
                if name not in there and len(missing) < _MOST_MISSING:
                    missing.setdefault(name, str(path.relative_to(root)))
    return missing


def explained(library: str, file: str) -> str:
    package = package_of(library)
    hint = f": try `packages: [{package}]`" if package else ""
    return f"neither the guest nor the layer has {library}, which {file} needs{hint}"


def package_of(library: str) -> str:
    """The Debian package with that library, by the rule for their names (Debian Policy 8.1); '' if it gives none."""
    if library in _PACKAGES:
        return _PACKAGES[library]
    found = re.fullmatch(r"(lib[a-zA-Z0-9+._-]+)\.so\.(\d+)", library)
    if found is None:
        return ""
    stem = found[1].lower().replace("_", "-")
    return f"{stem}{'-' if stem[-1].isdigit() else ''}{found[2]}"


def needed(path: Path) -> list[str]:
    """The names of the libraries that an x86-64 ELF file is linked with; [] for any other file."""
    with path.open("rb") as file:
        head = _at(file, 0, _HEADER.size)
        if len(head) < _HEADER.size or head[:6] != b"\x7fELF\x02\x01":
            return []
        _, _, machine, _, _, at, _, _, _, size, count, *_ = _HEADER.unpack(head)
        if machine != _X86_64 or size != _SEGMENT.size:
            return []
        segments = _table(_SEGMENT, _at(file, at, min(count, _MOST_SEGMENTS) * _SEGMENT.size))
        for type_, _, offset, _, _, in_file, _, _ in segments:
            if type_ == _DYNAMIC:
                entries = _table(_ENTRY, _at(file, offset, min(in_file, _MOST_ENTRIES * _ENTRY.size)))
                return _names(file, entries, segments)
    return []


def _names(file: BinaryIO, entries: list[tuple[int, ...]], segments: list[tuple[int, ...]]) -> list[str]:
    address = next((value for tag, value in entries if tag == _STRINGS), -1)
    for type_, _, offset, start, _, in_file, _, _ in segments:
        if type_ == _LOAD and start <= address < start + in_file:
            strings = offset + address - start
            break
    else:
        return []
    names = []
    for tag, value in entries:
        if tag == _END:
            break
        if tag == _NEEDED:
            name = _at(file, strings + value, _LONGEST_NAME).partition(b"\0")[0].decode("ascii", "replace")
            if name and name.isprintable():
                names.append(name)
    return names


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    if offset > _LARGEST:  # seek refuses what no file system can hold
        return b""
    file.seek(offset)
    return file.read(size)


def _table(row: struct.Struct, data: bytes) -> list[tuple[int, ...]]:
    return list(row.iter_unpack(data[: len(data) // row.size * row.size]))
