"""The result of a benchmark: values, Markdown tables, and an SVG."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from swarm.base.clock import PHASES

Spread = Mapping[str, float]  # p50, p95, p99, all in one unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What Swarm needs, beside what the bare part needs. ``ratio`` is ours / baseline, None without a baseline."""

    name: str
    ours: float
    baseline: float | None
    unit: str
    n: int
    target: str = ""

    @property
    def ratio(self) -> float | None:
        return round(self.ours / self.baseline, 3) if self.baseline else None

    def row(self) -> tuple[str, str, str, str, str]:
        """Name, ours, baseline, ratio and target, as a table shows them."""
        baseline = "" if self.baseline is None else f"{self.baseline:.1f} {self.unit}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        return self.name, f"{self.ours:.1f} {self.unit}", baseline, ratio, self.target


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """``tickets`` inserted at once and run in one mode. ``insert_to_done`` and ``phases`` are milliseconds: the former
    is measured from outside, the latter are what attempts recorded. ``engine_cpu_ms`` and ``vmm_cpu_ms`` are the CPU
    time per ticket of the engine's process, and of its VMMs with their helpers."""

    mode: str
    tickets: int
    n: int
    insert_to_done: Spread
    phases: Mapping[str, Spread]
    per_second: float
    engine_cpu_ms: float
    vmm_cpu_ms: float
    failed: int

    @property
    def engine_cpu_share(self) -> float:
        """The engine's CPU time per CPU time of its VMMs."""
        return round(self.engine_cpu_ms / self.vmm_cpu_ms, 3) if self.vmm_cpu_ms else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    host: Mapping[str, object]
    cells: tuple[Cell, ...]
    figures: tuple[Figure, ...]

    @property
    def phases(self) -> list[str]:
        """The phases that any cell has, in their order."""
        return [name for name in PHASES if any(name in cell.phases for cell in self.cells)]

    @property
    def failed(self) -> bool:
        return any(cell.failed for cell in self.cells)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 is the median, p95 and p99 are by nearest rank: with few values, p99 is the worst one."""
    ordered = sorted(values)
    if not ordered:
        return {}
    ranked = {name: ordered[min(len(ordered) - 1, int(len(ordered) * share))] for name, share in _RANKS}
    return {name: round(value, 2) for name, value in {"p50": statistics.median(ordered), **ranked}.items()}


_RANKS: Final = (("p95", 0.95), ("p99", 0.99))


def markdown(report: Report) -> str:
    """The same as what is printed, as Markdown, in lines of at most 120 characters."""
    host = report.host
    lines = [
        f"{host['driver']}; {host['cpu']}, {host['cores']} cores, kernel {host['kernel']}, Python {host['python']};",
        f"load before and after: {host['load_before']} and {host['load']}; {host['max_vms']} VMs at once.",
    ]
    if report.cells:
        lines += _cells(report)
    lines += ["", "| | ours | bare | ratio | target |", "|---|--:|--:|--:|---|"]
    lines += [f"| {' | '.join(figure.row())} |" for figure in report.figures]
    return "\n".join(lines) + "\n"


def _cells(report: Report) -> list[str]:
    lines = [
        "",
        "| tickets | p50 | p95 | p99 | per s | CPU of a ticket: engine + VMM | failed |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for cell in report.cells:
        spread = " | ".join(f"{cell.insert_to_done[name]:.0f} ms" for name in ("p50", "p95", "p99"))
        lines.append(
            f"| {cell.mode} x {cell.tickets} (n = {cell.n}) | {spread} | {cell.per_second} "
            f"| {cell.engine_cpu_ms:.0f} + {cell.vmm_cpu_ms:.0f} ms | {cell.failed or ''} |"
        )
    phases = report.phases
    lines += ["", f"| p50 of each phase, ms | {' | '.join(phases)} |", f"|---|{'--:|' * len(phases)}"]
    for cell in report.cells:
        values = [f"{cell.phases[name]['p50']:.0f}" if name in cell.phases else "" for name in phases]
        lines.append(f"| {cell.mode} x {cell.tickets} | {' | '.join(values)} |")
    return lines


# One for each phase: Okabe and Ito's palette, which colour-blind readers can tell apart, and two greys.
_COLOURS: Final = (
    "#999999", "#ccbb44", "#56b4e9", "#e69f00", "#0072b2", "#cc79a7", "#555555", "#009e73", "#d55e00", "#f0e442",
    "#000000",
)  # fmt: skip
_WIDTH, _LEFT, _BAR, _GAP, _TOP = 960, 150, 22, 12, 74


def plot(report: Report) -> str:
    """An SVG with one bar per cell, made of the medians of its phases."""
    bars = [(f"{c.mode} x {c.tickets}", {p: c.phases[p]["p50"] for p in PHASES if p in c.phases}) for c in report.cells]
    longest = max((sum(phases.values()) for _, phases in bars), default=1.0) or 1.0
    scale = (_WIDTH - _LEFT - 110) / longest
    height = _TOP + len(bars) * (_BAR + _GAP) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        '<text x="12" y="22" font-size="16">Where a ticket\'s time goes: medians, '
        f"{escape(str(report.host['driver']))}</text>",
    ]
    x = 12.0
    for phase, colour in zip(PHASES, _COLOURS, strict=False):
        parts.append(f'<rect x="{x:.0f}" y="38" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16:.0f}" y="49">{escape(phase)}</text>')
        x += 34 + 7.5 * len(phase)
    for row, (name, phases) in enumerate(bars):
        y, x = _TOP + row * (_BAR + _GAP), float(_LEFT)
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        for phase, colour in zip(PHASES, _COLOURS, strict=False):
            width = phases.get(phase, 0.0) * scale
            title = f"<title>{escape(phase)}: {phases.get(phase, 0.0):.1f} ms</title>"
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}">{title}</rect>'
            )
            x += width
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 16}">{sum(phases.values()):.0f} ms</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
