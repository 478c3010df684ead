"""PostgreSQL (14 or newer): its clock, connections and errors. Loaded only for a database of that kind: psycopg is an
extra.

Transactions are serializable: PostgreSQL refuses one whose reads another transaction has made untrue, and it runs
again, as it does on SQLite when another program wrote.
"""

from __future__ import annotations

import itertools
import logging
import re
import select
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager
from functools import lru_cache
from typing import Any, Final

import psycopg
from psycopg import errors
from psycopg.adapt import Loader
from psycopg.types.string import TextLoader

from swarm.errors import StoreError, UsageError
from swarm.store.sql.dialect import NOT_MIGRATED, OUT_OF_MEMORY, Dialect, said, without_password
from swarm.store.sql.exchange import Exchange
from swarm.store.sql.listen import Listener, Pooled
from swarm.store.sql.together import together
from swarm.store.sql.wake import Wake

OLDEST: Final = 140000  # PQserverVersion of the oldest that Swarm knows

_FULL: Final = (
    "the database {place} has no connection left for Swarm: raise max_connections, or put pgbouncer before it"
)
# Who is refused at the door learns no more than this text, from PostgreSQL or from pgbouncer.
_IS_FULL: Final = re.compile(r"too many (clients|connections)|connection slots are reserved|no more connections")
_FOR_ALL: Final = (
    "in the database {place}, every role may make functions in the schema {schema}, and they would run with Swarm's "
    "rights: as the schema's owner, REVOKE CREATE ON SCHEMA {schema} FROM PUBLIC (PostgreSQL 14 allows it by itself)"
)
_STANDBY: Final = (
    "the database {place} is read-only: is it a standby? Let the URL name the primary (several hosts and "
    "target_session_attrs=read-write find it)"
)
_POOLED: Final = (
    "the database {place} is reached through a pooler (pgbouncer) in transaction mode, through which no notices of "
    "changes come: give engines and servers a direct connection, or let it have pool_mode = session"
)
_LOST: Final = "the connection to the database {place} was lost ({error})"
_IS_LOST: Final = re.compile(r"(consuming input|flushing) failed|closed the connection|connection is (closed|lost)")
# The first match of the error's class counts (Appendix A of PostgreSQL's manual).
_ERRORS: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (("40001", "40P01", "55P03"), "the database {place} is busy: other transactions have come between for {busy:g} s"),
    (("25006",), _STANDBY),
    (
        ("53100",),
        "no space for the database {place}: its server's disk is full; nothing of this transaction was written",
    ),
    (("53300",), _FULL),
    (("53200",), OUT_OF_MEMORY),
    (("57014",), "the database {place} ended a statement that took too long (statement_timeout)"),
    (
        ("42501",),
        "the user of {place} may not do this ({error}); an engine's user needs all rights on Swarm's tables",
    ),
    (("42P01", "42703", "42883"), NOT_MIGRATED),
    (("XX001", "XX002"), "the database {place} is damaged ({error}); restore a backup"),
    (("08", "57P", "25P03"), _LOST),
    (("53",), "the database {place} is out of resources ({error})"),
)
_ESCAPES: Final = "a '%' in its user or password is written %25, an '@' %40, a '/' %2F, a ':' %3A, a space %20"
_UNREACHABLE: Final = "can't reach the database {place} ({error}); is it running, and are address and password right?"


_numbers: Final = itertools.count()


class _Number(Loader):
    """NUMERIC, which sums of whole numbers are, as Python's own numbers."""

    def load(self, data: bytes | bytearray | memoryview) -> int | float:
        text = bytes(data).decode()
        return int(text) if text.lstrip("-").isdigit() else float(text)


def _parsed(url: str) -> dict[str, Any]:
    scheme, _, rest = url.partition("://")
    return psycopg.conninfo.conninfo_to_dict(f"{scheme.partition('+')[0]}://{rest}")


def _parameters(url: str) -> dict[str, Any]:
    """Of `psycopg.connect`. Raises UsageError."""
    told = without_password(url)
    try:
        parameters = _parsed(url)
        # libpq's own words about what follows a password that ends too early would be the rest of that.
        hosts, ports = (str(parameters.get(name) or "").split(",") for name in ("host", "port"))
        if any("@" in host[1:] for host in hosts if host[:1] != "/") or not all(
            port.isdecimal() for port in filter(None, ports)
        ):
            raise UsageError(f"bad database URL {told!r}: {_ESCAPES}")
    except psycopg.Error:
        try:
            _parsed(told)
            why = _ESCAPES
        except psycopg.Error as error:
            why = str(error).strip()
        raise UsageError(f"bad database URL {told!r}: {why}") from None
    return {
        "application_name": "swarm",
        "connect_timeout": 10,
        # A server that is gone, or cut off, is noticed within seconds, not by the kernel's two hours.
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 15000,
    } | parameters


def _connect(url: str, write: bool, busy_timeout_seconds: float) -> Any:
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # it warns of what it raises too
    connection = Exchange.connect(**_parameters(url), autocommit=True)  # transactions begin when we say so
    try:
        _prepare(connection, write, busy_timeout_seconds)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: Any, write: bool, busy_timeout_seconds: float) -> None:
    place = f"{connection.info.host or 'localhost'}/{connection.info.dbname}"
    if connection.info.server_version < OLDEST:
        raise StoreError(f"the database {place} is PostgreSQL {connection.info.server_version // 10000}; 14 is needed")
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise StoreError(f"the database {place} has the encoding {encoding}; make it anew with ENCODING 'UTF8'")
    if write and connection.info.parameter_status("in_hot_standby") == "on":
        # Its own words are that it knows no serializable transactions.
        raise errors.ReadOnlySqlTransaction("it is a standby")
    connection.adapters.register_loader("numeric", _Number)
    for name in ("json", "jsonb"):
        connection.adapters.register_loader(name, TextLoader)
    settings = {
        "lock_timeout": f"{int(busy_timeout_seconds * 1000)}ms",
        "idle_session_timeout": "0",  # an engine with nothing to do keeps its connections
        "idle_in_transaction_session_timeout": "60s",  # of a frozen engine: its locks may not stop the others
        "client_encoding": "UTF8",
        "TimeZone": "UTC",
        "swarm.tells": "on",
    }
    each = ", ".join(["pg_catalog.set_config(%s, %s, false)"] * len(settings))
    # A pooler tells a pid of its own. In transaction mode, its sessions are everybody's: nothing may be prepared in
    # them, and none may stay read-only.
    pid, read_only = connection.info.backend_pid, "off" if write else "on"
    direct, *_, schema = connection.execute(
        f"SELECT {_IS_DIRECT}, {each}, pg_catalog.set_config('default_transaction_read_only', %s, NOT {_IS_DIRECT}), "
        f"{_ONE_SCHEMA}, {_OPEN}",
        [pid, *itertools.chain(*settings.items()), read_only, pid],
    ).fetchone()
    if schema is not None:
        raise StoreError(_FOR_ALL.format(place=place, schema=schema))
    connection.prepares = direct


# A function or an operator that another role makes in a schema of ours runs with our rights, where its types fit better
# than those of PostgreSQL's own. So ours is the only schema, and nobody may make one there; this itself names the
# schema of each function, and has operators with the very types that PostgreSQL's own have.
_IS_DIRECT: Final = "(pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) CAST(%s AS pg_catalog.int4))"
_SCHEMA: Final = "CAST(pg_catalog.current_schema() AS pg_catalog.text)"
_ONE_SCHEMA: Final = f"pg_catalog.set_config('search_path', pg_catalog.quote_ident({_SCHEMA}), false)"
_OPEN: Final = f"""(SELECT pg_catalog.quote_ident({_SCHEMA})
  FROM pg_catalog.pg_namespace n, pg_catalog.aclexplode(n.nspacl) a
  WHERE CAST(n.nspname AS pg_catalog.text) OPERATOR(pg_catalog.=) {_SCHEMA}
  AND a.grantee OPERATOR(pg_catalog.=) CAST(0 AS pg_catalog.oid)
  AND a.privilege_type OPERATOR(pg_catalog.=) CAST('CREATE' AS pg_catalog.text))"""

# Text in quotes, which stays; or what is written otherwise here. `number >= ''` asks whether it is a text.
_DIFFERENT: Final = re.compile(
    r"""
    (?P<number>[\w.]+[ ](?P<text>>=|<)[ ]'')
    | (?P<quoted>'(?:[^']|'')*')
    | (?<![:\w]):(?P<name>[a-z_]\w*)
    | (?P<percent>%)
    | \bIS[ ](?P<no>NOT[ ])?(?=:)
    | \binstr\( | \bCROSS[ ]JOIN\b
    """,
    re.X,
)
# CROSS JOIN: to SQLite, the order in which it reads the tables.
_OTHER_WORDS: Final = {"instr(": "strpos(", "CROSS JOIN": "JOIN"}
_OWN: Final = re.compile(r"/\*\+ (.*?) \*/|/\*-\*/.*?/\*-\*/", re.S)


@lru_cache(4096)
def translate(sql: str) -> str:
    """As psycopg takes it. `/*+ … */` is SQL for PostgreSQL alone; what is between two `/*-*/` is for all others."""

    def one(found: re.Match[str]) -> str:
        if found["number"] is not None:
            return "false" if found["text"] == ">=" else "true"
        if found["quoted"] is not None:
            return found["quoted"].replace("%", "%%")
        if found["name"] is not None:
            return f"%({found['name']})s"
        if found["percent"] is not None:
            return "%%"
        if found[0] in _OTHER_WORDS:
            return _OTHER_WORDS[found[0]]
        return "IS DISTINCT FROM " if found["no"] else "IS NOT DISTINCT FROM "

    return _DIFFERENT.sub(one, _OWN.sub(lambda found: found[1] or "", sql))


# The text is no number: so the transaction ends there, and the COMMIT that is sent after it doesn't count.
_CHECKED: Final = (
    "WITH changed AS ({text} RETURNING 1) SELECT CASE count(*) WHEN {count} THEN 1 ELSE CAST("
    "'a trigger ignored it, or removed the row (' || count(*) || ' of {count})' AS integer) END FROM changed"
)


def _changes(
    connection: Any, sql: str, rows: Sequence[Mapping[str, Any]], one_row: bool
) -> tuple[str, Sequence[Any], bool]:
    found = together(connection, sql, rows)
    text = found[0] if found is not None else translate(sql)
    if one_row:
        text = _CHECKED.format(text=text, count=len(rows) if found is not None else 1)
    return (text, found[1], False) if found is not None else (text, rows, True)


_OPEN_TRANSACTION: Final = (psycopg.pq.TransactionStatus.INTRANS, psycopg.pq.TransactionStatus.INERROR)


def _roll_back(connection: Any) -> None:
    """psycopg's own would also remove all prepared statements."""
    if connection.info.transaction_status in _OPEN_TRANSACTION:
        done = connection.pgconn.exec_(b"ROLLBACK")
        if done.status != psycopg.pq.ExecStatus.COMMAND_OK:
            raise psycopg.OperationalError(done.get_error_message())
    else:
        connection.rollback()


def _explain(error: BaseException) -> str | None:
    if not isinstance(error, psycopg.Error):
        return None
    if isinstance(error, Pooled):
        return _POOLED
    code = error.sqlstate
    if code is None:
        # libpq's own: no connection, or one that broke
        if not isinstance(error, psycopg.OperationalError):
            return None
        return _FULL if _IS_FULL.search(str(error)) else _LOST if _IS_LOST.search(str(error)) else _UNREACHABLE
    for prefixes, text in _ERRORS:
        if code.startswith(prefixes):
            return text
    if code.startswith("28") or code == "3D000":  # who may log in; no such database
        return _UNREACHABLE
    return None


def _is_stale(connection: Any) -> bool:
    """A server that was asked nothing says nothing but that it ends the connection."""
    poller = select.poll()
    try:
        poller.register(connection.pgconn.socket, select.POLLIN)
    except psycopg.Error:  # it is closed
        return True
    return bool(poller.poll(0))


def _is_locked(error: BaseException | None) -> bool:
    return isinstance(error, errors.SerializationFailure | errors.DeadlockDetected | errors.LockNotAvailable)


# Those with a trigger `*_notify`, for other programs' changes. Ours switch it off (`swarm.tells`), and tell after their
# COMMIT: NOTIFY in a transaction holds a lock of the whole database until its COMMIT is on the disk.
TOLD: Final = frozenset(
    ("tickets", "ticket_dependencies", "agents", "workflows", "schedules", "workflow_runs", "step_executions")
) | {"attempts", "events", "sandboxes", "snapshots"}


def _tell(tables: AbstractSet[str]) -> str | None:
    if TOLD.isdisjoint(tables):
        return None
    events = " || ':events'" if tables == {"events"} else ""
    return f"SELECT pg_notify('swarm', current_schema(){events})"


def _watching(url: str, events: bool) -> AbstractAsyncContextManager[Wake]:
    def told(error: BaseException) -> str:
        return (_explain(error) or "can't watch the database {place}: {error}").format(
            place=without_password(url), error=said(error), busy=0.0
        )

    return Listener.watching(_parameters(url), told, events=events)


# `them`: transactions with lower numbers.
_NEWEST_EVENT: Final = """
SELECT COALESCE((SELECT max(seq) FROM events), 0) AS seq,
  CASE WHEN pg_snapshot_xmin(s) < pg_snapshot_xmax(s) THEN CAST(pg_snapshot_xmax(s) AS text) ELSE '' END AS them
FROM pg_current_snapshot() s"""
# Whoever wrote an event has its table locked until the end; pg_locks has the last 32 bits of a transaction's number.
_NUMBER: Final = "CAST(CAST(own.transactionid AS text) AS bigint)"
_HAS_ENDED: Final = f"""
SELECT pg_snapshot_xmin(pg_current_snapshot()) >= CAST(CAST(:them AS text) AS xid8) OR NOT EXISTS (
  SELECT 1 FROM pg_locks l JOIN pg_locks own ON own.virtualtransaction = l.virtualtransaction
  WHERE l.locktype = 'relation' AND l.relation = CAST('events' AS regclass) AND l.mode = 'RowExclusiveLock'
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND own.locktype = 'transactionid' AND own.mode = 'ExclusiveLock'
    AND (({_NUMBER} - CAST(CAST(:them AS text) AS bigint)) & 4294967295) >= 2147483648
    AND (({_NUMBER} - CAST(CAST(:since AS text) AS bigint)) & 4294967295) < 2147483648) AS ended"""

# A number that was not given away before this transaction's is one that a fail-over has lost.
_BECAME: Final = """
SELECT CASE WHEN CAST(CAST(:id AS text) AS xid8) < pg_current_xact_id()
  THEN pg_xact_status(CAST(CAST(:id AS text) AS xid8)) END AS became"""

_OURS: Final = "CAST(quote_ident(current_schema()) AS regnamespace)"  # the schema that Swarm's tables are in

POSTGRESQL: Final = Dialect(
    name="postgresql",
    driver="postgresql+psycopg",
    # An offset that another program removed counts as 0, one beyond all dates as the last one possible.
    now_ms="(CAST(floor(extract(epoch FROM clock_timestamp()) * 1000) AS bigint) + COALESCE((SELECT "
    "greatest(least(offset_ms, 10000000000000), -1000000000000) FROM clock LIMIT 1), 0))",
    # Every transaction that began or ended changes it: own ones too, which costs a look at what changed.
    written_by_others="hashtextextended(CAST(pg_current_snapshot() AS text), 0)",
    columns="SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = current_schema()",
    has_revision="SELECT 1 AS found FROM pg_class WHERE relname = 'alembic_version' "  # the standard's view costs more
    f"AND relnamespace = {_OURS}",
    names=f"SELECT relname AS name FROM pg_class WHERE relnamespace = {_OURS} "
    "UNION ALL SELECT t.tgname FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid "
    f"WHERE c.relnamespace = {_OURS} AND t.tgenabled <> 'D' AND NOT t.tgisinternal",
    untraced="SELECT NOT EXISTS (SELECT 1 FROM pg_trigger WHERE tgrelid = CAST(:table AS regclass) "
    "AND tgname = :table || '_deleted' AND tgenabled <> 'D') AS untraced",
    tidy=None,
    begin_write="BEGIN ISOLATION LEVEL SERIALIZABLE READ WRITE",
    begin_optimistic="BEGIN ISOLATION LEVEL SERIALIZABLE READ WRITE",
    begin_shared="BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE",
    begin_read="BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
    roll_back=_roll_back,
    # Migrations of two processes, one after the other.
    begin_migration="BEGIN READ WRITE; SELECT pg_advisory_xact_lock(hashtext('swarm migration'))",
    newest_event=_NEWEST_EVENT,
    has_ended=_HAS_ENDED,
    tell=_tell,
    number="SELECT CAST(pg_current_xact_id() AS text) AS number",
    became=_BECAME,
    lock=None,
    warm_up=None,
    tries=None,
    # Not for long: whoever writes after this one waits behind it.
    alone=(
        "SET LOCAL lock_timeout = '100ms'",
        "LOCK TABLE tickets, ticket_dependencies IN SHARE ROW EXCLUSIVE MODE",
    ),
    translate=translate,
    streaming=lambda connection: connection.cursor(name=f"swarm_{next(_numbers)}"),  # the server keeps the rows
    exchange=lambda connection, statements: connection.exchange(statements),
    changes=_changes,
    connect=_connect,
    watching=_watching,
    file=lambda url: None,
    driver_error=psycopg.Error,
    explain=_explain,
    is_locked=_is_locked,
    is_stale=_is_stale,
)
