"""Permissions of Swarm's files, and what a user who is not root sees."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from swarm.base import files
from swarm.store.sql.database import HEAD
from swarm.vm.slots.inventory import Inventory
from swarm.vm.slots.ssh import SshDir
from swarm.vm.template import Templates

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

BIN = Path(sys.executable).parent
# A user without privileges, who can still read this checkout, wherever it is.
NOT_ROOT = ["unshare", "--user", "--map-user=1000", "--map-group=1000", "--"]


def run(home: Path, *argv: str | Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"SWARM_HOME": str(home), "SWARM_STATE_DIR": str(home / "state"), "SWARM_DRIVER": "auto"}
    env.pop("SWARM_IMAGES_DIR", None)
    done = subprocess.run(argv, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert "Traceback" not in done.stderr
    return done


def mode(path: Path) -> str:
    return f"{path.stat().st_mode & 0o777:o}"


@pytest.mark.parametrize("umask", [0, 0o027, 0o077], ids=oct)
async def test_private_files(tmp_path: Path, umask: int) -> None:
    """Files are private, or can be read by all and changed by none, whatever the umask of the first command was."""
    home, state = tmp_path / "home", tmp_path / "state"
    before = os.umask(umask)
    try:
        assert run(home, BIN / "swarm", "init", "--no-image").returncode == 0
        place = Inventory(state_dir=state).reserve(1)
        ssh = SshDir(state / "ssh")
        ssh.public_key()
        ssh.know(IPv4Address("10.0.0.2"), "ssh-ed25519 AAAA")
        async with Templates(dir=tmp_path / "templates")._locked("key"):
            pass
        files.make_directory(tmp_path / "a/b/private", 0o711)
        files.write_atomically(tmp_path / "a/b/manifest.json", "{}")
    finally:
        os.umask(before)
    public = (home, home / "agents", state, state / "vms", tmp_path / "a", tmp_path / "a/b")
    assert {mode(path) for path in public} == {"755"}
    assert (mode(tmp_path / "a/b/private"), mode(tmp_path / "a/b/manifest.json")) == ("711", "644")
    agents = [path for path in (home / "agents").rglob("*") if not path.name.startswith(".")]
    assert agents and {mode(path) for path in agents} <= {"755", "555", "444"}
    private = [home / "data", state / "vms/1", state / "locks", state / "ssh", tmp_path / "templates"]
    assert {path.name: mode(path) for path in private} == dict.fromkeys(
        ("data", "1", "locks", "ssh", "templates"), "700"
    )
    found = {path.name: mode(path) for path in [*(state / "ssh").iterdir(), *(state / "locks").iterdir()]}
    assert {name for name, bits in found.items() if bits != "600"} <= {ssh.key.with_suffix(".pub").name}, found
    place.release()


def test_doctor_without_root(tmp_path: Path) -> None:
    done = run(tmp_path, *NOT_ROOT, BIN / "swarm", "doctor", "--json")
    assert done.returncode == 1, done.stderr
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert found["rights"]["status"] == "fail" and found["rights"]["fix"].startswith("run it as root")
    assert found["kernel"]["status"] == "warn" and not any(name.startswith("kernel: ") for name in found)
    assert found["program nft"]["status"] == "ok"


def test_templates_and_vms_without_root(tmp_path: Path) -> None:
    """Never an empty list instead of things that the user can't see."""
    for closed in (tmp_path / "templates", tmp_path / "state" / "locks"):
        closed.mkdir(parents=True)
        closed.chmod(0)
    for command in (["template", "list"], ["template", "rm", "abc"]):
        done = run(tmp_path, *NOT_ROOT, BIN / "swarm", *command)
        assert (done.returncode, done.stderr) == (
            1, f"error: can't look into {tmp_path / 'templates'}: Permission denied (only root may read templates)\n",
        )  # fmt: skip
    done = run(tmp_path, *NOT_ROOT, BIN / "swarm", "template", "build")
    assert done.returncode == 1 and "locks (only root may see Swarm's VMs): Permission denied" in done.stderr
    (tmp_path / "state").chmod(0o555)
    done = run(tmp_path, *NOT_ROOT, BIN / "swarm", "bench")
    assert done.returncode == 1 and "can't write to" in done.stderr


def test_building_an_image_without_root(tmp_path: Path) -> None:
    done = run(tmp_path, *NOT_ROOT, BIN / "swarm", "image", "build")
    assert (done.returncode, done.stderr) == (
        1, "error: building an image needs root, to set the owners of its files: run this as root\n",
    )  # fmt: skip
    assert not (tmp_path / "images").exists()


def test_doctor_on_another_migration(tmp_path: Path) -> None:
    assert run(tmp_path, BIN / "swarm", "init", "--no-image").returncode == 0
    with sqlite3.connect(tmp_path / "data/swarm.db", timeout=60) as database:
        database.execute("UPDATE alembic_version SET version_num = 'v0_1_0'")
    database.close()
    done = run(tmp_path, *NOT_ROOT, BIN / "swarm", "doctor", "--json")
    [check] = [check for check in json.loads(done.stdout) if check["name"] == "database"]
    assert check["status"] == "fail" and check["fix"] == "swarm init"
    assert "v0_1_0" in check["detail"] and f"this version of Swarm needs {HEAD}" in check["detail"]
    listed = run(tmp_path, BIN / "swarm", "ticket", "list")
    assert listed.returncode == 1 and "v0_1_0" in listed.stderr and "swarm init" in listed.stderr


@pytest.mark.needs("root")
def test_a_home_that_the_user_may_not_read(tmp_path: Path) -> None:
    """The path is named, and not taken for an empty home."""
    home = tmp_path / "home"
    assert run(home, BIN / "swarm", "init", "--no-image").returncode == 0
    os.chown(home / "data", 12345, 12345)  # a user unknown in the user namespace
    done = run(home, *NOT_ROOT, BIN / "swarm", "ticket", "list")
    assert done.returncode == 1
    assert "Permission denied" in done.stderr and "are you root?" in done.stderr, done.stderr
    done = run(home, *NOT_ROOT, BIN / "swarm", "dashboard")
    assert done.returncode == 1 and "this user may not look into" in done.stderr, done.stderr
    done = run(home, *NOT_ROOT, BIN / "swarm", "doctor", "--json")
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert found["server"]["status"] == "warn" and "may not look into" in found["server"]["detail"]
    assert found["database"]["status"] == "fail" and "run it as the user" in found["database"]["fix"]
