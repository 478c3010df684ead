"""Debian's pgbouncer, before a server of the tests: from PATH, or unpacked into the cache of all checkouts. Not
installed: the package would start a service.

``python -m tests.pgbouncer_here`` fetches it (1 MB, once); status 1 with a line if that fails.
"""
# ruff: noqa: T201 - a command

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from swarm.base.process import which
from tests import postgres_here
from tests.prometheus_here import fetch

CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarm" / "pgbouncer"
PACKAGES: Final = ("pgbouncer", "libc-ares2", "libevent-2.1-7")
_CONFIG: Final = """[databases]
* = host={server}
[pgbouncer]
unix_socket_dir = {place}
listen_addr =
auth_type = trust
auth_file = {place}/users
pool_mode = {mode}
logfile = {place}/log
"""


def program() -> str | None:
    unpacked = CACHE / "usr" / "sbin" / "pgbouncer"
    return which("pgbouncer") or (str(unpacked) if unpacked.exists() else None)


def lacks() -> str:
    return "" if program() else "needs Debian's pgbouncer: run `python -m tests.pgbouncer_here`"


@contextmanager
def running(server: postgres_here.Server, place: Path, mode: str) -> Iterator[str]:
    """The URL of its database `swarm`, for the user of this name, through pgbouncer."""
    place.mkdir()
    (place / "users").write_text('"swarm" ""\n')
    (place / "ini").write_text(_CONFIG.format(server=server.directory, place=place, mode=mode))
    if os.geteuid() == 0:
        shutil.chown(place, postgres_here.USER)
    # A process of the user `postgres` can't read the cache of root.
    own = shutil.copytree(CACHE / "usr", place / "usr") if CACHE.exists() else place
    chosen = own / "sbin" / "pgbouncer" if CACHE.exists() else program()
    libraries = ":".join(map(str, own.glob("lib/*-linux-gnu")))
    argv = postgres_here.as_user("env", f"LD_LIBRARY_PATH={libraries}", chosen, "-q", place / "ini")
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as bouncer:
        try:
            url = f"postgresql://swarm@/swarm?host={place}&port=6432"
            while not (place / ".s.PGSQL.6432").exists():
                assert bouncer.poll() is None, (place / "log").read_text()
                time.sleep(0.02)
            yield url
        finally:
            bouncer.terminate()


def main() -> int:
    if not lacks():
        return 0
    try:
        fetch(*PACKAGES, into=CACHE)
    except (subprocess.CalledProcessError, OSError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        print(f"can't fetch pgbouncer: {' '.join(said)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
