"""Archives that someone else wrote: a header at a time, and never much of it held."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable

import pytest

from swarm.base import tar
from swarm.errors import UsageError


def header(name: str, **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.USTAR_FORMAT)


def pax(*records: tuple[str, str]) -> bytes:
    """An extended header, as a program writes it that need not be tar."""
    data = b""
    for key, value in records:
        text = f" {key}={value}\n".encode()
        size = len(text) + 1
        while size != len(text) + len(str(size)):
            size = len(text) + len(str(size))
        data += str(size).encode() + text
    return header("x", type=tarfile.XHDTYPE, size=len(data)) + data + b"\0" * (-len(data) % 512)


def read(data: bytes) -> Iterable[str]:
    for entry, contents in tar.entries(io.BytesIO(data)):
        for _ in contents:
            pass
        yield entry.name


def test_extended_headers_count() -> None:
    long = "y" * 300 + "/" + "z" * 30
    with pytest.raises(UsageError, match="plain relative path"):
        list(read(pax(("path", long)) + header("x")))
    data = pax(("comment", "c"), ("path", "dir/\u00fc"), ("size", "600")) + header("x", size=1) + b"a" * 1024
    assert list(read(data + header("last"))) == ["dir/\u00fc", "last"]
    assert list(read(pax(("mtime", "1.5")) * 8 + header("x") + pax(("path", "y")) * 8 + header("z"))) == ["x", "y"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pax(("size", "-1")) + header("x"), "a negative size"),
        (pax(("size", "-5")) + header("x"), "a negative size"),
        (pax(("size", "x")) + header("x"), "not a tar archive"),
        (pax(("mtime", "1")) * 9 + header("x"), "more than 8 extended headers"),
        (pax(*((f"GNU.sparse.{number}", "1") for number in range(2000))) + header("x"), "neither a plain file"),
        (header("x", type=tarfile.XHDTYPE, size=3) + b"-5 ".ljust(512, b"\0"), "damaged"),
        (header("x", type=tarfile.XHDTYPE, size=9) + b"999999 x=".ljust(512, b"\0"), "damaged"),
        (header("x", type=tarfile.XHDTYPE, size=9) + b"         ".ljust(512, b"\0"), "damaged"),
        (header("./", type=tarfile.DIRTYPE) * 100_001, "more than 100,000 files and directories"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        list(read(data))


def test_directories_are_bounded_also_those_that_names_alone_tell_of() -> None:
    """As they come: an archive of 300 KB must not make millions of names."""
    deep = b"".join(header(f"{number}/" + "d/" * 96 + "x", type=tarfile.DIRTYPE) for number in range(600))
    with pytest.raises(UsageError, match="more than 50,000 directories"):
        list(read(deep))
    wide = b"".join(
        pax(("path", f"{number}/" + "d" * 200 + "/" + "e" * 200 + "/x" * 90)) + header("x") for number in range(500)
    )
    with pytest.raises(UsageError, match="names in the archive take more than 16 MiB"):
        list(read(wide))
