"""Engines as processes: start in the background, status, stop, a live view, two on one file, log lines, logs -f."""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import json
import os
import pty
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from swarm.app import address
from swarm.base.process import start_time
from swarm.cli import service
from swarm.model import RetryPolicy
from swarm.vm.driver import OOM_SCORE
from tests.conftest import PATIENCE_SECONDS
from tests.engine.conftest import Bench, ended, engine_process, log_until, proved, serving

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

DONE = "import json; json.dump({}, open('output.json', 'w'))"
HANG = "import time\nprint('up', flush=True)\ntime.sleep(600)"


async def command(bench: Bench, *argv: str, stdin: int = subprocess.DEVNULL) -> tuple[int, str, str]:
    """A program of Swarm's, at this home, on the process driver: status, stdout, stderr."""
    env = os.environ | {
        "SWARM_HOME": str(bench.settings.home),
        "SWARM_STATE_DIR": str(bench.settings.state_dir),
        "SWARM_IMAGES_DIR": str(bench.settings.images),
        "SWARM_DRIVER": "process",
    }
    program = Path(sys.executable).parent / argv[0]
    process = await asyncio.create_subprocess_exec(
        program, *argv[1:], env=env, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 300)
    assert b"Traceback" not in err
    return process.returncode or 0, out.decode(), err.decode()


async def test_start_status_stop(plain: Bench) -> None:
    agent = await plain.agent(DONE)
    status, out, err = await command(plain, "swarm-engine", "start", "--max-vms=3")
    assert status == 0, err
    data = plain.settings.data_dir
    try:
        pidfile = json.loads((data / "engine.pid").read_text())
        assert start_time(pidfile["pid"]) == pidfile["started"] and str(pidfile["pid"]) in out
        ours, its = (int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in ("self", pidfile["pid"]))
        assert its == (ours or 100) < OOM_SCORE, "the kernel kills VMs first, then the engine"
        plain.insert("t", agent.id)
        assert await ended(plain, "t") == ["done"]
        told = json.loads((await command(plain, "swarm-engine", "status", "--json"))[1])
        (engine,) = told["engines"]
        assert (engine["pid"], engine["alive"], engine["info"]["max_vms"]) == (pidfile["pid"], True, 3)
        assert "serving, 0 of 3 VMs" in (await command(plain, "swarm-engine", "status"))[1]
        status, _, err = await command(plain, "swarm-engine", "start")
        assert status == 2 and "already runs in the background" in err
    finally:
        status, out, _ = await command(plain, "swarm-engine", "stop")
    assert (status, out) == (0, f"engine {pidfile['pid']} stopped\n")
    assert not (data / "engine.pid").exists()
    assert "ticket ended" in (data / "engine.log").read_text()
    assert await plain.store.workers() == []
    assert (await command(plain, "swarm-engine", "stop"))[1] == "no engine runs\n"


async def test_an_engine_with_a_server(plain: Bench) -> None:
    """`--serve`: one process more, started again when it ends, and gone with the engine; a browser is let in."""
    status, out, err = await command(plain, "swarm-engine", "start", "--serve", "--serve-port=0")
    assert status == 0, err
    try:
        first = address.running(plain.settings)
        assert first is not None and first.url in out
        told = json.loads((await command(plain, "swarm-engine", "status", "--json"))[1])
        assert told["server"] == {"url": first.url, "pid": first.pid, "started": first.started, "public_url": ""}
        assert psutil.Process(first.pid).ppid() == told["engines"][0]["pid"], "not the engine's own process"
        os.kill(first.pid, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (again := address.running(plain.settings)) is None or again.pid == first.pid:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert again.url in (await command(plain, "swarm-engine", "status"))[1]
        status, out, _ = await command(plain, "swarm", "dashboard", "--no-open")
        assert status == 0 and out.startswith(f"{again.url}/login?code=")
        async with httpx.AsyncClient(timeout=60) as browser:
            code = out.strip().partition("code=")[2]
            entered = await browser.post(f"{again.url}/login", data={"code": code}, headers={"origin": again.url})
            assert entered.headers["location"] == "/"
            assert (await browser.get(again.url)).status_code == 200
    finally:
        status, out, _ = await command(plain, "swarm-engine", "stop")
    assert status == 0 and address.running(plain.settings) is None
    assert not address.file(plain.settings).exists() and not plain.settings.api_socket.exists()
    log = (plain.settings.data_dir / "engine.log").read_text()
    assert "the server ended; it is started again" in log and log.count("server serves") == 2
    status, _, err = await command(plain, "swarm", "dashboard")
    assert status == 2 and "swarm serve" in err


async def test_a_pid_file_of_another_process_means_nothing(plain: Bench) -> None:
    (plain.settings.data_dir / "engine.pid").write_text(json.dumps({"pid": os.getpid(), "started": 1}))
    assert (await command(plain, "swarm-engine", "stop"))[1] == "no engine runs\n"
    (plain.settings.data_dir / "engine.pid").write_text("nonsense")
    assert (await command(plain, "swarm-engine", "stop"))[1] == "no engine runs\n"


@pytest.mark.parametrize("words", [[], ["swarm-engine", "start"]], ids=["any process", "an engine of another home"])
async def test_stop_ends_only_engines_of_this_home(plain: Bench, words: list[str]) -> None:
    """A row and a pid file can be written by others, and may name any process of the host."""
    victim = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", *words, stdin=subprocess.PIPE)
    try:
        started = start_time(victim.pid)
        row = (socket.gethostname(), victim.pid, json.dumps({"started": started}))
        columns = "INSERT INTO workers (id, host, pid, started_at, seen_at, info) VALUES ('x', ?, ?, ?, ?, ?)"
        plain.sql(columns, *row[:2], "2026-01-01", "2026-01-01", row[2])
        if not words:
            named = json.dumps({"pid": victim.pid, "started": started})
            (plain.settings.data_dir / "engine.pid").write_text(named)
        assert await command(plain, "swarm-engine", "stop", "--now") == (0, "no engine runs\n", "")
        assert victim.returncode is None and start_time(victim.pid) == started
    finally:
        await victim.communicate(b"\n")


async def test_warm_of_a_driver_that_makes_no_clones_needs_no_image(plain: Bench) -> None:
    status, _, err = await command(plain, "swarm-engine", "start", "--warm=2")
    try:
        assert status == 0, err
        assert "--warm changes nothing" in (plain.settings.data_dir / "engine.log").read_text()
    finally:
        await command(plain, "swarm-engine", "stop")


async def test_a_start_that_fails_says_why(plain: Bench) -> None:
    status, _, err = await command(plain, "swarm-engine", "start", "--driver=nonsense")
    assert status == 2
    (plain.settings.data_dir / "swarm.db").rename(plain.dir / "away.db")
    status, _, err = await command(plain, "swarm-engine", "start")
    assert status == 1 and "swarm init" in err
    (plain.dir / "away.db").rename(plain.settings.data_dir / "swarm.db")


async def test_stop_now_puts_back_what_runs(plain: Bench) -> None:
    agent = await plain.agent(HANG)
    plain.insert("t", agent.id)
    async with engine_process(plain, "--grace=600") as engine:
        await plain.until_it_prints()
        status, _, err = await command(plain, "swarm-engine", "stop", "--timeout=0.3")
        assert status == 1 and "still runs" in err
        status, out, _ = await command(plain, "swarm-engine", "stop", "--now")
        assert status == 0, out
        assert await engine.wait() == 0
    (step,) = await plain.store.steps("t")
    assert (step.status, step.retry_count) == ("ready", 0)
    assert plain.live_vms() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_first_signal_waits_second_does_not(plain: Bench, number: signal.Signals) -> None:
    agent = await plain.agent(HANG)
    plain.insert("t", agent.id)
    async with engine_process(plain, "--grace=600") as engine:
        await plain.until_it_prints()
        engine.send_signal(number)
        assert (await log_until(engine, "stopping"))["running"] == 1
        engine.send_signal(number)
        said = await log_until(engine, "put back")
        assert said["ticket"] == "t"
        await log_until(engine, "engine stopped")
        assert await engine.wait() == 0
    assert plain.live_vms() == []


@pytest.mark.parametrize("log", ["gone", "full", "unread"])
async def test_a_stop_is_orderly_whatever_became_of_the_log(plain: Bench, log: str) -> None:
    """`2>&1 | tee log` and Ctrl+C, which ends the reader first; a full disk; a reader that stalls."""
    gate = plain.dir / "gate"
    os.mkfifo(gate)
    agent = await plain.agent(f"print('up', flush=True)\nopen({str(gate)!r}).read()\n" + DONE)
    ours, theirs = os.pipe()
    if log == "unread":
        os.set_blocking(theirs, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(theirs, b"x" * 4096)
        os.set_blocking(theirs, True)
    stderr = os.open("/dev/full", os.O_WRONLY) if log == "full" else theirs
    plain.insert("t", agent.id)
    async with engine_process(plain, "--grace=600", stderr=stderr) as engine:
        await plain.until_it_prints()
        if log == "gone":
            os.close(ours)
            ours = os.open("/dev/null", os.O_RDONLY)
            os.close(theirs)
            theirs = os.open("/dev/null", os.O_RDONLY)
        engine.send_signal(signal.SIGINT)
        await plain.until(lambda: stopping(plain))
        await asyncio.to_thread(gate.write_text, "go")
        assert await asyncio.wait_for(engine.wait(), 60) == 0
    os.close(ours)
    os.close(theirs)
    assert (await plain.store.ticket("t")).state == "done"
    assert len(await plain.attempts()) == 1


async def test_a_database_that_was_replaced_needs_a_person(plain: Bench) -> None:
    """A status that the unit does not start again."""
    async with engine_process(plain) as engine:
        await log_until(engine, "engine serves")
        plain.database.write_bytes(plain.database.read_bytes())
        await log_until(engine, "was changed from outside")
        assert await engine.wait() == 3


@pytest.mark.parametrize("home", ["home", "a home", "50 %h", 'quo"te', "back\\\\slash", "$HOME"])
def test_the_unit(tmp_path: Path, home: str) -> None:
    program = Path(sys.executable).parent / "swarm-engine"
    argv = [str(program), "unit", "--grace=90", "--max-vms=3", "--warm=auto", "--serve", "--home", str(tmp_path / home)]
    text = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    unit = configparser.RawConfigParser(strict=True, delimiters=("=",))
    unit.optionxform = str  # type: ignore[assignment]
    unit.read_string(text)
    service = unit["Service"]
    found = shlex.split(service["ExecStart"])
    words = "start --foreground --grace=90 --max-vms=3 --warm=auto --serve"
    assert shlex.join(found) == f"{shlex.quote(str(program))} {words}"
    assert shlex.split(service["Environment"].replace("%%", "%")) == [f"SWARM_HOME={tmp_path / home}"]
    assert (service["KillMode"], service["Restart"]) == ("mixed", "on-failure")
    assert service["RestartPreventExitStatus"].split() == ["2", "3"]
    assert int(service["TimeoutStopSec"]) > 90
    if (analyze := shutil.which("systemd-analyze")) is not None:
        file = tmp_path / "swarm-engine.service"
        file.write_text(text)
        checked = subprocess.run([analyze, "verify", str(file)], check=False, capture_output=True, text=True)
        assert "swarm-engine.service" not in checked.stderr, checked.stderr
        assert checked.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_stop_that_reaches_every_process_puts_back(plain: Bench, number: signal.Signals) -> None:
    """As systemd's KillMode=control-group does it, or a reboot."""
    agent = await plain.agent("import signal; signal.signal(2, signal.SIG_DFL)\n" + HANG)
    plain.insert("t", agent.id)
    async with engine_process(plain, "--grace=600") as engine:
        await plain.until_it_prints()
        engine.send_signal(number)
        await plain.until(lambda: stopping(plain))
        for child in psutil.Process(engine.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        await log_until(engine, "put back")
        await log_until(engine, "engine stopped")
        assert await engine.wait() == 0
    (step,) = await plain.store.steps("t")
    assert (step.status, step.retry_count) == ("ready", 0)
    assert plain.live_vms() == []


async def stopping(bench: Bench) -> bool:
    return any(row.info.get("stopping") for row in await bench.store.workers())


async def test_json_lines_have_the_honest_clock(plain: Bench) -> None:
    agent = await plain.agent(DONE)
    async with engine_process(plain) as engine:
        assert (await log_until(engine, "engine serves"))["max_vms"] == 2
        plain.insert("t", agent.id)
        said = await log_until(engine, "ticket ended")
        assert {"ticket", "outcome", "queue", "network", "boot", "connect", "agent", "collect", "total"} <= said.keys()
        engine.terminate()
        await log_until(engine, "engine stopped")


async def test_two_engines_share_one_file(plain: Bench) -> None:
    go = plain.dir / "go"
    waits = f"while not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
    agent = await plain.agent(f"import json, os, time\n{waits}json.dump({{}}, open('output.json', 'w'))")
    ids = [f"t{number:02}" for number in range(16)]
    async with engine_process(plain) as one, engine_process(plain) as two:
        await log_until(one, "engine serves")
        await log_until(two, "engine serves")
        for id_ in ids:
            plain.insert(id_, agent.id)

        async def both_work() -> bool:
            return plain.sql("SELECT count(DISTINCT worker) FROM attempts") == [(2,)]

        await plain.until(both_work)  # each has room for two
        go.touch()
        assert set(await ended(plain, *ids)) == {"done"}
        assert len(await plain.store.workers()) == 2
        for engine in (one, two):
            engine.terminate()
        await log_until(one, "engine stopped")
        await log_until(two, "engine stopped")
    workers = plain.sql("SELECT worker, count(*) FROM attempts GROUP BY worker")
    assert len(workers) == 2 and sum(int(str(count)) for _, count in workers) == len(ids)
    assert (await proved(plain)).attempts == len(ids)


async def test_logs_follow_a_running_ticket_from_another_process(plain: Bench) -> None:
    gate = plain.dir / "gate"
    os.mkfifo(gate)
    code = f"import json\nprint('first', flush=True)\nopen({str(gate)!r}).read()\nprint('last')\n" + DONE
    agent = await plain.agent(code)
    plain.insert("t", agent.id)
    env = os.environ | {"SWARM_HOME": str(plain.settings.home)}
    async with engine_process(plain) as engine:
        following = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "swarm.cli.main", "ticket", "logs", "-f", "t", env=env, stdout=subprocess.PIPE
        )
        assert following.stdout is not None
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await following.stdout.readline() == b"first\n"
            assert (await plain.store.ticket("t")).state == "in_progress"
            await asyncio.to_thread(gate.write_text, "go")
            assert await following.stdout.read() == b"last\n"
            assert await following.wait() == 0
        engine.terminate()
        await log_until(engine, "engine stopped")


def test_a_pid_file_of_another_engine_stays(tmp_path: Path) -> None:
    file = tmp_path / "engine.pid"
    with service.pid_written(file):
        assert json.loads(file.read_text())["pid"] == os.getpid()
        file.write_text('{"pid": 1, "started": 1}')
    assert json.loads(file.read_text())["pid"] == 1
    with service.pid_written(file):
        pass
    assert not file.exists()


async def test_show_says_what_each_attempt_died_of(plain: Bench) -> None:
    """Once: what the ticket's own error says already is not repeated."""
    mark = plain.dir / "tried"
    code = (
        "import json, os, sys\n"
        f"mark = {str(mark)!r}\n"
        "if not os.path.exists(mark):\n    open(mark, 'w').close()\n    sys.exit('the moon was full')\n"
        "sys.exit('the moon was new')"
    )
    agent = await plain.agent(code, retry=RetryPolicy(max_attempts=2, delay_seconds=0.01))
    plain.insert("t", agent.id)
    async with serving(plain):
        assert await ended(plain, "t") == ["failed"]
    status, out, err = await command(plain, "swarm", "ticket", "show", "t")
    assert status == 0, err
    before, _, after = out.partition("attempt 1: failed")
    assert "the moon was new" in before and "the moon was full" not in before
    first, _, second = after.partition("attempt 2: failed")
    assert "  error  the agent ended with status 1" in first and "the moon was full" in first
    assert "error" not in second


async def test_cancel_and_retry(plain: Bench) -> None:
    agent = await plain.agent(DONE)
    plain.insert("t", agent.id)
    assert (await command(plain, "swarm", "ticket", "cancel", "t"))[:2] == (0, "ticket t is cancelled\n")
    status, _, err = await command(plain, "swarm", "ticket", "cancel", "nothing")
    assert status == 2 and "no ticket" in err
    assert (await command(plain, "swarm", "ticket", "retry", "t"))[:2] == (0, "ticket t is ready\n")
    status, _, err = await command(plain, "swarm", "ticket", "retry", "t")
    assert status == 2 and "it has not ended" in err


async def test_run_ticket_out_of_time_does_what_its_help_says(plain: Bench) -> None:
    """As docs/states.md has it for a soft stop: the step is ready, and the ticket keeps its run."""
    help_ = " ".join((await command(plain, "swarm-engine", "run-ticket", "--help"))[1].replace("│", " ").split())
    assert "its steps go back to the queue" in help_
    agent = await plain.agent(HANG)
    plain.insert("t", agent.id)
    for seconds in (1, 10, 40):  # a busy machine may take more than a second to start it
        status, _, err = await command(plain, "swarm-engine", "run-ticket", "t", "--wait", f"--timeout={seconds}")
        if "were put back" in err:
            break
    assert status == 1 and "were put back" in err, err
    (step,) = await plain.store.steps("t")
    assert (step.status, step.retry_count, (await plain.store.ticket("t")).state) == ("ready", 0, "in_progress")


async def test_prune(plain: Bench) -> None:
    agent = await plain.agent(DONE)
    plain.insert("t", agent.id)
    async with engine_process(plain) as engine:
        await ended(plain, "t")
        engine.terminate()
        await log_until(engine, "engine stopped")
    assert (await command(plain, "swarm", "prune", "--older-than", "1h"))[1] == "removed 0 events\n"
    status, out, _ = await command(plain, "swarm", "prune", "--older-than=0s")
    assert status == 0 and int(out.split()[1]) >= 4
    assert await plain.store.events("t") == []
    assert (await command(plain, "swarm", "prune", "--older-than", "soon"))[0] == 2
    assert (await plain.store.ticket("t")).state == "done"


async def test_the_live_view_in_a_terminal(plain: Bench) -> None:
    agent = await plain.agent(HANG)
    plain.insert("\x1b[31mred", agent.id)  # a hostile id reaches no terminal
    ours, theirs = pty.openpty()
    env = os.environ | {"SWARM_STATE_DIR": str(plain.settings.state_dir), "TERM": "xterm", "COLUMNS": "150"}
    env["SWARM_IMAGES_DIR"] = str(plain.settings.images)
    engine = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "swarm.cli.engine", "start", "--foreground", "--max-vms=2", "--driver=process",
        "--grace=0", "--home", str(plain.settings.home), env=env, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen = b""

    def read(until: bytes) -> None:
        nonlocal seen
        while until not in seen:
            seen += os.read(ours, 65536)

    try:
        await asyncio.wait_for(asyncio.to_thread(read, b"1 of 2 VMs"), 30)
        await asyncio.wait_for(asyncio.to_thread(read, b"agent "), 30)
        engine.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(engine.wait(), 30) == 0
    finally:
        os.close(ours)
        if engine.returncode is None:
            engine.kill()
    assert b"PHASE" in seen and b"[31mred" in seen and b"\x1b[31mred" not in seen
