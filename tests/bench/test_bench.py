"""`swarm bench`: its arithmetic, its plot and tables, and small real runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import runpy
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import psutil
import pytest

from swarm.app import wiring
from swarm.bench import Cell, Figure, Report, percentiles
from swarm.bench.report import markdown, plot
from swarm.config import Settings
from swarm.vm.driver import Image
from tests.conftest import CACHE

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases


def test_percentiles_by_nearest_rank() -> None:
    assert percentiles([]) == {}
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0}
    assert percentiles([float(n) for n in range(1, 101)]) == {"p50": 50.5, "p95": 96.0, "p99": 100.0}


def test_a_figure_without_a_baseline_has_no_ratio() -> None:
    assert Figure(name="x", ours=13.0, baseline=10.0, unit="ms", n=1).ratio == 1.3
    assert Figure(name="x", ours=13.0, baseline=None, unit="ms", n=1).ratio is None


def test_a_report_of_figures_alone() -> None:
    host = dict.fromkeys(("driver", "cpu", "cores", "kernel", "python", "load_before", "load", "max_vms"), "x")
    figure = Figure(name="pause", ours=13.0, baseline=10.0, unit="ms", n=1, target="<= 1.3 x")
    text = markdown(Report(host=host, cells=(), figures=(figure,)))
    assert "| pause | 13.0 ms | 10.0 ms | 1.30 | <= 1.3 x |" in text
    assert "tickets" not in text


def test_the_plot_is_an_svg() -> None:
    spread = {"p50": 10.0, "p95": 20.0, "p99": 30.0}
    cells = tuple(
        Cell(
            mode=mode,
            tickets=1,
            n=1,
            insert_to_done=spread,
            phases={"queue": spread, "boot": spread},
            per_second=1.0,
            engine_cpu_ms=30.0,
            vmm_cpu_ms=300.0,
            failed=0,
        )
        for mode in ("cold", "<pool>")
    )
    root = ET.fromstring(plot(Report(host={"driver": "a & b"}, cells=cells, figures=())))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "cold x 1" in texts
    assert "<pool> x 1" in texts
    assert texts.count("20 ms") == 2


def test_the_markdown_is_tables() -> None:
    spread = {"p50": 10.0, "p95": 20.0, "p99": 30.0}
    cell = Cell(
        mode="pool", tickets=5, n=5, insert_to_done=spread, phases={"queue": spread, "boot": spread}, per_second=2.5,
        engine_cpu_ms=30.0, vmm_cpu_ms=300.0, failed=0,
    )  # fmt: skip
    assert cell.engine_cpu_share == 0.1
    host = dict.fromkeys(("driver", "cpu", "cores", "kernel", "python", "load_before", "load", "max_vms"), "?")
    figures = (Figure(name="x", ours=13.0, baseline=10.0, unit="ms", n=5, target="<= 1.3 x"),)
    text = markdown(Report(host=host, cells=(cell,), figures=figures))
    tables = [[line.count("|") for line in table.splitlines()] for table in text.split("\n\n")[1:]]
    assert all(len(set(columns)) == 1 and len(columns) == 3 for columns in tables)
    assert "| pool x 5 (n = 5) | 10 ms | 20 ms | 30 ms | 2.5 | 30 + 300 ms |  |" in text
    assert "| x | 13.0 ms | 10.0 ms | 1.30 | <= 1.3 x |" in text


def test_the_page_of_figures() -> None:
    tool = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "bench.py"))
    begin, end = tool["BEGIN"], tool["END"]
    assert tool["with_figures"](f"above\n{begin}old\n{end}below\n", "new\n") == f"above\n{begin}new\n{end}below\n"
    with pytest.raises(SystemExit, match="lacks the lines"):
        tool["with_figures"]("a page without markers\n", "new\n")


@pytest.mark.needs("qemu")
def test_a_small_run_as_a_user_types_it(settings: Settings, image: Image, tmp_path: Path) -> None:
    env = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "SWARM_HOME": str(settings.home),
        "SWARM_IMAGES_DIR": str(settings.images),
        "SWARM_STATE_DIR": str(settings.state_dir),
    }
    before = wiring.inventory(settings).numbers()
    picture = tmp_path / "bench.svg"
    argv = [sys.executable, "-m", "swarm.cli.main", "bench", "--tickets", "2", "--modes", "restored,pool", "--json"]
    ended = subprocess.run(
        [*argv, "--plot", str(picture)],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=env,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    report = json.loads(ended.stdout)
    assert [(c["mode"], c["tickets"], c["n"], c["failed"]) for c in report["cells"]] == [
        ("restored", 2, 2, 0),
        ("pool", 2, 2, 0),
    ]
    assert {"boot", "start", "agent", "stop", "total"} <= report["cells"][0]["phases"].keys()
    figures = {figure["name"]: figure for figure in report["figures"]}
    assert figures["restore to agentd answering"]["ratio"] > 0
    assert figures["memory private to a clone"]["unit"] == "MB"
    assert report["host"]["kvm"] is False or report["host"]["kvm"] is True
    ET.parse(picture)
    assert wiring.inventory(settings).numbers() == before


def bench(tmp_path: Path, *argv: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run it on plain processes, which is enough where the figures don't matter."""
    places = {f"SWARM_{name.upper()}": str(tmp_path / name) for name in ("home", "state_dir")}
    return subprocess.run(
        [*before, sys.executable, "-m", "swarm.cli.main", "bench", *argv],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | places | {"SWARM_IMAGES_DIR": str(CACHE), "SWARM_DRIVER": "process"},
        timeout=300,
    )


@pytest.mark.needs("qemu")
def test_a_repeated_mode_is_run_once(image: Image, tmp_path: Path) -> None:
    ended = bench(tmp_path, "--tickets", "2,2", "--modes", "restored,restored", "--json")
    assert ended.returncode == 0, ended.stderr
    assert [(cell["mode"], cell["n"]) for cell in json.loads(ended.stdout)["cells"]] == [("restored", 2)]


@pytest.mark.needs("qemu")
def test_a_failing_engine_ends_the_benchmark(image: Image, tmp_path: Path) -> None:
    """The process has too few descriptors for even one more VM."""
    few = ("prlimit", "--nofile=32", "--")
    ended = bench(tmp_path, "--tickets", "25", "--modes", "restored", "--max-vms", "25", before=few)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.needs("qemu")
def test_what_a_killed_benchmark_leaves_is_swept(settings: Settings, image: Image) -> None:
    """Its bare VMMs have no record, by which a sweep would find them."""
    argv = [sys.executable, "-m", "swarm.cli.main", "bench", "--tickets", "1", "--modes", "restored"]
    places = {"SWARM_HOME": settings.home, "SWARM_IMAGES_DIR": settings.images, "SWARM_STATE_DIR": settings.state_dir}
    env = os.environ | {name: str(place) for name, place in places.items()}
    running = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env
    )
    try:
        assert running.stderr
        assert any(b"baselines" in line for line in running.stderr)
        bare: list[int] = []
        while not bare and running.poll() is None:
            time.sleep(0.05)  # until the first bare VMM is there
            for process in psutil.Process(running.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):  # also of one that has just ended
                    bare += [process.pid] if any("probe-bench-" in word for word in process.cmdline()) else []
    finally:
        running.kill()
        running.communicate()
    for left in settings.state_dir.glob("probe-bench-*"):
        os.utime(left, (1, 1))  # older than a probe that is just being made
    asyncio.run(wiring.sweep(settings))
    assert bare and list(settings.state_dir.glob("probe-bench-*")) == []
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in bare if psutil.pid_exists(pid)], timeout=60)
    assert alive == []
    assert 65_432 not in wiring.inventory(settings).numbers()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--tickets", "0"), "--tickets takes numbers"),
        (("--tickets", "\u00b2"), "--tickets takes numbers"),
        (("--modes", ""), "--modes some of"),
        (("--plot", "/nonexistent/x.svg"), "can't write /nonexistent/x.svg: No such file or directory"),
    ],
)
def test_odd_arguments_are_refused_before_anything_runs(tmp_path: Path, argv: tuple[str, ...], said: str) -> None:
    ended = bench(tmp_path, *argv)
    assert (ended.returncode, said in ended.stderr) == (2, True), ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_wrong_use_is_said(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "swarm.cli.main", "bench", "--home", str(tmp_path), "--modes", "hot"]
    ended = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert ended.returncode == 2
    assert b"cold,restored,pool" in ended.stderr
