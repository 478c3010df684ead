"""A PostgreSQL server for the tests: this machine's own programs, a data directory of its own, a Unix socket alone.

``python -m tests.postgres_here`` installs Debian's package where there is none (once); status 1 with a line if that
fails. It starts no server, leaves none, and changes no file of an administrator.
"""
# ruff: noqa: T201 - a command

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg

INITDB = ("-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
# No test is about a power failure of its machine.
REPLICATED = {
    "wal_level": "replica",
    "max_wal_senders": "4",
    "wal_keep_size": "1GB",
    "wal_retrieve_retry_interval": "200ms",
}
CHEAP = {"fsync": "off", "full_page_writes": "off", "wal_level": "minimal", "max_wal_senders": "0"} | {
    "autovacuum": "off",
    "jit": "off",
    "shared_buffers": "16MB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "1h",
}
USER = "postgres"  # the server refuses to run as root; Debian's package makes this user


def programs() -> Path | None:
    """The directory of `initdb` and `postgres`, of the newest version; None if there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parents[1].name))
    return found[-1].parent if found else None


def lacks() -> str:
    return "" if programs() else "needs Debian's PostgreSQL: run `python -m tests.postgres_here`, as root"


class NotInstalled(Exception):
    """Why not."""


def install() -> None:
    """Raises NotInstalled, OSError, CalledProcessError."""
    if programs() is not None:
        return
    if os.geteuid() != 0:
        raise NotInstalled("run this as root")
    if found := sorted(Path("/etc/postgresql").glob("*/*/postgresql.conf")):
        raise NotInstalled(f"{found[0].parent} is of a server that was removed: its package would start it again")
    with contextlib.suppress(subprocess.CalledProcessError):  # one source fails: perhaps it is not needed
        _apt("update")
    _apt("install", "postgresql-common")
    with without_cluster(Path("/etc/postgresql-common")):
        _apt("install", "postgresql")


@contextmanager
def without_cluster(settings: Path) -> Iterator[None]:
    """Meanwhile, the package of a server makes no cluster. ``settings``: of postgresql-common, which reads every file
    of `createcluster.d`, so that none that is there is changed."""
    directory = settings / "createcluster.d"
    own, made = directory / "swarm-tests.conf", not directory.exists()
    directory.mkdir(exist_ok=True)
    try:
        own.write_text("create_main_cluster = false\n")
        # As the package asks.
        asked = ["pg_conftool", str(settings / "createcluster.conf"), "show", "-bs", "create_main_cluster"]
        if subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() != "off":
            raise NotInstalled(f"{settings}/createcluster.conf would have its package start a server")
        yield
    finally:
        own.unlink(missing_ok=True)
        if made:
            directory.rmdir()


def _apt(verb: str, *packages: str) -> None:
    options = ["-qq", "--yes", "--no-install-recommends"] if packages else ["-qq"]
    subprocess.run(
        ["apt-get", "-o", "DPkg::Lock::Timeout=300", verb, *options, *packages],
        check=True,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_SUSPEND": "1"},
    )


class Server:
    """Use `running`."""

    def __init__(self, programs: Path, directory: Path, settings: dict[str, str]) -> None:
        self.programs, self.directory, self.settings = programs, directory, CHEAP | settings
        self.data = directory / "data"
        self.process: subprocess.Popen[bytes] | None = None

    def url(self, database: str = "postgres", *, user: str = USER) -> str:
        return f"postgresql://{user}@/{database}?host={self.directory}"

    def start(self) -> None:
        """On a thread that stays: the server ends with it."""
        chosen = {"listen_addresses": "", "unix_socket_directories": str(self.directory)} | self.settings
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                as_user(
                    self.programs / "postgres",
                    "-D",
                    self.data,
                    *(f"-c{name}={value}" for name, value in chosen.items()),
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while self._asked() != 0:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{self._log()}")
            time.sleep(0.05)

    def _log(self) -> str:
        return (self.directory / "log").read_text()[-3000:]

    def _asked(self) -> int:
        return subprocess.run(
            [self.programs / "pg_isready", "-q", "-h", self.directory], stdin=subprocess.DEVNULL, check=False
        ).returncode

    def kill(self) -> None:
        """As a machine that loses its power. Its files are of no use afterwards."""
        process, self.process = self.process, None
        assert process is not None
        memory = (self.data / "postmaster.pid").read_text().splitlines()[6].split()[1]
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        subprocess.run(["ipcrm", "-m", memory], check=True)  # which outlives them, as it does no machine

    def wait_for_standby(self) -> None:
        """From here on no commit ends before the standby has it; and it has all that was."""
        with self.admin() as admin:
            admin.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            admin.execute("SELECT pg_reload_conf()")
            now = admin.execute("SELECT pg_current_wal_lsn()").fetchone()
            asked = "SELECT FROM pg_stat_replication WHERE sync_state = 'sync' AND flush_lsn >= %s"
            deadline = time.monotonic() + 120
            while not admin.execute(asked, now).fetchall():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the standby does not follow:\n{self._log()}")
                time.sleep(0.05)

    def promote(self) -> None:
        """A standby becomes a primary, which waits for none."""
        with self.admin() as admin:
            admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
            admin.execute("SELECT pg_reload_conf()")
            admin.execute("SELECT pg_promote(true, 120)")

    def admin(self, database: str = "postgres") -> psycopg.Connection[Any]:
        import psycopg

        return psycopg.connect(self.url(database), autocommit=True)

    def stop(self, number: int = signal.SIGINT) -> None:
        """SIGINT: at once, in order. SIGQUIT: as after a crash."""
        process, self.process = self.process, None
        if process is not None:
            if process.poll() is not None:
                raise RuntimeError(f"PostgreSQL ended by itself:\n{self._log()}")
            process.send_signal(number)
            process.wait(timeout=120)


@contextmanager
def running(directory: Path, **settings: str) -> Iterator[Server]:
    """A new, empty server; everything of it is removed at the end."""
    found = programs()
    assert found is not None
    with _running(Server(found, directory, settings), "initdb", "-U", USER, *INITDB) as server:
        yield server


@contextmanager
def following(primary: Server, directory: Path, **settings: str) -> Iterator[Server]:
    """A standby of it, by streaming, which is there when it is made."""
    server = Server(primary.programs, directory, primary.settings | settings)
    copy = ("pg_basebackup", "-U", USER, "-h", primary.directory, "-R", "--checkpoint=fast", "--no-sync")
    with _running(server, *copy):
        yield server


@contextmanager
def _running(server: Server, program: str, *options: object) -> Iterator[Server]:
    """``program`` makes its files."""
    directory = server.directory
    directory.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        shutil.chown(directory, USER)
        for parent in directory.parents[:-2]:  # the server's user must get there
            with contextlib.suppress(PermissionError):
                parent.chmod(parent.stat().st_mode | 0o011)
    subprocess.run(
        as_user(server.programs / program, "-D", server.data, *options),
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        server.start()
        yield server
    finally:
        try:
            server.stop()
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def as_user(*argv: object) -> list[str]:
    """The server ends at once if the tests are killed."""
    user = [f"--reuid={USER}", f"--regid={USER}", "--clear-groups"] if os.geteuid() == 0 else []
    return ["setpriv", "--pdeathsig=QUIT", *user, "env", "LC_ALL=C.UTF-8", *map(str, argv)]


def main() -> int:
    try:
        install()
    except (NotInstalled, subprocess.CalledProcessError, OSError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        print(f"can't install PostgreSQL: {' '.join(said)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
