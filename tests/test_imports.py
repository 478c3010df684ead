"""Imports go one way: tests/layers.py has the list, ARCHITECTURE.md shows it. Imports within functions count."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.layers import LAYERS, PAGE, STAND_ALONE, place, with_table

SOURCE = Path(__file__).parent.parent / "src" / "swarm"

LONG = 450  # "about 400"


def modules() -> dict[str, Path]:
    names = {".".join(p.relative_to(SOURCE).with_suffix("").parts): p for p in SOURCE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in names.items() if name != "__init__"}


MODULES = modules()


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, without the leading 'swarm.'."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; write `from swarm.… import …`"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("swarm.") in MODULES else str(node.module))
    return {name.removeprefix("swarm.") for name in found if name.startswith("swarm.")}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    wanted = imports(MODULES[module])
    if module.split(".")[0] in STAND_ALONE:
        assert not wanted, f"swarm.{module} runs in the guest and must import nothing of ours"
        return
    if not wanted and any(entry.startswith(f"{module}.") for entries, _ in LAYERS for entry in entries):
        return  # a package that only holds packages
    layer, entry = place(module)
    for target in wanted:
        assert target.split(".")[0] not in STAND_ALONE, f"swarm.{module} imports swarm.{target}, which is for the guest"
        there, its_entry = place(target)
        assert there < layer or its_entry == entry, (
            f"swarm.{module} (layer {layer}) imports swarm.{target} (layer {there})"
        )


def test_the_page_shows_the_list() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "ARCHITECTURE.md is stale: run `make docs`"


@pytest.mark.parametrize("module", [m for m in sorted(MODULES) if m.split(".")[0] not in STAND_ALONE])
def test_no_module_is_too_long(module: str) -> None:
    lines = MODULES[module].read_text().splitlines()
    assert len(lines) <= LONG or "lines because" in "\n".join(lines[:30]), (
        f"swarm.{module} has {len(lines)} lines: split it, or say why at its top ('… lines because …')"
    )
