"""Hosts that lack something, with real VMs: a ticket runs all the same, or command and doctor say what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swarm.config import Settings
from swarm.vm.driver import Image

pytestmark = [pytest.mark.needs("qemu"), pytest.mark.slow]  # starts programs
PROGRAM = {"swarm": "swarm.cli.main", "swarm-engine": "swarm.cli.engine"}


class Host:
    """Commands at a home with the image; ``within`` is a command that prepares the state of the host."""

    def __init__(self, settings: Settings, state: Path) -> None:
        self._env = os.environ | {
            "SWARM_HOME": str(settings.home),
            "SWARM_STATE_DIR": str(state),
            "SWARM_IMAGES_DIR": str(settings.images),
            "SWARM_DRIVER": "qemu",
        }

    def run(self, *argv: str, within: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", PROGRAM[argv[0]], *argv[1:]]
        done = subprocess.run(
            [*within, *program], check=False, capture_output=True, text=True, timeout=180, env=self._env | env,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done

    def ticket(self, id: str) -> None:
        done = self.run("swarm", "ticket", "add", "t", "--agent", "echo", "--id", id, "--input", "name=x")
        assert done.returncode == 0, done.stderr

    def state(self, id: str) -> str:
        return str(json.loads(self.run("swarm", "ticket", "show", id, "--json").stdout)["ticket"]["state"])

    def doctor(self, within: tuple[str, ...] = ()) -> dict[str, dict[str, str]]:
        return {c["name"]: c for c in json.loads(self.run("swarm", "doctor", "--json", within=within).stdout)}


@pytest.fixture(scope="module")
def host(settings: Settings, image: Image) -> Host:
    return Host(settings, settings.state_dir)


@pytest.mark.needs("cc")
def test_a_kernel_without_ipv6(host: Host, tmp_path: Path) -> None:
    shim = tmp_path / "without_ipv6.so"
    source = Path(__file__).with_name("without_ipv6.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(shim), str(source), "-ldl"], check=True)
    host.ticket("no-ipv6")
    done = host.run("swarm-engine", "run-ticket", "no-ipv6", "--wait", LD_PRELOAD=str(shim))
    assert done.returncode == 0, done.stdout + done.stderr
