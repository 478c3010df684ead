"""`swarm template …` and `swarm doctor --capacity`, as typed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from swarm.app import wiring
from swarm.config import Settings
from swarm.doctor.capacity import Cost, fit
from swarm.vm.driver import Image, VmSpec

pytestmark = pytest.mark.needs("qemu")


@pytest.fixture
def env(settings: Settings, image: Image, tmp_path: Path) -> dict[str, str]:
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "SWARM_HOME": str(settings.home),
        "SWARM_IMAGES_DIR": str(settings.images),
        "SWARM_STATE_DIR": str(settings.state_dir),
        "SWARM_TEMPLATES_DIR": str(tmp_path / "templates"),
    }


@pytest.fixture
def swarm(env: dict[str, str]) -> Callable[..., str]:
    def run(*arguments: str, status: int = 0, **more: str) -> str:
        argv = ["timeout", "--preserve-status", "300", sys.executable, "-m", "swarm.cli.main", *arguments]
        ended = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL, capture_output=True, env=env | more)
        assert ended.returncode == status, ended.stderr.decode()
        return (ended.stdout if status == 0 else ended.stderr).decode()

    return run


def test_build_list_use_and_remove(swarm: Callable[..., str]) -> None:
    assert "no template" in swarm("template", "list")
    size = ("--memory", "160", "--disk", "64")
    built = json.loads(swarm("template", "build", *size, "--preload", "uuid", "--json"))
    again = json.loads(swarm("template", "build", *size, "--preload", "uuid", "--json"))
    assert built == again
    [listed] = json.loads(swarm("template", "list", "--json"))
    assert (listed["key"], listed["memory_mb"], listed["disk_mb"]) == (built["key"], 160, 64)
    assert (listed["preload"], listed["driver"]) == (["uuid"], "qemu")
    assert built["key"][:12] in swarm("template", "list")
    assert swarm("template", "rm", "--unused", "1") == "", "it was used just now"
    assert len(json.loads(swarm("template", "list", "--json"))) == 1
    assert swarm("template", "rm", built["key"][:6]) == f"removed {built['key'][:12]}\n"
    assert not Path(built["dir"]).exists()
    assert "see `swarm template list`" in swarm("template", "rm", "abc", status=2)
    assert "--unused" in swarm("template", "rm", status=2)


def test_odd_arguments_are_refused(swarm: Callable[..., str]) -> None:
    assert "'KEY': it is empty" in swarm("template", "rm", "", status=2)
    assert "names of Python modules" in swarm("template", "build", "--preload", "json init=/bin/sh", status=2)
    for option in (("--memory", "64"), ("--memory", "9999999"), ("--vcpus", "1000"), ("--disk", "99999999")):
        assert option[0] in swarm("template", "build", *option, status=2)
    assert "--memory" in swarm("doctor", "--capacity", "--memory", "9999999", status=2)


def test_init_makes_the_template_and_a_ticket_says_when_it_has_to(
    settings: Settings, image: Image, tmp_path: Path
) -> None:
    env = os.environ | {
        "SWARM_HOME": str(tmp_path / "home"),
        "SWARM_IMAGES_DIR": str(settings.images),
        "SWARM_STATE_DIR": str(settings.state_dir),
        "SWARM_TEMPLATES_DIR": str(tmp_path / "templates"),
    }
    made = "making a template of the VM, once per image and agent size: about "

    def run(command: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", *command.split()]
        return subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env)

    assert "\ntemplate " not in run("swarm.cli.main init --no-image").stdout
    done = run("swarm.cli.main init")
    assert "\ntemplate   " in done.stdout and "not made" not in done.stdout, done.stdout
    assert "template of the VM: about " in done.stderr
    assert "template of the VM" not in run("swarm.cli.main init").stderr, "it exists"
    for id_ in ("first", "second"):
        run(f"swarm.cli.main ticket add t --agent shell --input commands=id --id {id_}")
        if id_ == "second":
            shutil.rmtree(tmp_path / "templates")
        done = run(f"swarm.cli.engine run-ticket {id_} --wait")
        assert (made in done.stderr) == (id_ == "second"), done.stderr
        assert "(agent)" in done.stderr, "what the agent printed"


def test_a_driver_without_templates_says_so(swarm: Callable[..., str]) -> None:
    assert "makes no templates" in swarm("template", "build", "--json", status=1, SWARM_DRIVER="process")


def test_a_build_that_is_interrupted_leaves_nothing(
    swarm: Callable[..., str], env: dict[str, str], settings: Settings
) -> None:
    inventory = wiring.inventory(settings)
    before = inventory.numbers()
    argv = [sys.executable, "-m", "swarm.cli.main", "template", "build", "--memory", "160"]
    with subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as build:
        until = time.monotonic() + 120
        while inventory.numbers() == before and build.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        build.terminate()  # it boots its VM now
        assert build.stderr is not None and "stopped by SIGTERM" in build.stderr.read()
        assert build.wait() == 143
    assert json.loads(swarm("template", "list", "--json")) == []
    assert inventory.numbers() == before


def test_capacity_says_how_many_and_why(swarm: Callable[..., str]) -> None:
    said = json.loads(swarm("doctor", "--capacity", "--memory", "160", "--disk", "64", "--json"))
    capacity = said["capacity"]
    assert 10 < capacity["cost"]["private_mb"] < 160
    assert capacity["idle"]["bridge ports"] == 1023
    number, limit = said["fits_full"]
    assert number == capacity["full"][limit] == min(capacity["full"].values())
    text = swarm("doctor", "--capacity", "--memory", "160", "--disk", "64")
    assert "fits: " in text


def test_the_smallest_limit_decides(image: Image, tmp_path: Path) -> None:
    cost = Cost(private_mb=40.0, shared_mb=60.0, disk_mb=0.2, descriptors=10, threads=4)
    small = fit(cost, VmSpec(image=image, memory_mb=64, disk_mb=16), tmp_path)
    large = fit(cost, VmSpec(image=image, memory_mb=4096, disk_mb=1 << 30), tmp_path)
    assert large.fits_full == (0, "disk")
    assert small.full["memory"] > large.full["memory"]
    assert small.fits_idle[0] >= small.fits_full[0] > 0
