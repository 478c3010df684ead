"""`swarm bench`: run echo tickets through the whole engine, beside what the bare parts need on the same host."""

from swarm.bench.report import Cell, Figure, Report, percentiles
from swarm.bench.run import MODES, bench, bench_sandboxes

__all__ = ["MODES", "Cell", "Figure", "Report", "bench", "bench_sandboxes", "percentiles"]
