"""PostgreSQL: statements that are sent together, on one way to the server and back.

psycopg's own pipeline waits for the socket before it sends each: that took a quarter of a step's CPU, and on a busy
machine of its time. Here all are written without a wait, as libpq's pipeline mode allows it; psycopg adapts the values.
"""

from __future__ import annotations

import itertools
import re
import select
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeAlias

import psycopg
from psycopg import errors, pq
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq.abc import PGresult

from swarm.store.sql.dialect import Statement

_PARAMETER: Final = re.compile(r"%\((\w+)\)s|%s|%%")
_BOTH: Final = select.POLLIN | select.POLLOUT
_Key: TypeAlias = tuple[bytes, tuple[int, ...]]  # a statement, and the types of its values
_DONE: Final = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK, pq.ExecStatus.EMPTY_QUERY)


@lru_cache(4096)
def _numbered(text: str) -> tuple[bytes, tuple[str, ...]]:
    """As the server takes it, with `$1` for parameters, and their names; '' for `%s`, of which there is one at most."""
    names = dict[str, str]()

    def one(found: re.Match[str]) -> str:
        return "%" if found[0] == "%%" else names.setdefault(found[1] or "", f"${len(names) + 1}")

    return _PARAMETER.sub(one, text).encode(), tuple(names)


@dataclass(frozen=True, slots=True)
class _Message:
    query: bytes
    values: Sequence[Any] | None
    types: Sequence[int]
    formats: Sequence[Any] | None
    prepare: bool


def _message(dumping: Any, statement: Statement) -> _Message:
    text, values, prepare = statement
    query, names = _numbered(text)
    if not names:
        return _Message(query, None, (), None, prepare)
    ordered = [values[name] for name in names] if isinstance(values, Mapping) else values
    dumped = dumping.dump_sequence(ordered, [PyFormat.AUTO] * len(ordered))
    return _Message(query, dumped, dumping.types, dumping.formats, prepare)


def _error(result: PGresult) -> Exception:
    if result.error_field(pq.DiagnosticField.SQLSTATE) is not None:
        return errors.error_from_result(result)
    said = result.get_error_message()  # libpq's own
    return MemoryError(said) if "memory" in said else psycopg.OperationalError(said)


class Answer:
    """As a cursor, of rows that are all there."""

    def __init__(self, connection: psycopg.Connection[Any], result: PGresult) -> None:
        self._result, self._connection = result, connection

    @property
    def description(self) -> list[tuple[str]]:
        return [((self._result.fname(number) or b"").decode(),) for number in range(self._result.nfields)]

    @property
    def statusmessage(self) -> str:
        return (self._result.command_status or b"").decode()

    def _loading(self) -> Any:
        loading: Any = Transformer(self._connection)
        loading.set_pgresult(self._result)
        return loading

    def fetchall(self) -> list[tuple[Any, ...]]:
        count = self._result.ntuples
        return list(self._loading().load_rows(0, count, tuple)) if count else []

    def fetchone(self) -> tuple[Any, ...] | None:
        return next(iter(self), None)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        loading = self._loading()
        for number in range(self._result.ntuples):
            yield loading.load_row(number, tuple)


class Exchange(psycopg.Connection[tuple[Any, ...]]):
    """A connection that also sends statements together. One thread uses it."""

    most_known = 512  # statements; the oldest is forgotten

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.prepares = True
        # psycopg's own are off: with them, it removes all of a session's now and then, also ours.
        self.prepare_threshold = None
        self._known = dict[_Key, bytes]()  # names of prepared statements; b'': it was sent once so far
        self._forgotten, self._made = list[str](), 0

    def exchange(self, statements: Sequence[Statement]) -> tuple[list[Answer], Exception | None]:
        """Their answers up to the first error, and that error: nothing is executed after it. Raises psycopg.Error for
        values that can't be sent, before anything is."""
        if self.closed:
            return [], psycopg.OperationalError("the connection is closed")
        dumping, forgotten = Transformer(self), self._forgotten[:]
        messages = [_message(dumping, one) for one in statements]
        messages += [_message(dumping, (f"DEALLOCATE {name}", (), False)) for name in forgotten]
        new, sent, results = dict[_Key, bytes](), list[_Key | None](), list[PGresult]()
        lost = error = None
        try:
            self.pgconn.enter_pipeline_mode()
            for message in messages:
                self._send(message, new, sent)
                self.pgconn.flush()  # so that the server begins meanwhile
            self.pgconn.pipeline_sync()
            self._receive(results)
            self.pgconn.exit_pipeline_mode()
        except psycopg.Error as broken:
            lost = broken
            if self.pgconn.status != pq.ConnStatus.OK:  # whatever was refused because of that
                lost = psycopg.OperationalError(f"the connection is lost: {self.pgconn.get_error_message()}")
        answers = list[Answer]()
        # One result more is that of the end: an error of what runs outside a transaction.
        for key, result in itertools.zip_longest(sent[: len(results)], results):
            if result.status not in _DONE:
                error = _error(result)
                break
            if key is not None:
                self._known[key] = new[key]
            else:
                answers.append(Answer(self, result))
        del self._forgotten[: max(0, len(answers) - len(statements))]
        return answers[: len(statements)], error or lost

    def _send(self, message: _Message, new: dict[_Key, bytes], sent: list[_Key | None]) -> None:
        server, key = self.pgconn, (message.query, tuple(message.types))
        name = None
        if message.prepare and self.prepares:
            if (name := self._known.pop(key, None)) is None:
                self._forget_oldest()
            self._known[key] = name or b""  # the latest one
        if name is None:
            server.send_query_params(message.query, message.values, message.types, message.formats)
        else:
            if not (name := name or new.get(key, b"")):
                self._made += 1
                name = new[key] = b"swarm_%d" % self._made
                server.send_prepare(name, message.query, message.types)
                sent.append(key)
            server.send_query_prepared(name, message.values, message.formats)
        sent.append(None)

    def _forget_oldest(self) -> None:
        if len(self._known) >= self.most_known and (name := self._known.pop(next(iter(self._known)))):
            self._forgotten.append(name.decode())

    def _receive(self, results: list[PGresult]) -> None:
        """Write the rest, and read until all is answered. Raises psycopg.OperationalError if the connection is lost."""
        server, poller = self.pgconn, select.poll()
        poller.register(server.socket, _BOTH if server.flush() else select.POLLIN)
        while True:
            while not server.is_busy():
                if (result := server.get_result()) is None:
                    if server.status != pq.ConnStatus.OK:  # there is nothing but None from now on
                        raise psycopg.OperationalError("the connection is lost")
                    continue
                if result.status == pq.ExecStatus.PIPELINE_SYNC:
                    return
                results.append(result)
            poller.poll()
            server.consume_input()
            poller.modify(server.socket, _BOTH if server.flush() else select.POLLIN)
