"""The process for hostile data, as its starter sees it: its start, its place and its end."""

from __future__ import annotations

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from swarm.base.confined import Confined, Stopped

NEVER_ANSWERS = "tokenize"  # of the standard library: it reads its stdin to the end


def confined(module: str = NEVER_ANSWERS) -> Confined:
    return Confined(module, cpu_seconds=10, memory_bytes=512 << 20, patience_seconds=600)


def test_closed_in_the_midst_of_a_request() -> None:
    process = confined()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(process.ask, {})
        while not process._lock.locked():
            pass
        process.close()
        assert isinstance(asked.exception(60), Stopped)
    assert process.pid is None


def test_closed_while_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    starting, go_on, popen = threading.Event(), threading.Event(), subprocess.Popen

    def slow(*arguments: Any, **options: Any) -> Any:
        starting.set()
        assert go_on.wait(60)
        return popen(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", slow)
    process = confined()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(process.ask, {})
        assert starting.wait(60)
        closed = pool.submit(process.close)
        while not process._closed:
            pass
        go_on.set()
        closed.result(60)
        assert isinstance(asked.exception(60), Stopped)
    assert process.pid is None


def test_a_closed_one_starts_no_more() -> None:
    process = confined("swarm.cel.jail_process")
    assert process.ask({"source": "1 + 1", "data": {}})[0]["value"] == 2
    process.close()
    process.close()
    with pytest.raises(Stopped):
        process.ask({"source": "1 + 1", "data": {}})
    assert process.pid is None


def test_it_imports_nothing_from_where_its_starter_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "pickle", "struct", "swarm"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    with confined("swarm.cel.jail_process") as process:
        assert process.ask({"source": "1 + 1", "data": {}})[0]["value"] == 2
