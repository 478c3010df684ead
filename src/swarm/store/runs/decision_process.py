"""Makes the decisions that read or make much, in a process of its own: Python's threads share one lock, so that all
tickets would wait for such a decision on a thread of the engine.

It has the engine's rights, and reads the database by a connection of its own. What a tenant wrote is read here as it is
on a thread of the engine, and run only in the jail, of which this process has one.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from swarm import __version__
from swarm.base import confined, priority
from swarm.base.confined import Confined, Killed, Stopped
from swarm.errors import StoreError, SwarmError
from swarm.store.runs.decision import Decided
from swarm.store.runs.definitions import Definitions
from swarm.store.runs.items import Batch
from swarm.store.runs.limits import IN_PROCESS
from swarm.store.runs.workflow_engine import WorkflowEngine
from swarm.store.sql.connection import Connection
from swarm.store.sql.database import Database
from swarm.store.tickets.isolation import Isolation

_CPU_SECONDS: Final = 60.0  # the largest decision that is allowed takes a few
_MEMORY_BYTES: Final = 2 << 30
_REPLY_BYTES: Final = confined.MAX_BYTES - (1 << 20)


class _TooMuch(Exception):
    pass


class DecisionProcess(Confined):
    """Thread-safe. The process starts when first needed."""

    def __init__(self, db: Database) -> None:
        super().__init__(
            "swarm.store.runs.decision_process",
            cpu_seconds=_CPU_SECONDS,
            memory_bytes=_MEMORY_BYTES,
            lower_by=priority.BELOW_VMS,
            patience_seconds=600.0,
            env=os.environ,  # libpq has settings there
        )
        self._db = db

    def decide(self, basis: Decided, definitions: Definitions) -> tuple[Decided | None, Iterable[Batch]]:
        """The decision that was too expensive elsewhere, and what is to be written ahead of it; None if there is
        nothing to decide any more. Raises StoreError and, for values that other programs wrote, ValueError."""
        request = pickle.dumps((__version__, *self._db.address, basis.run_id))
        try:
            _, [reply, *batches] = self.ask({}, [request])
        except (OSError, Killed) as error:  # no process can be started; or one was killed, and may not be next time
            why = error.strerror if isinstance(error, OSError) else "it was killed twice"
            raise StoreError(f"the process that decides does not run: {why}") from None
        except Stopped as error:
            return replace(basis, failure=f"its next steps can't be decided: that {error}"), ()
        decided, frozen = pickle.loads(reply)  # our own program's, with our own rights
        if isinstance(decided, Exception):
            raise decided
        if isinstance(decided, str):
            return replace(basis, failure=decided), ()
        if frozen is not None:
            decided = replace(decided, definition=definitions.of_text(*frozen))
        # One after the other, since other threads wait meanwhile.
        return decided, map(pickle.loads, batches)


# --- in the process itself --------------------------------------------------------------------------------------------


class _Decider:
    def __init__(self) -> None:
        self._engine = WorkflowEngine(planning_seconds=0, isolation=Isolation())
        self._opened: tuple[Database, Connection] | None = None

    def answer(self, request: dict[str, Any], parts: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        replies: list[bytes]
        try:
            replies = self._replies(*pickle.loads(parts.pop()))
        except (MemoryError, _TooMuch):
            self._engine.definitions = Definitions()  # without what it has kept
            replies = []
        except SwarmError as error:
            replies = [pickle.dumps((StoreError(str(error)), None))]
        except ValueError as error:
            replies = [pickle.dumps((ValueError(str(error)), None))]
        except Exception as error:
            kind = ValueError if isinstance(error, TypeError | LookupError | AttributeError) else RuntimeError
            replies = [pickle.dumps((kind(f"{type(error).__name__}: {error}"), None))]
        if not 0 < sum(map(len, replies)) <= _REPLY_BYTES:
            most = f"{_MEMORY_BYTES >> 20} MiB of memory or {_REPLY_BYTES >> 20} MiB of rows"
            replies = [pickle.dumps((f"its next steps can't be decided: that takes more than {most}", None))]
        return {}, replies

    def close(self) -> None:
        self._drop()
        self._engine.close()

    def _replies(self, version: str, url: str, busy_timeout_seconds: float, run_id: str) -> list[bytes]:
        if version != __version__:
            raise StoreError(f"Swarm {__version__} was installed while {version} runs: start the engine again")
        (decided, batches), frozen = self._decided(url, busy_timeout_seconds, run_id), None
        if decided is not None and decided.definition is not None:
            frozen = decided.definition.digest, decided.definition.text
            decided = replace(decided, definition=None)
        return [pickle.dumps((decided, frozen)), *map(pickle.dumps, batches)]

    def _decided(self, url: str, busy_timeout_seconds: float, run_id: str) -> tuple[Decided | None, Sequence[Batch]]:
        fresh = self._opened is None
        try:
            db, connection = self._opened or self._open(Database(url, busy_timeout_seconds=busy_timeout_seconds))
            with db.transaction(connection) as tx:
                try:
                    return self._engine.decide(tx, run_id, IN_PROCESS)
                except MemoryError:  # not the database's
                    raise _TooMuch from None
        except BaseException as error:
            self._drop()
            if fresh or not isinstance(error, StoreError):
                raise
        return self._decided(url, busy_timeout_seconds, run_id)  # the server may have ended the connection since

    def _open(self, db: Database) -> tuple[Database, Connection]:
        if not db.exists():
            raise StoreError(f"the database {db.place} does not exist; run `swarm init`")
        self._opened = db, db.connect(write=False)
        db.check_revision(self._opened[1])
        return self._opened

    def _drop(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened[1].close()


def main() -> None:
    with contextlib.closing(_Decider()) as decider:
        confined.serve(decider.answer, cpu_seconds=_CPU_SECONDS, memory_bytes=_MEMORY_BYTES, keeps_rights=True)


if __name__ == "__main__":
    main()
