"""The honest clock for users: `swarm bench` runs echo tickets through the whole engine, and beside them, in the same
run on the same host, what the bare parts can do. Every figure of ours stands next to its baseline."""

from swarm.bench.report import Cell, Figure, Report, percentiles
from swarm.bench.run import MODES, bench

__all__ = ["MODES", "Cell", "Figure", "Report", "bench", "percentiles"]
