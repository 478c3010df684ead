"""How the results of `swarm doctor` are shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from swarm.cli.ui.output import GREEN, ORANGE, RED, Out
from swarm.cli.ui.render import counted
from swarm.cli.ui.table import Column
from swarm.doctor import Check, Status
from swarm.doctor.capacity import Capacity

_MARKS = {Status.OK: ("ok  ", GREEN), Status.WARN: ("warn", ORANGE), Status.FAIL: ("FAIL", RED)}


def show(out: Out, checks: Sequence[Check]) -> None:
    """One line per check, with the command that fixes it below; one line for a VM that passes every check."""
    if out.json:
        out.dump(checks)
        return
    lines = [check for _, group in groupby(checks, key=_vm) for check in _folded(list(group))]
    width = max((len(check.name) for check in lines), default=0)
    for check in lines:
        mark, style = _MARKS[check.status]
        out.marked(mark, style, f"{check.name:<{width}}  {check.detail}")
        if check.fix:
            out.line(f"{'':<{width + 6}}  fix: {check.fix}")
    bad = sum(check.status is Status.FAIL for check in checks)
    warnings = sum(check.status is Status.WARN for check in checks)
    out.line()
    out.line(f"{counted(len(checks), 'check')}: {bad} failed, {counted(warnings, 'warning')}")


def show_capacity(out: Out, capacity: Capacity) -> None:
    if out.json:
        out.dump({"capacity": capacity, "fits_idle": capacity.fits_idle, "fits_full": capacity.fits_full})
        return
    cost, (idle, idle_by), (full, full_by) = capacity.cost, capacity.fits_idle, capacity.fits_full
    size = f"{capacity.memory_mb} MB of memory, {capacity.vcpus} CPU and a {capacity.disk_mb} MB disk"
    out.line(f"an idle clone with {size} takes")
    out.line(f"  {cost.private_mb} MB of its own memory, {cost.disk_mb} MB of disk, {cost.descriptors} open files")
    out.line(f"  ({cost.shared_mb} MB more are shared with its template and other clones)")
    out.line()
    rows = [(name, capacity.idle[name], capacity.full[name]) for name in capacity.idle]
    out.table(("LIMIT", Column("IDLE VMS", right=True), Column("BUSY VMS", right=True)), rows)
    out.line()
    out.line(f"fits: {idle} idle VMs (limit: {idle_by}), {full} that use all their memory and disk (limit: {full_by})")
    out.line(f"{capacity.cores:g} CPUs: more working VMs than that share them")


def _vm(check: Check) -> str:
    found = re.match(r"VM \d+(?=: )", check.name)
    return found[0] if found else check.name


def _folded(group: list[Check]) -> list[Check]:
    name = _vm(group[0])
    if len(group) < 2 or name == group[0].name or any(check.status is not Status.OK for check in group):
        return group
    passed = ", ".join(check.name.partition(": ")[2] for check in group)
    return [Check(name=name, status=Status.OK, detail=f"healthy: {passed}")]
