"""The memory of a guest whose VMM maps a file privately: the file, and the pages that were written since.

The kernel says which pages of a private mapping are the process's own (/proc/pid/pagemap). So a copy of such a memory
is a copy of the file, made while the guest runs, with these pages written over it: nothing has to be asked of the VMM,
and nothing is compared with what nobody could have changed.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from swarm.base import sparse
from swarm.errors import BootFailed

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_BATCH_PAGES = 1024
_RUN_PAGES = 16  # pages of the file between two of the process's own are read too, if they are fewer
# Of an entry (8 bytes, little-endian) the last byte has: present, swapped, and "of a file or shared". A page that was
# never touched has none of them. (Documentation/admin-guide/mm/pagemap.rst)
_PRESENT, _SWAPPED, _FILE = 0x80, 0x40, 0x20
_OWN = bytes(int(bool(top & (_PRESENT | _SWAPPED)) and not top & _FILE) for top in range(256))
_OWN_RUNS = re.compile(rb"\x01+(?:\x00{1,%d}\x01+)*" % _RUN_PAGES)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestMemory:
    """``file`` is a descriptor of the file that process ``pid`` maps privately as its guest's memory."""

    pid: int
    file: int

    def overlay(self, target: int, check: Callable[[], None]) -> int:
        """Write the pages that the VMM has of its own, as far as they differ, over ``target``, a copy of the file or an
        older copy of this memory. Returns how many bytes were written. Raises OSError, BootFailed."""
        written = 0
        try:
            fd = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(error) from error
        try:
            for address, offset, size in self._own_parts():
                check()
                data = os.pread(fd, size, address)
                if len(data) != size:
                    raise BootFailed("the VMM's memory could not be read whole")
                written += sparse.write_differing(target, offset, data)
        finally:
            os.close(fd)
        return written

    def used_bytes(self) -> int:
        """What a copy takes on disk, at most."""
        return sparse.used_bytes(self.file) + sum(size for _, _, size in self._own_parts())

    def _own_parts(self) -> Iterator[tuple[int, int, int]]:
        """(address, offset in the file, size) of the parts that have pages of the process's own."""
        found = 0
        try:
            pagemap = os.open(f"/proc/{self.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(error) from error
        try:
            for start, end, offset in self._mappings():
                found += end - start
                for batch in range(start, end, _BATCH_PAGES * _PAGE_BYTES):
                    pages = min(_BATCH_PAGES, (end - batch) // _PAGE_BYTES)
                    entries = os.pread(pagemap, pages * 8, batch // _PAGE_BYTES * 8)
                    if len(entries) != pages * 8:
                        raise BootFailed("the VMM's pages could not be listed whole")
                    for run in _OWN_RUNS.finditer(entries[7::8].translate(_OWN)):
                        at = batch + run.start() * _PAGE_BYTES
                        yield at, at - start + offset, (run.end() - run.start()) * _PAGE_BYTES
        finally:
            os.close(pagemap)
        if found != os.fstat(self.file).st_size:
            raise BootFailed("the guest's memory was not found in its VMM")

    def _mappings(self) -> list[tuple[int, int, int]]:
        """(start, end, offset in the file) of each private, writable mapping of the file."""
        inode = str(os.fstat(self.file).st_ino)
        found = []
        try:
            with open(f"/proc/{self.pid}/maps", "rb") as file:
                lines = file.read().decode(errors="replace").splitlines()
        except OSError as error:
            raise _unreadable(error) from error
        for line in lines:  # 7f…-7f… rw-p 00000000 fe:00 1234   /memory
            span, rights, offset, _, number, *_ = line.split(maxsplit=5)
            if number == inode and rights.startswith("rw") and rights.endswith("p"):
                start, _, end = span.partition("-")
                found.append((int(start, 16), int(end, 16), int(offset, 16)))
        return found


def _unreadable(error: OSError) -> BootFailed:
    if error.errno in (errno.ENOENT, errno.ESRCH):
        return BootFailed("the VM ended meanwhile")
    return BootFailed(
        f"can't read the memory of the VM's process ({error.strerror}): Swarm needs CAP_SYS_PTRACE, and "
        "kernel.yama.ptrace_scope below 3"
    )
