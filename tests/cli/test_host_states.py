"""Commands where the host is not as usual: streams, paths, its name, mounts, environment, limits."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swarm import config
from swarm.app import setup, wiring
from swarm.base import process
from swarm.cli import service
from swarm.doctor import host
from swarm.errors import HostError
from swarm.model import Ticket
from swarm.vm.drivers.jailer import Jail

TITLE = "caf\u00e9 \u2603"


def swarm(home: Path, line: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of the shell, whose first word stands for the program."""
    line = line.replace("swarm", f'"{sys.executable}" -m swarm.cli.main', 1)
    environment = os.environ | {"SWARM_HOME": str(home)} | env
    return subprocess.run(["sh", "-c", line], check=False, capture_output=True, env=environment, timeout=60)


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
        check=False, capture_output=True, text=True, env=environment, timeout=60, stdin=subprocess.DEVNULL,
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
