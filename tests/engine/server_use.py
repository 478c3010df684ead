"""What a PostgreSQL server of the tests needs of the machine, and what its connections do."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import psutil
import psycopg

from tests.store.databases import PostgresBackend

_LOOK_SECONDS: Final = 0.05
_ACTIVITY: Final = """
SELECT state, wait_event_type, wait_event, count(*) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND datname = current_database() AND pid <> pg_backend_pid() GROUP BY 1, 2, 3"""


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


@dataclass
class Activity:
    """What the connections were seen to do, at so many moments."""

    looks: int = 0
    most: int = 0
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)

    def mean(self, kind: str) -> float:
        return sum(count for (of, _), count in self.seen.items() if of == kind) / max(self.looks, 1)


@contextlib.contextmanager
def sampled(url: str) -> Iterator[Activity]:
    over, found = threading.Event(), Activity()

    def look() -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            while not over.wait(_LOOK_SECONDS):
                rows = connection.execute(_ACTIVITY).fetchall()
                found.looks += 1
                found.most = max(found.most, sum(row[3] for row in rows))
                for state, kind, event, count in rows:
                    busy = (kind or "running", event or "") if state == "active" else (state or "", "")
                    found.seen[busy] += count

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
