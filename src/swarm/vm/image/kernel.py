"""What an image takes from a kernel: the ELF inside a bzImage, and the modules a guest needs, in load order.

Firecracker boots only an uncompressed ELF. A distribution ships a bzImage: real-mode setup code, then a loader with the
compressed ELF as its payload. The kernel's Documentation/arch/x86/boot.rst says where the payload is. Its last four
bytes are the length of the decompressed ELF, which reveals a wrong result.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import lz4.block
import zstandard

from swarm.errors import ImageError

ELF_MAGIC: Final = b"\x7fELF"
_MAX_KERNEL_BYTES: Final = 1 << 30
_LZ4_LEGACY_BLOCK_BYTES: Final = 8 << 20

_COMPRESSED_SUFFIXES: Final = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")


# --- bzImage -> ELF -----------------------------------------------------------------------------------------------


def extract_elf(image: bytes) -> bytes:
    """The ELF kernel in a bzImage. An ELF is returned unchanged, a compressed one (vmlinux.xz) decompressed.

    Raises ImageError if there is no ELF in it, or if it is incomplete.
    """
    if image.startswith(ELF_MAGIC):
        return image
    if image[0x202:0x206] == b"HdrS":
        payload = _payload(image)
        # The kernel's build appends it to the compressed stream; gzip's own trailer happens to be the same.
        stated = int.from_bytes(payload[-4:], "little")
        elf = decompress(payload)
        if len(elf) != stated:
            raise ImageError(f"the kernel's payload decompresses to {len(elf)} bytes instead of {stated}: it is torn")
    else:
        elf = decompress(image)
    if not elf.startswith(ELF_MAGIC):
        raise ImageError("the kernel's payload is not an ELF file")
    return elf


def decompress(data: bytes) -> bytes:
    """Decompress one stream, in any format that Linux uses for kernels; bytes after its end are ignored.

    Raises ImageError for another format, a torn stream, or a result of more than 1 GiB.
    """
    for magic, name, inflate in _FORMATS:
        if data.startswith(magic):
            try:
                return inflate(data)
            except (zlib.error, lzma.LZMAError, zstandard.ZstdError, lz4.block.LZ4BlockError, OSError, EOFError) as e:
                raise ImageError(f"the kernel's {name} payload is torn: {e}") from e
    if data.startswith(b"\x89LZO"):
        raise ImageError("the kernel is compressed with LZO, which Swarm can't read; pass the ELF (vmlinux) instead")
    raise ImageError(f"not a Linux kernel that Swarm can read: neither bzImage nor ELF; begins with {data[:6].hex()}")


def _payload(image: bytes) -> bytes:
    if int.from_bytes(image[0x206:0x208], "little") < 0x0208:
        raise ImageError("the kernel is too old: its boot protocol (before 2.08, Linux 2.6.26) states no payload")
    setup_sectors = image[0x1F1] or 4
    start = (setup_sectors + 1) * 512 + int.from_bytes(image[0x248:0x24C], "little")
    length = int.from_bytes(image[0x24C:0x250], "little")
    if length < 8 or start + length > len(image):
        raise ImageError(f"the kernel is torn: its payload should end at byte {start + length} of {len(image)}")
    return image[start : start + length]


def _zstd(data: bytes) -> bytes:
    stream = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    out = stream.decompress(data)
    if not stream.eof:
        raise EOFError("it ends too early")
    return out


def _decompress_all(stream: zlib._Decompress | lzma.LZMADecompressor | bz2.BZ2Decompressor, data: bytes) -> bytes:
    out = stream.decompress(data, _MAX_KERNEL_BYTES)
    if not stream.eof:
        raise EOFError("it ends too early, or holds more than a kernel")
    return out


def _lz4_legacy(data: bytes) -> bytes:
    """The format of `lz4 -l`: the magic, then (u32 length, block) up to the end, each block at most 8 MiB."""
    out = bytearray()
    at = 4
    while len(data) - at > 4:  # the last four bytes of a kernel's payload are its length
        length = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if length == 0x184C2102:  # another frame
            continue
        if at + length > len(data):
            raise EOFError("it ends too early")
        out += lz4.block.decompress(data[at : at + length], uncompressed_size=_LZ4_LEGACY_BLOCK_BYTES)
        at += length
        if len(out) > _MAX_KERNEL_BYTES:
            raise EOFError("it holds more than a kernel")
    return bytes(out)


_FORMATS: Final[Sequence[tuple[bytes, str, Callable[[bytes], bytes]]]] = (
    (b"\x1f\x8b", "gzip", lambda data: _decompress_all(zlib.decompressobj(wbits=31), data)),
    (b"\xfd7zXZ\x00", "xz", lambda data: _decompress_all(lzma.LZMADecompressor(lzma.FORMAT_XZ), data)),
    (b"BZh", "bzip2", lambda data: _decompress_all(bz2.BZ2Decompressor(), data)),
    (b"\x02\x21\x4c\x18", "lz4", _lz4_legacy),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
    (b"\x5d\x00\x00", "lzma", lambda data: _decompress_all(lzma.LZMADecompressor(lzma.FORMAT_ALONE), data)),
)


# --- modules ------------------------------------------------------------------------------------------------------


def modules_in_load_order(tree: Path, wanted: Iterable[str]) -> list[Path]:
    """The files of the modules ``wanted``, dependencies first; modules built into the kernel are skipped.

    ``tree`` is a kernel's /lib/modules/VERSION, unpacked from its package. Dependencies are read from the modules
    themselves (`depends=` and `softdep=pre:` in .modinfo), as depmod does. Raises ImageError if one is missing.
    """
    files = {_name(f): f for f in sorted((tree / "kernel").rglob("*")) if f.name.endswith(_COMPRESSED_SUFFIXES)}
    listed = tree / "modules.builtin"
    builtin = {_name(Path(line)) for line in listed.read_text().split()} if listed.exists() else set()
    order: dict[str, Path] = {}
    seen = set(builtin)

    def add(name: str, needed_by: str) -> None:
        if name in seen:  # soft dependencies may be circular
            return
        seen.add(name)
        if name not in files:
            raise ImageError(f"the kernel package has no module {name!r}, which {needed_by} needs")
        depends, soft = _dependencies(read_module(files[name]))
        for other in soft:
            if other in files:
                add(other, name)
        for other in depends:
            add(other, name)
        order[name] = files[name]

    for name in wanted:
        add(name.replace("-", "_"), "the guest")
    return list(order.values())


def modules_on_demand(tree: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """The files of a /lib/modules/VERSION with the modules ``wanted`` and what these need: each module, and modules.dep
    and modules.alias, by which modprobe finds them, as depmod writes these."""
    found: dict[str, bytes] = {}
    needs, aliases = [], []
    for file in modules_in_load_order(tree, wanted):
        module = found[f"{_name(file)}.ko"] = read_module(file)
        needed = reversed(modules_in_load_order(tree, [_name(file)])[:-1])  # what is needed first stands last
        needs.append(f"{_name(file)}.ko: {' '.join(f'{_name(one)}.ko' for one in needed)}".rstrip() + "\n")
        for alias in re.findall(rb"\0alias=(?!devname:)([^\0]*)", module):
            aliases.append(f"alias {alias.decode('ascii', 'replace')} {_name(file)}\n")
    return found | {"modules.dep": "".join(needs).encode(), "modules.alias": "".join(aliases).encode()}


def read_module(file: Path) -> bytes:
    """A module's ELF, decompressed."""
    data = file.read_bytes()
    match file.suffix:
        case ".xz":
            return lzma.decompress(data)
        case ".gz":
            return gzip.decompress(data)
        case ".zst":
            return zstandard.ZstdDecompressor().decompressobj().decompress(data)
        case _:
            return data


def _dependencies(module: bytes) -> tuple[list[str], list[str]]:
    def words(pattern: bytes) -> list[str]:
        return [
            word.replace("-", "_")
            for found in re.findall(pattern, module)
            for word in re.split(r"[\s,]+", found.decode("ascii", "replace"))
            if word
        ]

    return words(rb"\0depends=([^\0]*)\0"), words(rb"\0softdep=pre:([^\0:]*?)(?:post:[^\0]*)?\0")


def _name(file: Path) -> str:
    return file.name.partition(".")[0].replace("-", "_")
