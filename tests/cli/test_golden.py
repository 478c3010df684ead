"""Every table and view at 60, 80 and 120 columns and in a pipe, as files in golden/: a change of one is seen in review.

`WRITE_GOLDEN=1` writes them again.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import sqlite3
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from swarm import config
from swarm.app import setup
from swarm.base import process, trees
from tests.cli import views

pytestmark = pytest.mark.slow  # starts programs

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[2]
ID = "019c1f6e-0000-7000-8000-000000000001"
PIPE = "pipe"
NAMES = [*views.COMMANDS, *views.OTHERS]
_SGR = re.compile(r"\x1b\[([0-9;]*)m")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
_THEN = "2026-01-31T12:00:00.000Z"


def at(**ago: float) -> str:
    """That long ago. Ages are halves of a unit of hours or days: the same words while a slow test runs."""
    return (datetime.now(UTC) - timedelta(**ago)).isoformat(timespec="milliseconds")[:-6] + "Z"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("views")
    asyncio.run(setup.init(config.load(home=place), image=False))
    with sqlite3.connect(place / "data/swarm.db", timeout=60) as db:
        _agents(db)
        _tickets(db)
        _workflow_run(db)
        _files(db)
        _others(db)
        _sandboxes(db)
    _on_disk(place)
    return place


def _insert(db: sqlite3.Connection, table: str, **values: object) -> None:
    marks = ", ".join("?" for _ in values)
    db.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", list(values.values()))


def _agents(db: sqlite3.Connection) -> None:
    db.execute("DELETE FROM agents")
    for number, (name, network, memory, description) in enumerate(
        [
            ("echo", "none", 256, "Hands its inputs back."),
            (
                "claude-code",
                "gateway",
                2048,
                "Gives Claude Code a task and a repository; returns a patch and a branch.",
            ),
            ("greeter", "allow:api.example.com,*.example.org", 512, "名前に挨拶し、丁寧な言葉を返すエージェントです。"),
        ]
    ):
        _insert(
            db, "agents", id=f"0d72b1b5-a98e-4356-bf52-{number:012}", name=name, version="1.0.0", path="/agents/x",
            entry='["main.py"]', network=network, memory_mb=memory, description=description,
            created_at=_THEN, updated_at=_THEN,
        )  # fmt: skip


def _tickets(db: sqlite3.Connection) -> None:
    many = "agent ended with status 1: ModuleNotFoundError: No module named 'numpy'\nmore"
    for id_, state, title, age, error in (
        (ID, "done", "Count the words of the annual report", at(hours=2.5), None),
        ("019c1f6e-0000-7000-8000-000000000002", "failed", "日本語の題名はとても長い題名です", at(days=3.5), many),
        ("release-3", "waiting", "Release", at(days=1.5), None),
        ("t-4", "in_progress", "\x1b[2J\x07hostile\u202e title", at(hours=5.5), None),
        ("t-5", "cancelled", "", "2025-06-01T08:00:00.000Z", "cancelled by ann"),
    ):
        _insert(
            db, "tickets", id=id_, title=title, state=state, error=error, created_at=age,
            agent_id={ID: "0d72b1b5-a98e-4356-bf52-000000000000", "t-4": "greeter@1"}.get(id_),
            workflow_id="release" if id_ == "release-3" else None,
            inputs='{"text": "a b", "files": ["one.txt"]}' if id_ == ID else None,
            outputs='{"words": 2}' if id_ == ID else None, run_id="run-3" if id_ == "release-3" else None,
            execution_mode="workflow" if id_ == "release-3" else "agent",
            started_at=_THEN if state == "done" else None, completed_at=_THEN if state == "done" else None,
        )  # fmt: skip


def _workflow_run(db: sqlite3.Connection) -> None:
    _insert(db, "workflow_runs", id="run-1", ticket_id=ID, status="completed")
    _insert(db, "step_executions", id="step-1", run_id="run-1", step_id="main", status="completed")
    timings = {"queue": 12.5, "network": 40, "vmm": 310.0, "boot": 95, "agent": 1250.0, "total": 1707.5}
    _insert(
        db, "attempts", id="a-1", step_execution_id="step-1", number=1, worker="host-1", vm_id=7, lease_until=0,
        outcome="succeeded", timings=json.dumps(timings), api_tokens_used=5500, cost_usd=0.015, started_at=_THEN,
    )  # fmt: skip
    _insert(db, "workflow_runs", id="run-3", ticket_id="release-3", status="running")
    steps: list[tuple[str, str, str | None, float | None, str | None, str | None]] = [
        ("build", "completed", "shell", 12_345.0, None, None),
        ("test[0]", "failed", "claude-code", 99.4, "1 of 120 tests failed: test_median\nsecond line", None),
        ("check", "waiting", None, None, None, "Publish version 1.2.3 of the report to everybody on the list?"),
        ("publish", "pending", "shell", None, None, None),
    ]
    for number, (name, status, agent, ms, error, question) in enumerate(steps):
        _insert(
            db, "step_executions", id=f"r3-{number}", run_id="run-3", step_id=name, status=status, agent_name=agent,
            agent_version="1.0.0", duration_ms=ms, error=error, question=question,
            started_at=_THEN if ms else None,
        )  # fmt: skip
    _insert(
        db, "attempts", id="a-3", step_execution_id="r3-0", number=1, worker="host-1", lease_until=0, exit_code=2,
        outcome="failed", reason="agent_failed", started_at=_THEN, ended_at=_THEN.replace("00.000", "12.345"),
    )  # fmt: skip


def _files(db: sqlite3.Connection) -> None:
    contents = {"report.txt": b"two words\n", "結果/図.svg": b"<svg/>" * 100}
    *parts, tree = trees.pack(
        (trees.Entry(name, 0o100644, len(data)), [data]) for name, data in sorted(contents.items())
    )
    for digest, text in (*parts, tree):
        _insert(db, "artifacts", digest=digest, bytes=len(text), data=text, created_at=at(hours=2.5))
        _insert(db, "artifact_uses", ticket_id=ID, digest=digest)
    left_out = [{"name": "core.dump", "bytes": 900_000_000}]
    data = {"trees": {"/work/out": tree[0]}, "left_out": left_out, "left_out_files": 1, "complete": True}
    _insert(db, "events", ticket_id=ID, step_id="main", attempt_id="a-1", kind="files", data=json.dumps(data))
    said = "reading one.txt\n2 words\x1b[31m\n\ttab \N{CHECK MARK}\n"
    output = json.dumps({"text": said, "stream": "stdout"})
    _insert(db, "events", ticket_id=ID, step_id="main", attempt_id="a-1", kind="output", data=output)


def _others(db: sqlite3.Connection) -> None:
    for name, scope in (("anthropic_api_key", "all"), ("DEPLOY_KEY", "agent:release")):
        _insert(db, "secrets", name=name, scope=scope, sealed="x", created_at=_THEN, updated_at=at(days=5.5))
    for number, (model, cost, note) in enumerate(
        [
            ("claude-sonnet-4-5-20250929", 0.015, None),
            ("claude-haiku", 0.2, "estimated: broke off"),
            ("own", None, None),
        ]
    ):
        _insert(
            db, "model_calls", id=str(number), at=_THEN, model=model, status=200, input_tokens=5000, output_tokens=500,
            cache_read_tokens=12345678, tokens=5500, cost_usd=cost, note=note,
        )  # fmt: skip
    ahead = round((datetime.now(UTC) + timedelta(days=2.5)).timestamp() * 1000)
    (flow,) = db.execute("SELECT id FROM workflows WHERE name = 'echo-chain'").fetchone()
    _insert(
        db, "schedules", workflow="echo-chain", number=0, workflow_id=flow, cron="0 3 * * mon-fri", missed_count=2,
        time_zone="America/Argentina/Buenos_Aires", next_at=ahead, last_at=at(days=1.5), last_ticket_id=ID,
    )  # fmt: skip
    _insert(
        db, "schedules", workflow="echo-chain", number=1, workflow_id=flow, cron="@yearly",
        error="the inputs don't fit the workflow any more",
    )  # fmt: skip
    seen = round((datetime.now(UTC) - timedelta(days=5.5)).timestamp() * 1000)
    for number, (host, labels) in enumerate([("build-7", {"kvm": True, "zone": "a"}), ("ビルド-8", {})]):
        _insert(
            db, "hosts", id=f"6f1a6a52-0000-4000-8000-{number:012}", name=host, labels=json.dumps(labels),
            capacity='{"memory_mb": 64000}', seen_at=seen, draining=number,
        )  # fmt: skip


def _sandboxes(db: sqlite3.Connection) -> None:
    some = [("build", "running"), (None, "paused"), ("日本語", "lost"), ("x", "ended")]
    for number, (name, state) in enumerate(some):
        first, error = name == "build", "the engine vm:1 has died" if state == "lost" else None
        _insert(
            db, "sandboxes", id=f"019c1f6e-0000-7000-8000-00000000010{number}", name=name, state=state, error=error,
            created_at=at(hours=2.5), created_by="ann", used_at=at(hours=1.5) if first else None,
            agent_id="0d72b1b5-a98e-4356-bf52-000000000001" if number else None, memory_mb=512 if number == 1 else None,
            labels='{"team": "\x1b[31mred"}' if first else None, ttl_seconds=28_800 if first else None,
            network="allow:pypi.org", secrets='["DEPLOY_KEY"]', host="vm-1", vm_id=1002 if first else None,
            budget_usd=2.5, idle_timeout_seconds=600,
        )  # fmt: skip
    events: list[tuple[str, dict[str, object]]] = [
        ("change", {"did": "sandbox.add", "by": "ann"}),
        ("transition", {"of": "sandbox", "from": "starting", "to": "running"}),
        ("started", {"vm": 1002, "timings": {"total": 412.5}}),
        ("exec", {"process": "p1", "argv": ["sh", "-c", "echo \x1b[2Jhi; exit 3"]}),
        ("exit", {"process": "p1", "code": 3, "ms": 120.25}),
        ("files", {"op": "write", "path": "/work/データ.csv", "bytes": 123_456}),
        ("egress", {"via": "proxy", "host": "example.org", "refused": "the agent's network policy does not allow it"}),
        ("fork", {"children": ["a", "b"], "by": "ann"}),
        ("odd", {"any": ["thing"]}),
    ]
    for kind, data in events:
        _insert(
            db, "events", ticket_id="", sandbox_id="019c1f6e-0000-7000-8000-000000000100", kind=kind, at=at(hours=1.5),
            data=json.dumps(data),
        )  # fmt: skip
    for number, (name, kind) in enumerate([("prepared", "named"), (None, "attempt")]):
        _insert(
            db, "snapshots", id=f"019c1f6e-0000-7000-8000-00000000020{number}", name=name, kind=kind, host="vm-1",
            sandbox_id="019c1f6e-0000-7000-8000-000000000100" if name else None, ticket_id=None if name else ID,
            size_bytes=146_370_560, secrets=number, created_at=at(days=1.5),
            expires_at=None if name else round((datetime.now(UTC) + timedelta(days=2.5)).timestamp() * 1000),
        )  # fmt: skip


def _on_disk(home: Path) -> None:
    from swarm.vm.image import image

    manifest = {
        "format": 1, "recipe": "r", "created_at": at(days=4.5), "kernel_version": "6.1.0-18-amd64", "boot_args": "",
        "packages": {}, "base": "b", "builder_version": 1, "guest": {},
        "parts": {"root": {"file": "root", "sha256": "0" * 64, "size_bytes": 123_456_789}},
    }  # fmt: skip
    place = home / "images" / image._digest(manifest)
    place.mkdir(parents=True)
    (place / "manifest.json").write_text(json.dumps(manifest))
    layer = home / "images/layers" / ("1f" * 32)
    layer.mkdir(parents=True)
    shape = {"requirements": ["pytest==8.3.3", "numpy==2.1.0"], "packages": ["git"]}
    installed: dict[str, object] = {"python": {}, "debian": {}}
    (layer / "layer.json").write_text(
        json.dumps(
            {"shape": shape, "sha256": "0", "installed": installed, "size_bytes": 98_765_432, "built_at": at(days=4.5)}
        )
    )
    key = "4b" * 16
    template = home / "templates" / key
    template.mkdir(parents=True)
    parts = {"driver": "qemu", "image": "5c" * 32, "memory_mb": 256, "vcpus": 1, "disk_mb": 2048, "preload": ["json"]}
    created = (datetime.now(UTC) - timedelta(days=4.5)).timestamp()
    (template / "template.json").write_text(
        json.dumps({"key": key, "parts": parts, "files": [], "created_at": created})
    )
    used = (datetime.now(UTC) - timedelta(hours=2.5)).timestamp()
    os.utime(template, (used, used))
    for n, (kind, ticket, pid) in enumerate([("attempt", ID, 1), ("manual", None, 1), ("attempt", "release-3", 0)], 1):
        (home / f"state/vms/{n}").mkdir(parents=True)
        record = {
            "n": n, "kind": kind, "pid": pid, "started": process.start_time(1), "driver": "qemu", "netns": f"swarm{n}",
            "address": f"10.0.0.{n + 1}", "ticket_id": ticket, "created_at": at(hours=1.5),
            "boot_id": process.boot_id(),
        }  # fmt: skip
        (home / f"state/vms/{n}/vm.json").write_text(json.dumps(record))


def printed(home: Path, width: int | None, **env: str) -> dict[str, str]:
    """What each view prints on a terminal of that width, or in a pipe."""
    clear = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "COLORTERM"}
    environment = {name: value for name, value in os.environ.items() if name not in clear}
    environment |= {"SWARM_HOME": str(home), "SWARM_STATE_DIR": str(home / "state"), "TERM": "xterm-256color"} | env
    command = [sys.executable, "-m", "tests.cli.views"]
    if width is None:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        )
        text = done.stdout.decode()
    else:
        text = on_terminal(command, width, environment)
    text = _TIME.sub(_THEN, text).replace(str(home), "/opt/swarm-platform")
    found = dict(each.split("\n", 1) for each in text.split("\x1e")[1:])
    return {name: _stripped(shown) for name, shown in found.items()}


def _stripped(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip()


def without_attributes(text: str) -> str:
    return _stripped(_SGR.sub("", text))


def on_terminal(command: list[str], width: int, env: dict[str, str]) -> str:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    child = subprocess.Popen(command, cwd=ROOT, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b"".join(_read(ours)).decode().replace("\r\n", "\n")
    os.close(ours)
    assert child.wait() == 0, text
    return text


def _read(fd: int) -> Iterator[bytes]:
    try:
        while data := os.read(fd, 65536):
            yield data
    except OSError:  # EIO: its other end is closed
        return


@pytest.fixture(scope="module")
def coloured(home: Path) -> dict[str, dict[str, str]]:
    return {str(width): printed(home, width) for width in (60, 80, 120)}


@pytest.fixture(scope="module")
def shown(home: Path, coloured: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    plain = {width: {name: without_attributes(t) for name, t in all_.items()} for width, all_ in coloured.items()}
    return plain | {PIPE: printed(home, None)}


@pytest.mark.parametrize("name", NAMES)
def test_it_looks_as_it_did(name: str, shown: dict[str, dict[str, str]]) -> None:
    where: dict[str, list[str]] = {}
    for place, all_ in shown.items():
        if all_.get(name):
            where.setdefault(all_[name], []).append(place)
    text = "".join(f"===== {', '.join(places)} =====\n{one}\n" for one, places in where.items())
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("WRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), "if it is meant: WRITE_GOLDEN=1, and look at the difference"


def test_no_golden_file_is_left_over() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(NAMES)


def test_colours_only_add_attributes(home: Path, coloured: dict[str, dict[str, str]]) -> None:
    dumb, without = printed(home, 80, TERM="dumb"), printed(home, 80, NO_COLOR="1")
    assert any("\x1b" in text for text in coloured["80"].values())
    for name, text in coloured["80"].items():
        plain = without_attributes(text)
        assert "\x1b" not in plain and "\x07" not in plain, name
        assert dumb[name] == plain, name
        assert without_attributes(without[name]) == plain, name
        assert set(_SGR.findall(without[name])) <= {"", "0", "1"}, name


def test_nothing_but_plain_text_goes_into_a_pipe(shown: dict[str, dict[str, str]]) -> None:
    for name, text in shown[PIPE].items():
        assert all(c.isprintable() or c in "\n\t" for c in text), name
        assert "…" not in text.replace("N,…", "") or name.startswith(("help", "ticket-show")), name


def test_colours_can_be_read_on_black_and_on_white(coloured: dict[str, dict[str, str]]) -> None:
    used = {code for text in coloured["80"].values() for code in _SGR.findall(text)} - {"", "0", "1"}
    assert used
    for code in used:
        found = re.fullmatch(r"(?:1;)?38;5;(\d+)", code)
        assert found, f"{code!r} is as readable as the terminal's theme makes it"
        light = _luminance(int(found[1]))
        assert (light + 0.05) / 0.05 >= 3.9 and 1.05 / (light + 0.05) >= 3.9, f"colour {found[1]}"


DRAWING = """
import sys
from swarm.cli.ui import live
from swarm.cli.ui.output import Out
print("live", live.wanted("auto"))
with Out().progress("layer") as progress:
    progress("packages", 0.5)
print(Out()._console(sys.stderr).get_style("progress.elapsed").color)
"""


@pytest.mark.parametrize(("term", "draws"), [("xterm", True), ("dumb", False), ("unknown", False)])
def test_on_a_dumb_terminal_lines_replace_what_is_drawn(term: str, draws: bool) -> None:
    said = on_terminal([sys.executable, "-c", DRAWING], 80, os.environ | {"TERM": term})
    assert f"live {draws}\n" in said and said.endswith("None\n")
    assert ("layer: packages\n" in said, "\x1b" in said) == (not draws, draws)


def test_flags_have_no_type() -> None:
    """Of every command of every program: a flag takes no value."""
    import typer

    from swarm.cli import cleanup, engine, main, vm

    seen = 0
    todo: list[Any] = [typer.main.get_command(app) for app in (main.app, engine.app, vm.spawn_ns, cleanup.app)]
    for command in todo:
        todo += getattr(command, "commands", {}).values()
        with command.make_context(command.name, [], resilient_parsing=True) as ctx:
            for param in command.get_params(ctx):
                if getattr(param, "is_flag", False):
                    seen += 1
                    assert param.display_type_rich(ctx) == "", (command.name, param.name)
    assert seen > 100


def _luminance(number: int) -> float:
    """WCAG's relative luminance of a colour of xterm's cube, 16 to 231."""
    steps = (0, 95, 135, 175, 215, 255)
    cube = number - 16
    red, green, blue = (
        ((v / 255 + 0.055) / 1.055) ** 2.4 if v > 10 else 0.0
        for v in (steps[cube // 36], steps[cube // 6 % 6], steps[cube % 6])
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
