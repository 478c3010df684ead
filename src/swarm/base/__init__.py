"""Helpers that know no noun of Swarm's: asyncio, clock, processes, logs, JSON, YAML with positions, crash points.

Everything but `swarm.model` and `swarm.errors` may import it.
"""
