"""Who may import whom (ARCHITECTURE.md draws it). Imports inside functions count as well."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "swarm"

# From the ground up. A module may import what lies on a lower line, and what shares its own word: the parts on one line
# know nothing of each other. The longest prefix decides where a module stands.
LAYERS: list[set[str]] = [
    {"model"},
    {"errors"},
    {"config", "process", "aio", "clock", "log", "faults", "redact", "jsontext"},
    {"cel"},
    {"schema"},
    {"vm.driver", "manifest", "versions", "ledger"},  # the values and Protocols between the parts
    {"workflow"},  # pure: the store asks it what comes next
    {"store", "vm", "channel", "agents", "gateway"},
    {"vm.rehearsal"},  # what a template's VM does before it is frozen, over the channel
    {"vm.launcher"},  # the way of a VM: network, driver and channel meet here
    {"vm.pool"},
    {"outside"},  # what an attempt may reach beyond its VM
    {"engine"},
    {"worker", "triggers"},
    {"vault", "api", "single", "dispatch", "prove", "packages", "layers", "trial"},
    {"doctor"},
    {"app"},
    {"checkup", "byhand", "setup", "web"},
    {"bench"},
    {"cli"},
]
LONG = 450  # "about 400"
STAND_ALONE = {"guest", "builtin"}  # they run in a VM: never imported, and import nothing of ours


def place(module: str) -> tuple[int, str]:
    """Layer and word of a module, named without the leading 'swarm.'."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        word = ".".join(parts[:length])
        for number, words in enumerate(LAYERS):
            if word in words:
                return number, word
    raise AssertionError(f"swarm.{module} has no place in LAYERS of {Path(__file__).name}: give it one")


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
    layer, word = place(module)
    for target in wanted:
        assert target.split(".")[0] not in STAND_ALONE, f"swarm.{module} imports swarm.{target}, which is for the guest"
        there, its_word = place(target)
        # A package's own modules may know each other, whichever layer a single one of them was lifted to.
        assert there < layer or its_word == word, (
            f"swarm.{module} (layer {layer}) imports swarm.{target} (layer {there})"
        )


@pytest.mark.parametrize("module", [m for m in sorted(MODULES) if m.split(".")[0] not in STAND_ALONE])
def test_no_module_is_too_long(module: str) -> None:
    lines = MODULES[module].read_text().splitlines()
    assert len(lines) <= LONG or "lines because" in "\n".join(lines[:30]), (
        f"swarm.{module} has {len(lines)} lines: split it, or say why at its top ('… lines because …')"
    )
