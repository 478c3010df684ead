"""Which VMs exist on this host, and which processes own them: files below ``state_dir``, and locks in the kernel.

::

    vms/<n>/           everything of VM n: vm.json, and its driver's files
    locks/vm<n>.lock   locked (flock) by the process that owns VM n, as long as that process lives

A VM belongs to the process that holds its lock; the kernel releases the lock however that process ends. ``vms/<n>`` is
made before anything else of VM n, so a directory points at whatever a killed owner leaves. A manual VM
(`swarm-spawn-ns`) outlives its command: no process holds its lock, and it is stale only when its VMM is dead.

This module handles only files and locks. sweep.py removes leftovers (kills the VMM, removes the network).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from swarm.base import files, process
from swarm.base.clock import iso
from swarm.errors import Conflict, HostError, UsageError

MAX_SLOT = 65533


class Kind(StrEnum):
    ATTEMPT = "attempt"  # serves an attempt; ends with its owner
    MANUAL = "manual"  # started by a person; ends by a command


class Busy(Conflict):
    """Another process is looking at, or removing, a leftover in this slot right now: try again shortly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmRecord:
    """``vm.json``: one VM. ``pid`` and ``started`` (clock ticks since boot) name its VMM; 0 before it was started."""

    n: int
    kind: Kind = Kind.ATTEMPT
    pid: int = 0
    started: int = 0
    driver: str = ""
    netns: str = ""
    address: str = ""
    host_key: str = ""  # of its sshd: a line of known_hosts, without the address
    ticket_id: str | None = None
    attempt_id: str | None = None
    sandbox_id: str | None = None
    created_at: str = ""  # ISO-8601, UTC
    owner_pid: int = 0
    owner_started: int = 0
    boot_id: str = ""  # pids mean nothing after a reboot

    @property
    def alive(self) -> bool:
        """Is its VMM running?"""
        return _is_running(self.pid, self.started, self.boot_id)

    @property
    def owner_alive(self) -> bool:
        return _is_running(self.owner_pid, self.owner_started, self.boot_id)


class SlotLease:
    """Slot n, held by this process until `release`, `detach` or `unlock`, or until the process ends.

    ``leftover`` is true if the directory was there before, because an owner died. Then call `sweep.clear` first;
    `record` raises Conflict until then.
    """

    def __init__(self, *, n: int, dir: Path, lock: Path, fd: int, leftover: bool) -> None:
        self.n = n
        self.dir = dir
        self.leftover = leftover
        self._lock = lock
        self._fd = fd
        self.last: VmRecord | None = None if leftover else read_record(dir)

    def create_dir(self) -> None:
        """Make the directory, with a first record, before anything else is made for VM n."""
        pid = os.getpid()
        with files.host_errors(f"can't make {self.dir}"):
            self.dir.mkdir(mode=0o700)
        self.leftover = False
        self.record(
            VmRecord(
                n=self.n,
                created_at=iso(),
                owner_pid=pid,
                owner_started=process.start_time(pid) or 0,
                boot_id=process.boot_id(),
            )
        )

    def record(self, record: VmRecord) -> None:
        """Replace vm.json atomically. Owner, boot and creation time are those of `create_dir` unless given.

        It is not flushed to disk: no VM survives a power failure.
        """
        if self.leftover:
            raise Conflict(f"slot {self.n} still has what a dead owner left: clear it first")
        if not self._holds():
            raise Conflict(f"slot {self.n} was taken away from this process (swarm-cleanup --force) or given back")
        if self.last is not None:
            kept = {
                name: getattr(record, name) or getattr(self.last, name)
                for name in ("created_at", "owner_pid", "owner_started", "boot_id", "host_key")
            }
            record = dataclasses.replace(record, **kept)
        with files.host_errors(f"can't write {self.dir / 'vm.json'}"):
            files.write_atomically(self.dir / "vm.json", json.dumps(dataclasses.asdict(record), indent=1))
        self.last = record

    def detach(self) -> VmRecord:
        """Give up the slot and leave its VM running (kind 'manual'). Its VMM must have been recorded."""
        if self.last is None or not self.last.pid:
            raise Conflict(f"VM {self.n} can't be left running: no VMM process was recorded for it")
        self.record(dataclasses.replace(self.last, kind=Kind.MANUAL))
        self.unlock()
        return self.last

    def remove_dir(self) -> None:
        """Remove the directory; the slot stays held."""
        if self._holds():
            _remove_tree(self.dir)
        self.leftover, self.last = False, None

    def release(self) -> None:
        """Remove the directory and give the slot back. Idempotent; does nothing if the slot was taken away."""
        try:
            if self._holds():
                _remove_tree(self.dir)
                self._lock.unlink(missing_ok=True)
        finally:
            self.unlock()  # a sweep finds what could not be removed

    def _holds(self) -> bool:
        return self._fd >= 0 and _is_file(self._lock, self._fd)

    def unlock(self) -> None:
        """Stop holding the slot; its contents stay. A sweep will remove them, unless it is a manual VM."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stale:
    """A leftover; ``reason`` says why it is one."""

    n: int
    reason: str
    record: VmRecord | None


class Inventory:
    """The VMs below one ``state_dir``. It holds no state, so all instances, in all processes, agree."""

    def __init__(self, *, state_dir: Path) -> None:
        self.state_dir = state_dir
        self._vms = state_dir / "vms"
        self._locks = state_dir / "locks"

    def dir(self, n: int) -> Path:
        return self._vms / str(n)

    def reserve(self, n: int, *, replace: bool = False) -> SlotLease:
        """Take slot n. If it has a ``leftover``, clear it before use: `sweep.take` does both.

        Raises Conflict if a live process owns it, or (without ``replace``) if a manual VM runs there.
        """
        if not 1 <= n <= MAX_SLOT:
            raise UsageError(f"{n} is not a VM number: VMs are numbered from 1 to {MAX_SLOT}")
        fd = self._lock(n)
        if fd is None:
            record = read_record(self.dir(n))
            if record is None or not record.owner_alive or record.kind is Kind.MANUAL:
                raise Busy(f"VM {n} is being removed right now: try again")
            what = f"ticket {record.ticket_id!r}" if record.ticket_id else "a Swarm command"
            if record.sandbox_id:
                what = f"sandbox {record.sandbox_id!r}"
            raise Conflict(
                f"VM {n} is in use by {what} (pid {record.owner_pid}): use another number, or stop that process first"
            )
        try:
            leftover = self.dir(n).exists()
            record = read_record(self.dir(n)) if leftover else None
            if record is not None and record.kind is Kind.MANUAL and record.alive and not replace:
                raise Conflict(f"VM {n} was started manually (pid {record.pid}): remove it with `swarm vm rm {n}`")
            lease = SlotLease(n=n, dir=self.dir(n), lock=self._lock_path(n), fd=fd, leftover=leftover)
        except BaseException:
            self._unlock(n, fd)
            raise
        if not leftover:
            try:
                lease.create_dir()
            except BaseException:  # a full disk, say: nothing half made may stay taken
                with contextlib.suppress(HostError):
                    lease.release()
                raise
        return lease

    def reserve_free(self, first: int) -> SlotLease:
        """Take the first slot from ``first`` upward that is empty: it has not even a leftover."""
        taken = set(self.numbers())
        for n in range(first, MAX_SLOT + 1):
            if n in taken:
                continue
            try:
                lease = self.reserve(n)
            except Conflict:
                continue  # another process was faster
            if not lease.leftover:
                return lease
            lease.unlock()
        raise Conflict(f"no free slot from {first} to {MAX_SLOT}: run swarm-cleanup, or lower first_engine_slot")

    def records(self) -> list[VmRecord]:
        """The readable records of all VMs, by n: live ones, and leftovers that wait for a sweep."""
        return [r for n in self.numbers() if (r := read_record(self.dir(n))) is not None]

    def stale(self) -> list[Stale]:
        """What dead owners left, according to locks and processes, never to names."""
        return [s for n in self.numbers() if (s := self._judge(n)) is not None]

    def held(self) -> dict[int, VmRecord | None]:
        """Slots that a live process owns."""
        found: dict[int, VmRecord | None] = {}
        for n in self.numbers():
            fd = self._lock(n)
            if fd is None:
                found[n] = read_record(self.dir(n))
            else:
                self._unlock(n, fd)
        return found

    def evict(self, n: int) -> SlotLease:
        """Take slot n away from its owner, alive or not (`swarm-cleanup --force`). The old owner's `release` then does
        nothing: its lock is on a file without a name."""
        self._lock_path(n).unlink(missing_ok=True)
        return self.reserve(n, replace=True)

    def numbers(self) -> list[int]:
        """Every slot that has a directory or a lock file."""
        found: set[int] = set()
        for directory, pattern in ((self._vms, r"([1-9][0-9]{0,4})"), (self._locks, r"vm([1-9][0-9]{0,4})\.lock")):
            try:
                found |= {int(m[1]) for entry in directory.iterdir() if (m := re.fullmatch(pattern, entry.name))}
            except FileNotFoundError:
                pass
            except OSError as error:
                raise _unseen(f"can't look into {directory}", error) from error
        return sorted(found)

    # --- files --------------------------------------------------------------------------------------------------------

    def _judge(self, n: int) -> Stale | None:
        fd = self._lock(n)
        if fd is None:
            return None
        try:
            record = read_record(self.dir(n))
            if not self.dir(n).exists():
                return Stale(n=n, reason="a lock file without an owner", record=None)
            if record is None:
                return Stale(n=n, reason="half made: no readable vm.json", record=None)
            if record.kind is Kind.MANUAL:
                return None if record.alive else Stale(n=n, reason=f"its VMM (pid {record.pid}) ended", record=record)
            return Stale(n=n, reason=f"its owner (pid {record.owner_pid}) ended", record=record)
        finally:
            self._unlock(n, fd)

    def _lock_path(self, n: int) -> Path:
        return self._locks / f"vm{n}.lock"

    def _lock(self, n: int) -> int | None:
        """A descriptor that holds the lock; None if another descriptor, of any process or this one, holds it."""
        path = self._lock_path(n)
        with files.host_errors(f"can't use {self.state_dir} (SWARM_STATE_DIR)"):
            for directory in (self.state_dir, self._vms):
                files.make_directory(directory)
            files.make_directory(self._locks, 0o700)
            while (fd := files.try_lock(path, create=0o600)) is not None and not _is_file(path, fd):
                os.close(fd)  # its last owner removed it between our open and our lock
            return fd

    def _unlock(self, n: int, fd: int) -> None:
        """Release a lock that was only tried; if there is no directory, remove its file too."""
        if not self.dir(n).exists() and _is_file(self._lock_path(n), fd):
            self._lock_path(n).unlink(missing_ok=True)
        os.close(fd)


def read_record(dir: Path) -> VmRecord | None:
    """The record in a VM's directory; None if it is missing or unreadable (then the VM is half made)."""
    try:
        data = json.loads(files.read_own(dir / "vm.json"))
        return VmRecord(**{**data, "kind": Kind(data["kind"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        return None
    except OSError as error:
        raise _unseen(f"can't read {dir / 'vm.json'}", error) from error


def _unseen(what: str, error: OSError) -> HostError:
    rights = " (only root may see Swarm's VMs)" if isinstance(error, PermissionError) else ""
    return HostError(f"{what}{rights}: {error.strerror}")


def _is_running(pid: int, started: int, boot: str) -> bool:
    return pid > 0 and process.start_time(pid) == started and boot == process.boot_id()


def _is_file(path: Path, fd: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(fd))
    return False


def _remove_tree(dir: Path) -> None:
    with files.host_errors(f"can't remove {dir}"), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(dir)
