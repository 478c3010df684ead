"""schemathesis against the running server: whatever is sent, each answer is as described, and none is our fault."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.api.served import Served

pytestmark = [pytest.mark.slow, pytest.mark.needs("schemathesis")]
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
# What it asks for is there, so that it gets past "no such ticket"; and it has ended, so that nothing waits for that.
CONFIG = """
[parameters]
"path.id" = "t"
"path.step" = "agent"
"""


async def test_whatever_is_sent(served: Served, tmp_path: Path) -> None:
    await served.add("t")
    await served.store.cancel("t", "ann")
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    options = {
        "--header": f"Authorization: Bearer {served.tokens['admin']}",
        "--checks": ",".join(CHECKS),
        "--phases": "coverage,fuzzing",
        "--max-examples": "5",
        "--max-time": "15",
        "--request-timeout": "20",
        # Bodies that are no JSON; what never ends; what would let the ticket run again.
        "--exclude-path-regex": "^/v1/(files|(agents|workflows)(/validate)?|events/live)$|/retry$|/bulk$"
        "|/files/(content|archive)$",
    }
    argv = [f"{name}={value}" for name, value in options.items()]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/v1/openapi.json", *argv, cwd=tmp_path,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode == 0, out.decode(errors="replace")
