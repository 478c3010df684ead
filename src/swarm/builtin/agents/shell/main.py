"""The shell agent: runs commands and reports on each. agent.yaml lists its inputs and outputs.

An example of an agent that starts other programs: it streams their output (`swarm ticket logs -f` shows it live), keeps
a bounded part of it for its own outputs, and fails when they fail.
"""

# ruff: noqa: T201

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

WORK = Path.cwd()


def inside(name: str) -> Path:
    """A path below the work directory; any other is refused."""
    path = (WORK / name).resolve()
    if WORK.resolve() not in path.parents:
        raise SystemExit(f"shell: {name!r} is not below the work directory")
    return path


def pump(pipe: Any, out: BinaryIO, kept: bytearray, limit: int, totals: list[int]) -> None:
    """Pass on a program's output, and keep the first ``limit`` bytes."""
    total = 0
    for chunk in iter(lambda: pipe.read1(65536), b""):
        out.write(chunk)
        out.flush()
        kept += chunk[: max(0, limit - total)]
        total += len(chunk)
    pipe.close()
    totals.append(total)


def run(command: str, env: dict[str, str], limit: int) -> dict[str, Any]:
    print(f"$ {command}", file=sys.stderr, flush=True)
    began = time.monotonic()
    child = subprocess.Popen(
        ["/bin/sh", "-c", command],
        cwd=WORK,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err, totals = bytearray(), bytearray(), list[int]()
    threads = [
        threading.Thread(target=pump, args=(child.stdout, sys.stdout.buffer, out, limit, totals)),
        threading.Thread(target=pump, args=(child.stderr, sys.stderr.buffer, err, limit, totals)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    code = child.wait()
    return {
        "command": command,
        "exit_code": code if code >= 0 else 128 - code,
        "stdout": out.decode(errors="replace"),
        "stderr": err.decode(errors="replace"),
        "truncated": any(total > limit for total in totals),
        "seconds": round(time.monotonic() - began, 3),
    }


def main() -> None:
    inputs = json.loads(Path("input.json").read_text(encoding="utf-8"))["inputs"]
    commands = inputs["commands"]
    if isinstance(commands, str):
        commands = [commands]
    stop = inputs.get("stop_on_error", True)
    limit = inputs.get("max_output_bytes", 65536)
    env = {**os.environ, **inputs.get("env", {})}
    for name, text in inputs.get("files", {}).items():
        path = inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    results = []
    for command in commands:
        results.append(run(command, env, limit))
        if results[-1]["exit_code"] and stop:
            break
    code = next((one["exit_code"] for one in results if one["exit_code"]), 0)
    files = {}
    for name in inputs.get("collect", []):
        path = inside(name)
        if path.is_file():
            files[name] = path.read_bytes()[: 4 << 20].decode(errors="replace")
    made = {
        "exit_code": code,
        "ok": code == 0,
        "stdout": "".join(one["stdout"] for one in results),
        "results": results,
        "files": files,
    }
    Path("output.json").write_text(json.dumps(made), encoding="utf-8")
    if code and stop:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
