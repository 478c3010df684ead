"""Commands where the host is not as usual: streams, paths, its name, mounts, environment, limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm import config
from swarm.app import setup, wiring
from swarm.base import process
from swarm.cli import service
from swarm.doctor import host
from swarm.errors import HostError
from swarm.model import ECHO_AGENT_ID, Ticket
from swarm.vm.drivers.jailer import Jail

TITLE = "caf\u00e9 \u2603"


def swarm(home: Path, line: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of the shell, whose first word stands for the program."""
    name, module = ("swarm-engine", "engine") if line.startswith("swarm-engine") else ("swarm", "main")
    line = line.replace(name, f'"{sys.executable}" -m swarm.cli.{module}', 1)
    environment = os.environ | {"SWARM_HOME": str(home)} | env
    return subprocess.run(["sh", "-c", line], check=False, capture_output=True, env=environment, timeout=300)


def made(place: Path) -> Path:
    """A home with one ticket."""
    settings = config.load(home=place)

    async def make() -> None:
        await setup.init(settings, image=False)
        async with wiring.store(settings) as store:
            await store.add_ticket(Ticket(id="1", title=TITLE, state="draft"))

    asyncio.run(make())
    return place


@pytest.fixture(scope="module", params=["has # in it", "has ? in it", "has %41 in it", "\u00e4 ?#%3F"])
def odd_home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("odd") / request.param)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("plain") / "home")


def test_the_database_is_where_the_home_is(odd_home: Path) -> None:
    assert (odd_home / "data" / "swarm.db").exists()
    assert [path.name for path in odd_home.parent.iterdir()] == [odd_home.name]
    (ticket,) = json.loads(swarm(odd_home, "swarm ticket list --json").stdout)
    assert ticket["title"] == TITLE


async def test_a_commit_is_seen(odd_home: Path) -> None:
    async with wiring.store(config.load(home=odd_home)) as store, store.watching() as wake:
        await store.heartbeat("w", host="h", pid=1, info={})
        assert await wake.changed(timeout_seconds=30)
        await store.forget_worker("w")


@pytest.mark.parametrize(
    ("line", "encoding", "out"),
    [
        ("swarm ticket list", "ascii", b"caf? ?"),
        ("swarm ticket show 1", "latin-1", b"caf\xe9 ?"),
        ("swarm ticket list", "utf-8", TITLE.encode()),
        ("swarm ticket list --json", "ascii", rb'"title": "caf\u00e9 \u2603"'),
        ("swarm ticket list --json", "utf-8", f'"title": "{TITLE}"'.encode()),
        ("swarm ticket list >&-", "utf-8", b""),
        ("swarm ticket show 1 >&-", "ascii", b""),
        ("swarm ticket list --json <&- >&- 2>&-", "utf-8", b""),
    ],
)
def test_streams_that_can_not_take_everything(place: Path, line: str, encoding: str, out: bytes) -> None:
    done = swarm(place, line, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert out in done.stdout
    assert (done.stdout == b"") == (out == b"")


@pytest.mark.parametrize(
    ("machine", "here"),
    [(process.machine(), True), (f"{process.boot_id()} 1", False), ("another boot", False), (None, False)],
    ids=["this", "another container", "another boot", "unknown"],
)
async def test_an_engine_is_found_after_the_host_got_another_name(place: Path, machine: str | None, here: bool) -> None:
    """Its row has the old name. A process of another host, or container, is not looked for here."""
    async with wiring.store(config.load(home=place)) as store:
        info = {"started": process.start_time(os.getpid()), "machine": machine}
        await store.heartbeat("w", host="the-old-name", pid=os.getpid(), info=info)
        (row,) = await store.workers()
        assert (service.of_row(row) is not None) == here
        await store.heartbeat("w", host="the-old-name", pid=os.getpid(), info=info | {"started": 1})
        await service.forget_dead(store)
        assert len(await store.workers()) == (0 if here else 1)
        await store.forget_worker("w")


# --- mounts -----------------------------------------------------------------------------------------------------------


def command_in(home: Path, script: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A program of Swarm's after a script of the shell: it changes mounts, the directory, limits."""
    program = [sys.executable, "-m", {"swarm": "swarm.cli.main", "swarm-engine": "swarm.cli.engine"}[argv[0]]]
    environment = os.environ | {
        "SWARM_HOME": str(home), "SWARM_STATE_DIR": str(home / "state"), "SWARM_DRIVER": "process",
    } | env  # fmt: skip
    done = subprocess.run(
        ["unshare", "--mount", "--", "sh", "-ec", f'{script}\nexec "$@"', "sh", *program, *argv[1:]],
        check=False, capture_output=True, text=True, env=environment, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and "unexpected" not in done.stderr, done.stderr
    return done


def doctor(home: Path, script: str, **env: str) -> dict[str, dict[str, str]]:
    done = command_in(home, script, "swarm", "doctor", "--json", **env)
    return {check["name"]: check for check in json.loads(done.stdout)}


@pytest.mark.needs("root", "netns")
@pytest.mark.parametrize("options", ["ro", "noexec", "nodev", "noexec,nodev", "nosuid"])
def test_mounts_under_which_no_image_can_be_built(place: Path, tmp_path: Path, options: str) -> None:
    images = tmp_path / "images"
    (images / "swarm").mkdir(parents=True)
    script = f"mount -t tmpfs -o {options} none '{images}'"
    env = {"SWARM_IMAGES_DIR": str(images), "XDG_CACHE_HOME": str(images)}
    checks, built = doctor(place, script, **env), command_in(place, script, "swarm", "image", "build", **env)
    if options == "nosuid":  # nothing minds
        assert "mount: images" not in checks and "mounted" not in built.stderr
        return
    found = checks["mount: images"]
    assert found["status"] == ("fail" if options == "ro" else "warn") and found["fix"]
    assert options.replace(",", ", ").replace("ro", "read-only") in found["detail"]
    assert built.returncode == 1 and built.stderr.count("\n") == 1
    named = "Read-only file system" if options == "ro" else f"is mounted {options.replace(',', ', ')}: "
    assert named in built.stderr and str(images) in built.stderr


@pytest.mark.needs("root", "netns")
def test_a_read_only_home(place: Path) -> None:
    """A service's ProtectSystem=strict, or a file system that the kernel set read-only after an error."""
    script = f"mount --bind '{place}' '{place}'; mount -o remount,bind,ro '{place}'"
    checks = doctor(place, script)
    assert {checks[f"mount: {name}"]["status"] for name in ("VMs", "images", "database")} == {"fail"}
    for line in ("swarm ticket list", "swarm ticket add t --agent echo", "swarm-engine start -f"):
        done = command_in(place, script, *line.split())
        assert done.returncode == 1 and "read-only" in done.stderr and str(place) in done.stderr, (line, done.stderr)


@pytest.mark.needs("root", "netns")
@pytest.mark.parametrize("options", ["noexec", "nodev"])
def test_a_jail_where_nothing_can_run(tmp_path: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(tmp_path)], check=True)
    try:
        with pytest.raises(HostError, match=f"jail is below .* is mounted {options}: .*SWARM_STATE_DIR"):
            Jail(tmp_path / "1", slot=None, uid=1)
        assert Jail(tmp_path / "1", slot=None, uid=1, jailed=False).root.is_dir()
        (check,) = [c for c in host.disks(tmp_path, Path("/"), Path("/")) if c.name == "mount: VMs"]
        assert check.status == "warn" and options in check.detail
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# Other things where Swarm's files should be, and places that can't be: each command ends, and says which.
ODD = {
    "state is a file": ('echo > "$S"', "swarm-engine run-ticket odd --wait", 1, "can't look into .*/s/vms: Not a dir"),
    "VMs are a file": ('mkdir "$S"; echo > "$S/vms"', "swarm-engine run-ticket odd --wait", 1, "s/vms: Not a dir"),
    "state leads to itself": ('ln -s s "$S"', "swarm-engine run-ticket odd --wait", 1, "Too many levels of symbolic"),
    "keys are a file": ('mkdir "$S"; echo > "$S/ssh"', "swarm-engine run-ticket odd --wait", 1, "error .*s/ssh: File"),
    "a VM's record is a pipe": (
        'mkdir -p "$S/vms/1"; mkfifo "$S/vms/1/vm.json"', "swarm-engine run-ticket odd --wait", 0, "",
    ),
    "a VM's record is a directory": ('mkdir -p "$S/vms/1/vm.json"', "swarm-engine run-ticket odd --wait", 0, ""),
    "the pid file is a pipe": ('mkfifo "$D/engine.pid"', "swarm-engine stop", 0, ""),
    "the server's address is a pipe": ('mkfifo "$D/serve.json"', "swarm dashboard --no-open", 2, "no server of this"),
    "the log is a pipe": ('mkfifo "$D/engine.log"', "swarm-engine start", 1, "engine.log: No such device"),
    "the log is a directory": ('mkdir "$D/engine.log"', "swarm-engine start", 1, "engine.log: Is a directory"),
    "the log leads nowhere": ('ln -s no/where "$D/engine.log"', "swarm-engine start", 1, "engine.log: No such file"),
    "the database leads to itself": (
        'rm "$D"/swarm.db*; ln -s swarm.db "$D/swarm.db"', "swarm ticket list", 1, "swarm.db",
    ),
    "the home is no text": ('export SWARM_HOME="$(printf "x\\377")"', "swarm ticket list", 2, "home is .* not UTF"),
    "the state is no text": ('export SWARM_STATE_DIR="$(printf "x\\377")"', "swarm ticket list", 2, "is .* not UTF"),
    "an agent's manifest is a pipe": (
        'mkdir "$D/a"; mkfifo "$D/a/agent.yaml"; cd "$D"', "swarm agent add a", 2, "agent.yaml is not a file",
    ),
    "a link to itself": ('mkdir "$D/a"; ln -s b "$D/a/b"; cd "$D"', "swarm agent add a/b", 2, "a/b"),
}  # fmt: skip


@pytest.mark.needs("root", "netns")
@pytest.mark.parametrize("name", ODD)
def test_what_stands_in_the_way_is_named(place: Path, tmp_path: Path, name: str) -> None:
    home, (script, line, status, says) = tmp_path / "home", ODD[name]
    shutil.copytree(place, home)
    ready(home, "odd")
    env = {"SWARM_STATE_DIR": str(home / "s"), "S": str(home / "s"), "D": str(home / "data")}
    done = command_in(home, script, *line.split(), **env)
    assert done.returncode == status and done.stderr.count("\n") <= 3, done.stderr + done.stdout
    assert re.search(says, done.stderr + done.stdout) and "unexpected" not in done.stdout, done.stderr + done.stdout
    if "can't look into" in says:
        check = doctor(home, "true", **env)["VMs"]
        assert check["status"] == "fail" and "SWARM_STATE_DIR" in check["fix"]


# --- streams, environment, limits -------------------------------------------------------------------------------------

WORKS = {
    "stdin closed": "exec <&-",
    "stdout closed": "exec >&-",
    "stderr closed": "exec 2>&-",
    "all closed": "exec <&- >&- 2>&-",
    "stdin is a closed pipe": 'exec < /dev/null; mkfifo "$T/fifo"; exec 7<> "$T/fifo" 0< "$T/fifo" 7>&-',
    "locale C": "export LANG=C LC_ALL=C",
    "an unknown locale": "export LANG=nope LC_ALL=xx_YY.bad",
    "an empty environment": 'for name in HOME TERM LANG USER LOGNAME SHELL PWD PATH; do unset "$name"; done',
    "a deleted directory": 'mkdir "$T/gone"; cd "$T/gone"; rmdir "$T/gone"',
    "no TMPDIR": 'export TMPDIR="$T/absent"',
    "a full TMPDIR": 'mkdir "$T/full"; mount -t tmpfs -o size=4k none "$T/full"; export TMPDIR="$T/full"; '
    'head -c 4096 /dev/zero > "$T/full/x"',
    "a read-only TMPDIR": 'mkdir "$T/ro"; mount -t tmpfs -o ro none "$T/ro"; export TMPDIR="$T/ro"',
    "64 descriptors": "ulimit -n 64",
    "no core files, little stack": "ulimit -c 0; ulimit -s 512",
    "another monotonic clock": 'set -- unshare --time --monotonic 100000000 --boottime 100000000 "$@"',
    "blocked signals": 'set -- env --block-signal=CHLD,TERM,HUP,INT,ALRM,VTALRM "$@"',
    "ignored signals": "trap '' CHLD TERM HUP INT ALRM VTALRM PIPE",
    "no inotify": "set -- unshare --user --map-root-user sh -c '"
    'echo 0 > /proc/sys/user/max_inotify_instances; exec "$@"\' sh "$@"',
    "no /dev": "mount -t tmpfs none /dev",
    "no /sys": "mount -t tmpfs none /sys",
}
FAILS = {
    "12 descriptors": ("ulimit -n 12", "out of file descriptors|Too many open files"),
    "a limit of files' sizes": ("ulimit -f 64", "ulimit -f"),
    "a full disk of the database": (
        'cp -a "$SWARM_HOME/data" "$T/data"; mount -t tmpfs -o size=700k none "$SWARM_HOME/data"; '
        'cp -a "$T/data/." "$SWARM_HOME/data"; head -c 999999 /dev/zero > "$SWARM_HOME/data/x" || true',
        "no space",
    ),
}


def ready(home: Path, id: str) -> None:
    with sqlite3.connect(home / "data/swarm.db", timeout=60) as database:
        row = (id, id, "ready", ECHO_AGENT_ID, '{"name": "x"}')
        database.execute("INSERT INTO tickets (id, title, state, agent_id, inputs) VALUES (?, ?, ?, ?, ?)", row)
    database.close()


def state(home: Path, id: str) -> str:
    database = sqlite3.connect(home / "data/swarm.db", timeout=60)
    (found,) = database.execute("SELECT state FROM tickets WHERE id = ?", (id,)).fetchone()
    database.close()
    return str(found)


@pytest.mark.needs("root", "netns")
@pytest.mark.parametrize("script", WORKS.values(), ids=WORKS)
def test_a_ticket_runs_all_the_same(place: Path, tmp_path: Path, script: str) -> None:
    ready(place, script)
    done = command_in(place, script, "swarm-engine", "run-ticket", script, "--wait", T=str(tmp_path))
    assert (done.returncode, state(place, script)) == (0, "done"), done.stderr + done.stdout


_CGROUPS = Path("/sys/fs/cgroup")
_V1 = {"pids": "pids.max", "cpu": "cpu.cfs_quota_us", "memory": "memory.limit_in_bytes"}
_V2 = {"pids": "pids.max", "cpu": "cpu.max", "memory": "memory.max"}


@contextlib.contextmanager
def groups(**limits: str) -> Iterator[str]:
    """Control groups with these limits, in the version that this host has; a script that enters them."""
    places, name = set(), f"swarm-test-{os.getpid()}"
    try:
        for controller, limit in limits.items():
            v1 = (_CGROUPS / controller).is_dir()
            places.add(place := (_CGROUPS / controller if v1 else _CGROUPS) / name)
            place.mkdir(exist_ok=True)
            (place / (_V1 if v1 else _V2)[controller]).write_text(limit)
        yield "; ".join(f"echo $$ > {place}/cgroup.procs" for place in places)
    except PermissionError as error:
        pytest.skip(f"control groups can't be made here: {error}")
    finally:
        for place in places:
            with contextlib.suppress(FileNotFoundError):
                place.rmdir()


@pytest.mark.needs("root", "netns")
def test_what_control_groups_leave_is_said(place: Path) -> None:
    with groups(pids="2") as enter:
        done = command_in(place, enter, "swarm", "ticket", "list")
        assert done.returncode == 1 and "out of memory or threads" in done.stderr, done.stderr
    with groups(pids="30", cpu="50000", memory=str(700 << 20)) as enter:
        checks = doctor(place, enter)
    assert re.search("control groups allow [12][0-9] more processes", checks["processes"]["detail"])
    assert checks["CPUs"]["detail"].startswith("0.5 of the host's ")
    assert "limits this process to 700 MiB" in checks["memory"]["detail"], checks["memory"]


@pytest.mark.needs("root", "netns")
def test_the_doctor_names_limits_and_a_full_disk_of_the_database(place: Path, tmp_path: Path) -> None:
    small = "ulimit -n 200; ulimit -f 100000; " + FAILS["a full disk of the database"][0]
    checks = doctor(place, small, T=str(tmp_path))
    found = {name: checks[name]["status"] for name in ("limit: open files", "limit: file size", "disk: database")}
    assert found == {"limit: open files": "warn", "limit: file size": "fail", "disk: database": "fail"}
    assert all(checks[name]["fix"] for name in found)


@pytest.mark.needs("root", "netns")
@pytest.mark.parametrize(("script", "says"), FAILS.values(), ids=FAILS)
def test_what_the_host_refuses_is_named_and_the_ticket_runs_when_it_is_over(
    place: Path, tmp_path: Path, script: str, says: str
) -> None:
    ready(place, says)
    done = command_in(place, script, "swarm-engine", "run-ticket", says, "--wait", T=str(tmp_path))
    assert done.returncode == 1 and re.search(says, done.stderr), done.stderr + done.stdout
    assert state(place, says) in ("ready", "in_progress")
    with sqlite3.connect(place / "data/swarm.db", timeout=60) as database:
        database.execute("UPDATE attempts SET lease_until = 1 WHERE outcome IS NULL")
    database.close()
    after = command_in(place, "true", "swarm-engine", "run-ticket", says, "--wait")
    assert (after.returncode, state(place, says)) == (0, "done"), after.stderr


async def test_what_engines_wait_for_is_told(place: Path) -> None:
    async with wiring.store(config.load(home=place)) as store:
        info = {"waits_for": "disk: 7 MB are left", "sandboxes_wait_for": "memory: 8 MB are left"}
        await store.heartbeat("w", host="h", pid=1, info=info)
        await store.add_ticket(Ticket(id="waits", title="t", state="ready", agent_id=ECHO_AGENT_ID))
        shown = swarm(place, "swarm ticket show waits")
        status = swarm(place, "swarm-engine status")
        await store.forget_worker("w")
    assert b"it is in the queue, and the engine waits for disk: 7 MB are left" in shown.stdout
    assert b"disk: 7 MB are left" in status.stdout and b"memory: 8 MB are left" in status.stdout
