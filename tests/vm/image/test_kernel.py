"""Kernels: every payload compression, torn files, and the order in which modules are loaded."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import ImageError
from swarm.vm.image.kernel import ELF_MAGIC, extract_elf, modules_in_load_order, modules_on_demand, read_module

ELF = ELF_MAGIC + random.Random(7).randbytes(1 << 16) + bytes(1 << 16)


def lz4_legacy(data: bytes) -> bytes:
    blocks = (lz4.block.compress(data[i : i + (8 << 20)], store_size=False) for i in range(0, len(data), 8 << 20))
    return b"\x02\x21\x4c\x18" + b"".join(len(b).to_bytes(4, "little") + b for b in blocks)


def xz(data: bytes) -> bytes:
    """As the kernel's build does it: the x86 filter before LZMA2, CRC32."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 0}]
    return lzma.compress(data, check=lzma.CHECK_CRC32, filters=filters)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data)[:-4],  # its last four bytes are what bzimage() writes
    "xz": xz,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE, preset=0),
    "bzip2": bz2.compress,
    "lz4": lz4_legacy,
    "zstd": zstandard.ZstdCompressor().compress,
}


def bzimage(payload: bytes, *, size: int = len(ELF)) -> bytes:
    """A bzImage around a payload: setup code of 3 sectors, then 64 bytes of loader, the payload and more loader."""
    payload += size.to_bytes(4, "little")
    header = bytearray(4 * 512)
    header[0x1F1] = 3
    header[0x202:0x206] = b"HdrS"
    header[0x206:0x208] = (0x020F).to_bytes(2, "little")
    header[0x248:0x24C] = (64).to_bytes(4, "little")
    header[0x24C:0x250] = len(payload).to_bytes(4, "little")
    return bytes(header) + b"\x90" * 64 + payload + b"\xcc" * 500


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_compression_of_a_bzimage(compression: str) -> None:
    assert extract_elf(bzimage(COMPRESSIONS[compression](ELF))) == ELF


def test_lz4_of_more_than_one_block() -> None:
    elf = ELF + bytes(17 << 20)  # a block holds 8 MiB
    assert extract_elf(bzimage(lz4_legacy(elf), size=len(elf))) == elf


def test_an_elf_is_taken_as_it_is_and_a_compressed_one_unpacked() -> None:
    assert extract_elf(ELF) == ELF
    assert extract_elf(xz(ELF)) == ELF


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_torn_payload_is_an_error(compression: str) -> None:
    whole = COMPRESSIONS[compression](ELF)
    with pytest.raises(ImageError, match="torn"):
        extract_elf(bzimage(whole[: len(whole) // 2]))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    # Some formats have no checksum: then the length reveals the damage, or (a literal byte) nothing can.
    with contextlib.suppress(ImageError):
        assert len(extract_elf(bzimage(bytes(flipped)))) == len(ELF)


def test_a_truncated_bzimage_says_where_it_ends() -> None:
    with pytest.raises(ImageError, match="should end at byte"):
        extract_elf(bzimage(gzip.compress(ELF)[:-4])[:50_000])


def test_a_payload_of_another_length_than_stated_is_an_error() -> None:
    with pytest.raises(ImageError, match=r"instead of \d+: it is torn"):
        extract_elf(bzimage(zstandard.ZstdCompressor().compress(ELF), size=len(ELF) + 1))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (b"", "not a Linux kernel"),
        (b"\x89LZO\x00\x0d\x0a\x1a\x0a", "LZO"),
        (bzimage(b"\x89LZO\x00\x0d\x0a\x1a\x0a"), "LZO"),
        (gzip.compress(b"#!/bin/sh"), "not an ELF file"),
        (b"#!/bin/sh\n", "neither bzImage nor ELF"),
    ],
    ids=["empty", "LZO", "bzImage of LZO", "gzip of a script", "a script"],
)
def test_other_files_are_refused(image: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        extract_elf(image)


MAGICS = (b"", b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh9", b"\x02\x21\x4c\x18", b"\x28\xb5\x2f\xfd", b"\x5d\0\0")


@given(st.sampled_from(MAGICS), st.binary(max_size=300), st.booleans())
def test_no_bytes_bring_anything_but_an_image_error(magic: bytes, rest: bytes, wrapped: bool) -> None:
    data = magic + rest
    with contextlib.suppress(ImageError):
        assert extract_elf(bzimage(data) if wrapped else data).startswith(ELF_MAGIC)


# --- modules ------------------------------------------------------------------------------------------------------


def module(tree: Path, path: str, *, depends: str = "", soft: str = "", aliases: tuple[str, ...] = ()) -> bytes:
    data = b"\x7fELF\0license=GPL\0" + b"".join(f"alias={alias}\0".encode() for alias in aliases)
    data += b"depends=" + depends.encode() + b"\0"
    if soft:
        data += b"softdep=" + soft.encode() + b"\0"
    data += b"intree=Y\0"
    file = tree / "kernel" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    packed: dict[str, Callable[[bytes], bytes]] = {
        ".xz": lzma.compress,
        ".gz": gzip.compress,
        ".zst": zstandard.ZstdCompressor().compress,
    }
    file.write_bytes(packed[file.suffix](data) if file.suffix in packed else data)
    return data


def names(files: list[Path]) -> list[str]:
    return [f.name.partition(".")[0] for f in files]


def test_dependencies_come_first_and_built_in_ones_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "modules.builtin").parent.mkdir(exist_ok=True)
    (tmp_path / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\nkernel/lib/crc16.ko\n")
    module(tmp_path, "drivers/virtio/virtio.ko")
    ring = module(tmp_path, "drivers/virtio/virtio_ring.ko.xz", depends="virtio")
    module(tmp_path, "drivers/char/hw_random/virtio-rng.ko", depends="virtio,virtio_ring")
    module(tmp_path, "fs/erofs.ko.zst", depends="libcrc32c,crc16", soft="pre: crc32c-intel nowhere post: lz4")
    module(tmp_path, "lib/libcrc32c.ko.gz")
    module(tmp_path, "arch/crc32c-intel.ko")
    module(tmp_path, "lib/lz4.ko")
    found = modules_in_load_order(tmp_path, ["virtio_rng", "erofs", "ext4", "virtio"])
    assert names(found) == ["virtio", "virtio_ring", "virtio-rng", "crc32c-intel", "libcrc32c", "erofs"]
    assert read_module(found[1]) == ring


def test_a_missing_module_is_named_with_who_needs_it(tmp_path: Path) -> None:
    module(tmp_path, "a.ko", depends="b")
    with pytest.raises(ImageError, match="no module 'b', which a needs"):
        modules_in_load_order(tmp_path, ["a"])
    with pytest.raises(ImageError, match="no module 'virtio_blk', which the guest needs"):
        modules_in_load_order(tmp_path, ["virtio_blk"])


def test_circular_soft_dependencies_end(tmp_path: Path) -> None:
    module(tmp_path, "a.ko", soft="pre: b")
    module(tmp_path, "b.ko", soft="pre: a")
    assert names(modules_in_load_order(tmp_path, ["a"])) == ["b", "a"]


def test_modules_on_demand_are_found_by_what_the_kernel_asks_for(tmp_path: Path) -> None:
    tun = module(tmp_path, "drivers/net/tun.ko.xz", aliases=("devname:net/tun", "char-major-10-200"))
    module(tmp_path, "net/nft-nat.ko", depends="nf-tables,nf_nat", aliases=("nft-expr-nat",))
    module(tmp_path, "net/nf_nat.ko", depends="nf_conntrack")
    module(tmp_path, "net/nf_conntrack.ko")
    module(tmp_path, "net/nf-tables.ko", soft="pre: crc", aliases=("nfnetlink-subsys-10",))
    module(tmp_path, "lib/crc.ko")
    module(tmp_path, "fs/other.ko", aliases=("fs-other",))
    found = modules_on_demand(tmp_path, ["tun", "nft_nat"])
    assert found["modules.dep"].decode().splitlines() == [
        "tun.ko:", "crc.ko:", "nf_tables.ko: crc.ko", "nf_conntrack.ko:", "nf_nat.ko: nf_conntrack.ko",
        "nft_nat.ko: nf_nat.ko nf_conntrack.ko nf_tables.ko crc.ko",
    ]  # fmt: skip
    assert found["modules.alias"].decode().splitlines() == [
        "alias char-major-10-200 tun", "alias nfnetlink-subsys-10 nf_tables", "alias nft-expr-nat nft_nat"
    ]  # fmt: skip
    assert found["tun.ko"] == tun
    assert "other.ko" not in found
