"""What imported images cost, inside tools/sandbox.py: `python -m tests.vm.image.bench_oci [--rounds N] [--tickets N]`.

An import beside what its programs need alone: `skopeo copy`, `umoci unpack` and `mkfs.erofs`, on a Debian root. Then
tickets in QEMU, in turn: one program on Swarm's own root, the same on the imported Debian; a program in the image's
Python, which is started for it or waits for it; and the memory of their VMs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from functools import partial
from io import BytesIO
from pathlib import Path

import psutil

from swarm import config
from swarm.app import setup
from swarm.vm.driver import Image
from swarm.vm.image.oci.store import Imported
from tests.vm.image.oci_images import Layout

BIN = Path(sys.executable).parent
SCRIPT = '#!/bin/sh\ncat input.json > output.json\n[ -z "$(grep -o hold input.json)" ] || sleep 20\n'
PROGRAM = """\
import json, pathlib, time
given = pathlib.Path("input.json").read_text()
pathlib.Path("output.json").write_text(json.dumps(json.loads(given)))
if "hold" in given:
    time.sleep(20)
"""
IMAGE = "image: debian:test\n"
# Name -> the rest of its manifest, and its file.
AGENTS = {
    "own": ("runtime: exec\nentry: [main.sh]\n", "main.sh", SCRIPT),
    "imported": (f"runtime: exec\nentry: [main.sh]\n{IMAGE}", "main.sh", SCRIPT),
    "started": (f"runtime: exec\nentry: [/usr/bin/python3, /agent/main.py]\n{IMAGE}", "main.py", PROGRAM),
    "waiting": (f"runtime: python\nentry: [main.py]\n{IMAGE}", "main.py", PROGRAM),
}
PAIRS = (("own", "imported"), ("started", "waiting"))


def out(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def debian(root: Path, place: Path) -> tuple[str, int]:
    """A reference, and its bytes."""
    unpacked = place / "debian"
    subprocess.run(["fsck.erofs", f"--extract={unpacked}", str(root)], check=True, capture_output=True)
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name in ("bin", "lib", "lib64", "usr/bin", "usr/lib", "usr/lib64", "usr/share", "etc"):
            tar.add(unpacked / name, name)
    return Layout(place / "layout").add("debian", [packed.getvalue()], Env=["PATH=/usr/bin:/bin"]), packed.tell()


def programs_alone(ref: str, place: Path) -> dict[str, float]:
    """Seconds of each."""
    steps = {
        "skopeo copy": ["skopeo", "copy", "--quiet", ref, f"oci:{place / 'copied'}:image"],
        "umoci unpack": ["umoci", "raw", "unpack", "--image", f"{place / 'copied'}:image", str(place / "root")],
        "mkfs.erofs": ["mkfs.erofs", "--quiet", str(place / "root.erofs"), str(place / "root")],
    }
    return {name: timed(partial(subprocess.run, argv, check=True, capture_output=True)) for name, argv in steps.items()}


def timed(what: Callable[[], object]) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def imports(ref: str, size: int, place: Path, rounds: int) -> None:
    took = defaultdict[str, list[float]](list)
    for number in range(rounds):
        with tempfile.TemporaryDirectory(dir=place) as name:
            for step, seconds in programs_alone(ref, Path(name)).items():
                took[step].append(seconds)
        store = Imported(dir=place / f"oci-{number}")
        took["swarm image import"].append(timed(lambda: asyncio.run(store.import_(ref))))  # noqa: B023
        shutil.rmtree(place / f"oci-{number}")
    middle = {name: statistics.median(seconds) for name, seconds in took.items()}
    alone = sum(middle[name] for name in ("skopeo copy", "umoci unpack", "mkfs.erofs"))
    out(f"image: {size / 1e6:.0f} MB unpacked")
    for name, seconds in middle.items():
        out(f"{name:<20} {seconds:.2f} s, {size / 1e6 / seconds:.0f} MB/s")
    out(f"import ÷ its programs alone: {middle['swarm image import'] / alone:.2f}")


def tickets(ref: str, image: Image, place: Path, count: int) -> None:
    (place / "images").mkdir()
    (place / "images" / image.digest).symlink_to(image.dir)
    home = place / "home"
    own = {"SWARM_HOME": str(home), "SWARM_IMAGES_DIR": str(place / "images"), "SWARM_DRIVER": "qemu"}
    env = os.environ | own

    def swarm(*argv: str) -> None:
        subprocess.run([BIN / "swarm", *argv], env=env, check=True, capture_output=True)

    swarm("init", "--no-image")
    swarm("image", "import", ref, "--name", "debian:test")
    for name, (manifest, file, text) in AGENTS.items():
        directory = place / name
        directory.mkdir()
        (directory / "agent.yaml").write_text(f"name: {name}\nversion: 1.0.0\n{manifest}")
        (directory / file).write_text(text)
        (directory / file).chmod(0o755)
        swarm("agent", "add", str(directory))
    engine = [str(BIN / "swarm-engine"), "start", "--foreground", "--max-vms=2"]
    log = (place / "engine.log").open("wb")
    with log, subprocess.Popen(engine, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as running:
        try:
            used = defaultdict[str, list[float]](list)
            for number in range(-1, count):
                for name in [*AGENTS][:: 1 if number % 2 else -1]:
                    swarm("ticket", "add", f"{name} {number}", "--agent", name, "--input", "x=1", "--wait")
            for number in range(3):
                for name in AGENTS:
                    title = f"{name} holds {number}"
                    swarm("ticket", "add", title, "--agent", name, "--input", "x=hold")
                    used[name].append(memory(running.pid, home, title))
                    swarm("ticket", "wait", title_of(home, title))
        finally:
            running.terminate()
            running.wait()
            subprocess.run([BIN / "swarm-cleanup"], env=env, check=True, capture_output=True)
    with closing(sqlite3.connect(home / "data" / "swarm.db")) as db:
        found = db.execute(
            "SELECT t.title, a.timings FROM attempts a JOIN step_executions s ON s.id = a.step_execution_id "
            "JOIN workflow_runs r ON r.id = s.run_id JOIN tickets t ON t.id = r.ticket_id "
            "WHERE t.title NOT LIKE '%hold%'"
        ).fetchall()
    phases = defaultdict[tuple[str, str], list[float]](list)
    for title, timings in found:
        name, _, turn = str(title).partition(" ")
        if int(turn) >= 0:  # the first ones took the templates
            for phase, ms in json.loads(timings).items():
                phases[phase, name].append(ms)
    middle = {name: statistics.median(values) for name, values in used.items()}
    for one, other in PAIRS:
        for phase in sorted({phase for phase, _ in phases}):
            one_ms, other_ms = (statistics.median(phases[phase, name] or [0.0]) for name in (one, other))
            ratio = f"{other_ms / one_ms:.2f}" if one_ms else ""
            out(f"{phase:<12} {one} {one_ms:8.1f} ms, {other} {other_ms:8.1f} ms, ratio {ratio}")
        out(f"memory of a VM: {one} {middle[one]:.0f} MB, {other} {middle[other]:.0f} MB (PSS), "
            f"ratio {middle[other] / middle[one]:.2f}")  # fmt: skip


def title_of(home: Path, title: str) -> str:
    with closing(sqlite3.connect(home / "data" / "swarm.db")) as db:
        ((found,),) = db.execute("SELECT id FROM tickets WHERE title = ?", (title,))
    return str(found)


def memory(engine: int, home: Path, title: str) -> float:
    """MB of its VM, once its program holds."""
    id_, until = title_of(home, title), time.monotonic() + 300
    while time.monotonic() < until:
        with closing(sqlite3.connect(home / "data" / "swarm.db", timeout=60)) as db:
            ((state,),) = db.execute("SELECT state FROM tickets WHERE id = ?", (id_,))
        vms = [one for one in psutil.Process(engine).children(recursive=True) if one.name().startswith("qemu-system")]
        if state == "in_progress" and vms and time.time() - vms[0].create_time() > 8:
            return sum(one.memory_full_info().pss for one in vms) / 1e6
        time.sleep(0.1)
    raise TimeoutError(title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tickets", type=int, default=12)
    options = parser.parse_args()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarm" / "images"
    with tempfile.TemporaryDirectory(dir=os.environ.get("SWARM_SANDBOX")) as name:
        place = Path(name)
        image = asyncio.run(setup.ensure_image(config.load(home=place / "h", images_dir=cache, driver="qemu")))
        ref, size = debian(image.root, place)
        imports(ref, size, place, options.rounds)
        tickets(ref, image, place, options.tickets)


if __name__ == "__main__":
    main()
