"""Who may import whom: the one list that the test enforces and that ARCHITECTURE.md shows.

`make docs` (``python -m tests.layers``) writes the table into ARCHITECTURE.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
PAGE: Final = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- layers: made by `make docs` -->\n", "<!-- layers end -->\n"

# From the ground up. A module may import what stands on a lower line, and modules of its own entry; entries on one line
# don't import each other. The longest matching prefix decides where a module stands.
LAYERS: Final[list[tuple[tuple[str, ...], str]]] = [
    (("model",), "nouns, states and transitions: values only"),
    (("errors",), "the error tree"),
    (("fields",), "what files and settings from users have in common: names, bounds, errors in plain words"),
    (("config", "base", "ledger"), "settings; helpers that know no noun of Swarm's; bills of model calls as values"),
    (("cel",), "`${…}` expressions"),
    (("schema",), "JSON Schema checks with a bounded cost"),
    (("workflow",), "workflows read, checked and planned; pure"),
    (("channel",), "the host's side of the protocol with agentd"),
    (("live",), "the same by an engine's socket: what goes over it, and its client"),
    (("vm.driver",), "what a VM driver must offer, and the values passed to it"),
    (("vm.network", "vm.image"), "namespaces, bridge, rules; guest images and layers"),
    (("vm.drivers",), "QEMU, Firecracker, plain process"),
    (("vm.choose",), "which driver works on this host"),
    (("vm.slots",), "which VMs exist, their network slots, and what removes them"),
    (("vm.live",), "a VM that runs, and how it is told when it has ended instead"),
    (
        ("vm.warmup", "vm.template", "vm.snapshots"),
        "booted VMs on disk, from which clones are made; VMs paused on disk",
    ),
    (("vm.launcher",), "from a VmSpec to a VM that is ready for an agent"),
    (("vm.pool",), "VMs kept ready"),
    (("store.sql",), "connections, threads, rows, tables"),
    (("store.tickets",), "tickets, their validation, dependencies, events"),
    (("store.registry",), "agents, workflows, schedules, webhooks, secrets"),
    (("store.runs",), "the workflow engine over the tables"),
    (("store.claims", "store.sandboxes"), "claim, lease, finish, retry, approvals; sandboxes and snapshots"),
    (("store", "agents", "gateway"), "all that can be asked of the database; agent packages; model proxy and egress"),
    (("triggers",), "what makes tickets by itself: schedules"),
    (("engine",), "one attempt in one VM; workers, dispatch"),
    (("admin",), "packages, layers, secrets, the audit"),
    (("api",), "HTTP"),
    (("dashboard",), "pages for people"),
    (("doctor",), "looks at everything, changes nothing"),
    (("app",), "wiring: the only place that names concrete classes"),
    (("bench",), "measures tickets beside the bare parts"),
    (("cli", "client"), "the commands; the SDK, which imports nothing of ours"),
]
# They run inside a VM: they import nothing of ours, and the host never imports them.
STAND_ALONE: Final = {"guest", "builtin"}


def place(module: str) -> tuple[int, str]:
    """Layer and entry of a module, which is named without the leading 'swarm.'."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        entry = ".".join(parts[:length])
        for number, (entries, _) in enumerate(LAYERS):
            if entry in entries:
                return number, entry
    raise AssertionError(f"swarm.{module} has no place in LAYERS of {Path(__file__).name}: add it")


def table() -> str:
    """The list as a Markdown table, the top layer first."""
    lines = ["| may import what stands below it | what it is |", "|---|---|"]
    lines += [f"| {', '.join(f'`{entry}`' for entry in entries)} | {what} |" for entries, what in reversed(LAYERS)]
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """The page with the present table between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
