"""The examples of docs/sdk.md, run one after another against a real server and engine."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import Bench
from tests.test_transcripts import ROOT, matches

BLOCK = re.compile(r"^(?:<!-- file: (\S+) -->\n)?```(\w*)\n(.*?)^```$(?:\n```\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


async def test_the_examples_print_what_the_page_shows(
    at_work: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SWARM_URL", "SWARM_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SWARM_HOME", str(at_work.settings.home))
    monkeypatch.chdir(tmp_path)
    printed: list[str] = []
    names: dict[str, Any] = {"print": lambda *values: printed.append(" ".join(map(str, values)) + "\n")}
    examples = 0
    for file, language, text, shown in BLOCK.findall((ROOT / "docs" / "sdk.md").read_text(encoding="utf-8")):
        if file:
            Path(file).write_text(text, encoding="utf-8")
        if language == "python":
            printed.clear()
            await asyncio.to_thread(exec, compile(text, f"docs/sdk.md: {text[:40]}", "exec"), names)
            assert matches(shown, "".join(printed)), f"{text}\nprints\n{''.join(printed)}"
            examples += 1
    assert examples == 11
