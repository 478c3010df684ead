"""What a PostgreSQL server of the tests needs of the machine."""

from __future__ import annotations

import contextlib

import psutil

from tests.store.databases import PostgresBackend


class ServerUse:
    """CPU seconds and memory of all processes of a server."""

    def __init__(self, backend: PostgresBackend) -> None:
        assert backend.server.process is not None
        self._process = psutil.Process(backend.server.process.pid)

    def cpu(self) -> float:
        own = self._process.cpu_times()
        used = own.user + own.system + own.children_user + own.children_system
        for child in self._process.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = child.cpu_times()
                used += times.user + times.system
        return used

    def memory_mb(self) -> float:
        """Pages that several processes share are counted once (PSS)."""
        total = 0
        for one in (self._process, *self._process.children()):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += one.memory_full_info().pss
        return total / 1e6
