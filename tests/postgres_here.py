"""A PostgreSQL server for the tests: this machine's own programs, a data directory of its own, a Unix socket alone."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INITDB = ("-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
# No test is about a power failure of its machine.
CHEAP = {"fsync": "off", "full_page_writes": "off", "wal_level": "minimal", "max_wal_senders": "0"} | {
    "autovacuum": "off",
    "jit": "off",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "1h",
}
USER = "postgres"  # the server refuses to run as root; Debian's package makes this user


def programs() -> Path | None:
    """The directory of `initdb` and `postgres`, of the newest version; None if there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parents[1].name))
    return found[-1].parent if found else None


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
                _as_user(
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
    server = Server(found, directory, settings)
    directory.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        shutil.chown(directory, USER)
        for parent in directory.parents[:-2]:  # the server's user must get there
            with contextlib.suppress(PermissionError):
                parent.chmod(parent.stat().st_mode | 0o011)
    subprocess.run(
        _as_user(found / "initdb", "-D", server.data, "-U", USER, *INITDB),
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


def _as_user(*argv: object) -> list[str]:
    """The server ends at once if the tests are killed."""
    user = [f"--reuid={USER}", f"--regid={USER}", "--clear-groups"] if os.geteuid() == 0 else []
    return ["setpriv", "--pdeathsig=QUIT", *user, "env", "LC_ALL=C.UTF-8", *map(str, argv)]
