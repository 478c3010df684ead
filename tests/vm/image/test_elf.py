"""What ELF files need: real ones, hostile ones, and the names of Debian's packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.vm.image import elf
from tests.vm.packages_here import shared_object

WHOLE = shared_object("libc.so.6", "libfoo.so.1")


def test_a_real_program() -> None:
    assert "libc.so.6" in elf.needed(Path(sys.executable))
    assert "libc.so.6" in elf.needed(Path("/bin/sh"))


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (WHOLE, ["libc.so.6", "libfoo.so.1"]),
        (shared_object(), []),
        (shared_object("libc.so.6", machine=183), []),  # another CPU's
        (shared_object("lib\x1b[31m.so.1", "libc.so.6"), ["libc.so.6"]),  # would colour a terminal
        (b"", []),
        (b"#!/bin/sh\n", []),
        (WHOLE[:64], []),
    ],
)
def test_what_a_file_says(tmp_path: Path, data: bytes, names: list[str]) -> None:
    (tmp_path / "file").write_bytes(data)
    assert elf.needed(tmp_path / "file") == names


@given(
    cut=st.integers(0, len(WHOLE)),
    writes=st.lists(st.tuples(st.integers(16, len(WHOLE) - 8), st.binary(min_size=8, max_size=8)), max_size=4),
)
def test_a_broken_file_is_no_error(
    tmp_path_factory: pytest.TempPathFactory, cut: int, writes: list[tuple[int, bytes]]
) -> None:
    data = bytearray(WHOLE)
    for at, eight in writes:
        data[at : at + 8] = eight
    file = tmp_path_factory.getbasetemp() / "broken.so"
    file.write_bytes(data[:cut] if len(writes) % 2 else data)
    assert len(elf.needed(file)) <= 4096


@pytest.mark.parametrize("field", [32, 64 + 8, 64 + 16, 64 + 56 + 8, 64 + 56 + 32])
@pytest.mark.parametrize("value", [1 << 61, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_places_outside_the_file_are_no_error(tmp_path: Path, field: int, value: int) -> None:
    data = bytearray(WHOLE)
    data[field : field + 8] = value.to_bytes(8, "little")
    (tmp_path / "file").write_bytes(data)
    assert set(elf.needed(tmp_path / "file")) <= {"libc.so.6", "libfoo.so.1"}


@pytest.mark.parametrize(
    ("library", "package"),
    [
        ("libstdc++.so.6", "libstdc++6"), ("libGL.so.1", "libgl1"), ("libX11.so.6", "libx11-6"),
        ("libgomp.so.1", "libgomp1"), ("libSM.so.6", "libsm6"), ("libdbus-1.so.3", "libdbus-1-3"),
        ("libpq.so.5", "libpq5"), ("libodbc.so.2", "libodbc2"), ("libglib-2.0.so.0", "libglib2.0-0"),
        ("libc.musl-x86_64.so.1", ""), ("libown.so", ""), ("plugin", ""),
    ],
)  # fmt: skip
def test_the_package_of_a_library(library: str, package: str) -> None:
    assert elf.package_of(library) == package
    assert ("try `packages" in elf.explained(library, "x.so")) == bool(package)
