"""docs/guest.md against a guest: what the page names is there, and what it says is missing is not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from swarm.vm.driver import Image
from swarm.vm.image.build import ON_DEMAND
from tests.engine.conftest import Bench

pytestmark = pytest.mark.needs("qemu")

PAGE = (Path(__file__).parents[2] / "docs/guest.md").read_text(encoding="utf-8")
PROBE = """
import ctypes, importlib.util, json, os, pwd, resource, shutil, socket, sys
given = json.load(open("input.json"))["inputs"]
def loads(name):
    try: return bool(ctypes.CDLL(name))
    except OSError: return False
def writes(place):
    try: open(f"{place}/x", "w").close(); return True
    except OSError: return False
def size(place):
    at = os.statvfs(place)
    return at.f_blocks * at.f_frsize >> 20
memory = int(open("/proc/meminfo").read().split()[1]) >> 10
json.dump({
    "programs": {name: shutil.which(name) is not None for name in given["programs"]},
    "modules": {name: importlib.util.find_spec(name) is not None for name in given["modules"]},
    "libraries": {name: loads(name) for name in given["libraries"]},
    "writable": {name: writes(name) for name in given["directories"]},
    "sizes": {name: size(name) for name in given["directories"]},
    "memory": memory,
    "python": list(sys.version_info[:2]),
    "env": sorted(os.environ),
    "user": [os.getuid(), pwd.getpwuid(os.getuid()).pw_name, os.path.expanduser("~")],
    "limits": [resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE)],
    "swap": "SwapTotal:             0 kB" in open("/proc/meminfo").read(),
    "ipv6": os.path.exists("/proc/net/if_inet6") and open("/proc/net/if_inet6").read(),
}, open("output.json", "w"))
"""


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def words(text: str) -> list[str]:
    return [word for word in re.findall(r"`([^`\n]+)`", text) if re.fullmatch(r"[\w.+/-]+", word)]


async def test_the_page_is_true(bench: Bench, image: Image) -> None:
    there, lacking = section("Programs").split("- **Not there**")
    libraries = words(section("Libraries").split("\n\n")[0])
    modules = words(section("Python").split("Not there are ")[1].split(";")[0].replace("`python3 -m venv`", ""))
    rows = dict(re.findall(r"^\| (`/.*?) \| .* \| (.*?) ?\|$", section("Directories"), re.MULTILINE))
    sizes = {place: size for places, size in rows.items() for place in words(places)}
    environment = words(section("Users and limits").split("environment is")[1].split("the\n")[0])
    given = {
        "programs": [*words(there), *words(lacking.split("Most come")[0])],
        "modules": modules,
        "libraries": libraries,
        "directories": list(sizes),
    }
    assert len(given["programs"]) > 45 and len(libraries) == 14 and len(modules) == 6 and len(sizes) == 6
    ticket = await bench.run(PROBE, inputs=given)
    seen: dict[str, Any] = json.loads(ticket.outputs or "{}")
    assert seen, ticket.error
    assert {name for name, found in seen["programs"].items() if found} == set(words(there))
    assert not any(seen["modules"].values()), seen["modules"]
    assert all(seen["libraries"].values()), seen["libraries"]
    assert seen["writable"] == {place: place in ("/work", "/work/out", "/tmp", "/dev/shm") for place in sizes}
    for place, size in sizes.items():
        if "half" in size:
            assert abs(seen["sizes"][place] - seen["memory"] / 2) < 2, place
        elif size == "16 MB":
            assert seen["sizes"][place] == 16
        elif "disk_mb" in size:
            assert 1900 < seen["sizes"][place] <= 2048
    assert f"Python {seen['python'][0]}.{seen['python'][1]}" in section("Python")
    assert image.packages["python3-minimal"].startswith("{}.{}.".format(*seen["python"]))
    assert seen["env"] == sorted(environment)
    assert seen["user"] == [1000, "agent", "/work"]
    assert seen["limits"] == [512, 4096]
    assert seen["swap"] and not seen["ipv6"]
    named = {word for word in words(section("Kernel").split("|---|---|")[1].split("\n\n")[0]) if word[0] != "/"}
    assert named - {*ON_DEMAND} == {"iptables-nft"} and len(named) > 20
    assert image.root.stat().st_size / 1e6 < 130  # "126 MB"
